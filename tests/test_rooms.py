"""Checks the law of the rooms: imports only go down, each room knows what its name says; tests touch no privates."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deepspeed_acco"
# From the ground up; settings.py and optimizer.py lie between algorithm and engine, __init__.py above all but tools and
# doctor.py, which launchers start.
ROOMS = ["algorithm", "settings", "optim", "runtime", "optimizer", "engine", "__init__", "tools", "doctor"]
UNKNOWN = {  # to the room of that name
    "algorithm": {"torch", "deepspeed"},
    "settings": {"torch", "deepspeed"},
    "optim": {"torch.distributed", "threading", "multiprocessing", "subprocess", "deepspeed"},
    "runtime": {"deepspeed"},
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def _room(parts):
    return parts[0] if parts[0] in ROOMS else "__init__"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file):
    here, room = ["deepspeed_acco", *file.parts[:-1]], _room([file.parts[0].removesuffix(".py")])
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("deepspeed_acco."):
                other = _room(name.split(".")[1:])
                assert ROOMS.index(other) <= ROOMS.index(room), f"{file} imports {name}, which is above it"
            elif str(file) != "algorithm/reference.py":
                known = [part for part in UNKNOWN.get(room, ()) if (name + ".").startswith(part + ".")]
                assert not known, f"{file} imports {name}: the room {room} may not know {known[0]}"


def test_one_file_patches_and_three_talk_to_processes():
    def users(*words):
        return {str(file) for file in FILES if any(word in (PACKAGE / file).read_text() for word in words)}

    assert users("setattr(") <= {"engine/patches.py"}
    assert users("torch.distributed as", "import torch.distributed") == {
        f"runtime/{name}.py" for name in ("communicator", "messages", "collectives")
    }
    assert users("torch.cuda.Stream", "torch.cuda.Event", "record_event") == {"runtime/clock.py", "runtime/lanes.py"}


OF_DEEPSPEED_AND_TORCH = {"_config", "_global_grad_norm", "_schema"}


def test_tests_touch_no_privates():
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value).split(".")[0]
                is_own = owner in ("self", "cls", "torch", "dist", "os") or node.attr in OF_DEEPSPEED_AND_TORCH
                assert is_own or "deepspeed_suite" in path.parts, f"{path}:{node.lineno} {ast.unparse(node)}"
