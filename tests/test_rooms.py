"""Imports go down the floors; one file names torch.distributed, one has streams and threads, one patches."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deepspeed_acco"
FLOORS = {
    "rounds": 0,
    "layout": 0,
    "settings": 0,
    "plan": 0,
    "ops": 1,
    "update": 1,
    "quantize": 1,
    "reference": 1,
    "pages": 1,
    "comm": 2,
    "lanes": 2,
    "buffers": 2,
    "driver": 2,
    "log": 3,
    "optimizer": 3,
    "checkpoint": 3,
    "monitor": 3,
    "recorder": 3,
    "adaptive": 3,
    "split": 3,
    "zero": 3,
    "plugin": 4,
    "op_builder": 4,
    "kernel_bench": 4,
    "planning": 4,
    "calibration": 4,
    "emulated": 4,
    "hosts": 4,
    "launches": 4,
    "summary": 4,
    "comparison": 4,
    "compare": 4,
    "pictures": 4,
    "report_data": 4,
    "html_page": 4,
    "comparison_page": 4,
    "run_page": 4,
    "report": 4,
    "cli": 4,
    "__init__": 5,
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def _imports(module):
    """(top-level names of absolute imports, names of this package's modules)."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            outside.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside.update([node.module] if node.module else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom):
            outside.update(f"{node.module}.{alias.name}" for alias in node.names)
    return outside, inside


def test_every_module_has_a_floor():
    assert set(MODULES) <= set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    outside, inside = _imports(module)
    for name in inside:
        assert FLOORS[name] <= FLOORS[module], f"{module} imports {name}, which is on a higher floor"
    for name in outside:
        top = name.split(".")[0]
        if top == "deepspeed":
            assert FLOORS[module] >= 3, f"{module} may not know DeepSpeed"
        if top == "torch":
            assert FLOORS[module] >= 1, f"{module} may not know torch"
        if name.startswith("torch.distributed"):
            assert module == "comm"
        if top in ("threading", "concurrent"):
            assert module in ("lanes", "op_builder")


@pytest.mark.parametrize("module", MODULES)
def test_streams_and_patches_have_one_home(module):
    text = (PACKAGE / f"{module}.py").read_text()
    if module != "lanes":
        assert "torch.cuda.Stream" not in text and "torch.cuda.Event" not in text and "record_event" not in text
    if module != "plugin":
        assert "setattr(" not in text


def test_mypy_checks_the_lower_floors():
    checked = re.findall(r'"deepspeed_acco/(\w+)\.py"', (PACKAGE.parent / "pyproject.toml").read_text())
    assert sorted(checked) == sorted(module for module, floor in FLOORS.items() if floor <= 2)
