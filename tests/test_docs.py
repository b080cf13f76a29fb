# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what the papers say: files and anchors exist, snippets run, commands parse and print what stands beside them.

A ``text`` block right behind a ``bash`` block of one command is what that command prints. After a change of it

    python -m tests.test_docs

writes all such blocks anew.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deepspeed_acco.optimizer import ACCO
from deepspeed_acco.tools.cli import main
from deepspeed_acco.tools.doctor import command as doctor
from tests.support import training

ROOT = Path(__file__).parents[1]
PACKAGE, CSRC, RESULTS = ROOT / "deepspeed_acco", ROOT / "csrc", ROOT / "benchmarks" / "results"
PAPERS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("deepspeed_acco", "csrc", "tests", "benchmarks", "examples", "ds_configs", "docs")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in [*(ROOT / folder).rglob("*"), ROOT / "setup.py"]
    if path.suffix in (".py", ".h", ".cpp", ".cu")
)
OF_PACKAGE = [path for path in SOURCES if {PACKAGE, CSRC}.intersection(path.parents) or path.parent == ROOT]
NAMES = {path.name for path in ROOT.glob("*")} | {path.name for f in FOLDERS for path in (ROOT / f).rglob("*")}
# Scripts and tests of DeepSpeed, the reader's own script, and a header of Linux.
FOREIGN = {
    *("ds_to_universal.py", "zero_to_fp32.py", "train.py", "linux/mman.h"),
    *("test_zero_autocast.py", "test_zero_user_backward.py", "test_zero_coalesce_grad_reduction.py"),
}
FILE_NAME = re.compile(
    r"(?<![\w/.{<-])(?:(?:[\w-]+/)*[\w.-]+\.(?:py|md|h|cpp|cu|cff|png)|(?:ds_configs|benchmarks)/[\w/.-]+\.json)\b"
)


def _of(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


# ---- reading Markdown


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its content, what stands between the block before and it, and where it is."""

    language: str
    content: str
    before: str
    at: slice


def blocks_of(text: str) -> list[Block]:
    found, end = [], 0
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Block(match[1], match[2], text[end : match.start()], slice(match.start(2), match.end(2))))
        end = match.end()
    return found


def prose_of(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code_of(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose_of(text))]


def anchors_of(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- files, links, anchors


def is_there(name: str, near: Path) -> bool:
    """Whether a file that a text names exists: in the repository, or in the installed DeepSpeed, also without its
    ``runtime/`` or ``ops/``."""
    if "/" not in name:
        return name in NAMES | FOREIGN
    deepspeed = Path(importlib.util.find_spec("deepspeed").origin).parent
    folders = (ROOT, near, PACKAGE, CSRC, deepspeed.parent, deepspeed, deepspeed / "runtime", deepspeed / "ops")
    return name in FOREIGN or any((folder / name).is_file() for folder in folders)


def is_defined(dotted: str) -> bool:
    """Whether ``deepspeed_acco.part.name`` is a module, or a name in the module before it."""
    place, names = PACKAGE, dotted.split(".")[1:]
    for index, name in enumerate(names):
        if (place / name).is_dir():
            place = place / name
        elif (place / f"{name}.py").is_file():
            place = place / f"{name}.py"
        else:
            source = place / "__init__.py" if place.is_dir() else place
            return re.search(rf"\b{name}\b", source.read_text()) is not None and index >= len(names) - 2
    return True


@_of(PAPERS)
def test_files_that_a_paper_names_are_there(path):
    # The commands of results are a record of what was run, and are compared with their JSON below.
    text = re.sub(r"^- Command: `[^`]+`", "", path.read_text(), flags=re.MULTILINE)
    named = {name for code in inline_code_of(text) for name in FILE_NAME.findall(code)}
    missing = sorted(name for name in named if not is_there(name, path.parent))
    assert not missing, f"{path.name} names what is not there: {missing}"


@_of(PAPERS)
def test_folders_and_names_of_the_package_are_there(path):
    for code in inline_code_of(path.read_text()):
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})(?:/\w+)*/?", code):
            assert (ROOT / code).is_dir(), f"{path.name}: there is no folder {code}"
        for dotted in re.findall(r"\bdeepspeed_acco(?:\.\w+)+", code):
            assert is_defined(dotted), f"{path.name}: {dotted} is nothing of the package"


@_of(PAPERS)
def test_links_and_anchors_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors_of(linked.read_text()), f"{path.name}: no heading makes the anchor of {target}"


def test_every_page_of_docs_is_on_the_map():
    text = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", text)}
    assert set((ROOT / "docs").rglob("*.md")) - linked == {ROOT / "docs" / "README.md"}


@_of(OF_PACKAGE)
def test_files_that_the_package_names_are_there(path):
    text = re.sub(r"^#include <.*>$", "", path.read_text(), flags=re.MULTILINE)
    missing = sorted({name for name in FILE_NAME.findall(text) if not is_there(name, path.parent)})
    assert not missing, f"{path.relative_to(ROOT)} names what is not there: {missing}"
    for dotted in re.findall(r"`~?(deepspeed_acco(?:\.\w+)+)`", text):
        assert is_defined(dotted), f"{path.relative_to(ROOT)}: {dotted} is nothing of the package"


@_of(SOURCES)
def test_sources_name_only_papers_that_are_there(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    for name in re.findall(r"\b[A-Z]{4,}\.md\b|\bDESIGN\b", text):
        assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}, which is not in the repository"
    for heading in re.findall(r"\bREADME(?:\.md)?, \"([^\"]+)\"", text):
        headings = re.findall(r"^#+ (.*)$", prose_of((ROOT / "README.md").read_text()), re.MULTILINE)
        assert heading in headings, f"{path.relative_to(ROOT)} sends to README, {heading!r}, which has no such heading"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- JSON and Python snippets


def _optimizers_in(value):
    if isinstance(value, dict):
        if value.get("type") == "ACCO":
            yield value
        for part in value.values():
            yield from _optimizers_in(part)


def _accept(optimizer: dict) -> None:
    params = optimizer["params"]
    assert ACCO([torch.nn.Parameter(torch.zeros(1))], **params).defaults["lr"] == params["lr"]


def test_json_snippets_are_accepted_by_the_optimizer():
    built = 0
    for path in PAPERS:
        text = path.read_text()
        for block in blocks_of(text):
            if block.language != "json":
                continue
            content = block.content if block.content.startswith("{") else "{" + block.content + "}"
            for optimizer in _optimizers_in(json.loads(content)):
                _accept(optimizer)
                built += 1
        for snippet in re.findall(r'"optimizer": (\{"type": "ACCO", "params": \{".*?\}\})', text):
            _accept(json.loads(snippet))
            built += 1
    assert built >= 6


def test_every_key_is_documented():
    from deepspeed_acco.settings import ACCO_KEYS, ADAMW_KEYS

    keys = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "reference" / "keys.md").read_text(), re.MULTILINE)
    assert [key for key in keys if key in ADAMW_KEYS + ACCO_KEYS] == [
        *ADAMW_KEYS,
        *("schedule", "estimate_fraction", "estimate_comm", "commit_comm", "ranks_per_host", "overlap_warmup_steps"),
        *("accumulation", "max_window", "lr_follows", "lane", "sm_share", "comm_timeout_s"),
    ]
    assert set(keys) >= set(ACCO_KEYS)


def _python_snippets():
    for path in PAPERS:
        for block in blocks_of(path.read_text()):
            if block.language == "python":
                yield path, block


def run_snippet(code: str) -> dict[str, int]:
    """Runs it on one rank, with ``engine`` and ``loader`` of a small model; returns what the engine has counted."""
    import torch.distributed as dist

    import deepspeed_acco

    needs_adaptive = re.search(r"train_samples|on_window|replay_windows", code)
    params = {"accumulation": "adaptive"} if needs_adaptive else {}
    engine = training.start_engine(training.ds_config(4, **params))
    loader = [training.batch(dist.get_rank(), 0, micro_batch) for micro_batch in range(8)]
    if not needs_adaptive:
        for x, y in loader:  # after it the parameters are not the true weights
            engine.backward(engine(x, y))
            engine.step()
    steps = engine.global_steps
    exec(code, {"deepspeed_acco": deepspeed_acco, "torch": torch, "engine": engine, "loader": loader})
    counted = {"steps": engine.global_steps - steps, "samples": engine.global_samples}
    engine.destroy()
    return counted


def test_python_snippets_run(ranks):
    run = 0
    for path, block in _python_snippets():
        code = block.content
        compile(code, str(path), "exec")
        reason = re.search(r"<!-- not run: (.+?) -->\n$", block.before)
        if reason:
            continue
        counted = ranks(2).run(run_snippet, code=code)
        if "engine.step()" in code:
            assert counted[0]["steps"] == counted[1]["steps"] >= 1, (path.name, counted)
        if "train_samples" in code:
            assert counted[0]["samples"] == 2 * 8 * 4, "every micro-batch of both ranks is in one step"
        run += 1
    assert run >= 5


# ---- commands


@dataclass(frozen=True)
class Command:
    """A line of a ``bash`` block without its environment; ``printed`` is the block of its output, or None."""

    path: Path
    words: tuple[str, ...]
    printed: Block | None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}: {' '.join(self.words)[:70]}"


def commands() -> list[Command]:
    found = []
    for path in PAPERS:
        following = blocks_of(path.read_text())
        for block, behind in zip(following, [*following[1:], None]):
            if block.language != "bash":
                continue
            is_output = behind is not None and behind.language == "text" and not behind.before.strip()
            lines = block.content.replace("\\\n", " ").splitlines()
            parts = [part for line in lines if line.strip() for part in line.split(" && ")]
            for part in parts:
                words = shlex.split(part)
                while re.match(r"\w+=", words[0]):
                    words = words[1:]
                found.append(Command(path, tuple(words), behind if is_output and len(parts) == 1 else None))
    return found


COMMANDS = commands()
OWN = [command for command in COMMANDS if command.words[0] == "ds_acco"]
# What needs no measurement: the arithmetic of the plan, and pages of files that are in the repository.
CHEAP = [
    command
    for command in OWN
    if (command.words[1] == "plan" and "--calibrate" not in command.words)
    or (command.words[1] == "report" and (ROOT / command.words[2]).exists())
    or command.words[1] in ("--version", "schema", "completion", "check", "init", "fit")
]


class Parsed(Exception):
    """The command's arguments were accepted; nothing was run."""


@pytest.fixture
def only_parses(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, *args, **kwargs):
        raise Parsed(parse_args(parser, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


@pytest.mark.parametrize("command", OWN, ids=str)
def test_commands_of_ds_acco_parse(command, only_parses):
    with pytest.raises((Parsed, SystemExit)) as end:
        main(list(command.words[1:]))
    assert end.type is Parsed or end.value.code == 0, f"{command} is not accepted"


def test_every_subcommand_that_the_papers_name_exists(capsys):
    named = {match[1] for path in PAPERS for match in re.finditer(r"`ds_acco ([a-z]+)", path.read_text())}
    assert {"init", "check", "compare", "fit", "plan", "report", "env", "kernels", "schema", "completion"} <= named
    for name in sorted(named):
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0, f"ds_acco {name}"


def _output_of(command: Command, folder: Path) -> str:
    """What it prints where the repository's examples and results are at hand and ``folder`` takes what it writes."""
    for name in ("benchmarks", "ds_configs", "examples", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    here, printed = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            code = main(list(command.words[1:]))
    finally:
        os.chdir(here)
    assert code == 0, f"{command} ended with {code}"
    return printed.getvalue()


@pytest.mark.parametrize("command", CHEAP, ids=str)
def test_cheap_commands_run_and_print_what_the_paper_shows(command, tmp_path):
    printed = _output_of(command, tmp_path)
    if command.printed is not None:
        assert printed == command.printed.content, "python -m tests.test_docs writes the block anew"
    if command.words[1] == "report":
        assert "<html" in (tmp_path / printed.strip()).read_text()


def test_outputs_are_only_beside_what_runs():
    shown = [command for command in COMMANDS if command.printed is not None]
    assert shown and set(map(str, shown)) <= set(map(str, CHEAP))


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command.words[0] in ("deepspeed", "python")], ids=str
)
def test_scripts_of_the_commands_take_these_options(command):
    from deepspeed.launcher.runner import parse_args

    if command.words[0] == "python":
        module = command.words[2]
        assert command.words[1] == "-m"
        assert module == "pytest" or any(
            (ROOT / module.replace(".", "/")).with_suffix(suffix).exists() for suffix in ("", ".py")
        )
        return
    launched = parse_args(list(command.words[1:]))
    if launched.user_script == "deepspeed_acco.doctor":
        doctor.add_check_arguments(parser := argparse.ArgumentParser())
        parser.parse_args(launched.user_args)
        return
    if launched.module:
        assert launched.user_script == "deepspeed_acco"
        launched.user_script = launched.user_args.pop(0)
    script = ROOT / launched.user_script
    known = script.read_text() + (ROOT / "examples" / "text_data.py").read_text()
    for word in launched.user_args:
        if word.startswith("--") and word not in ("--deepspeed_config", "--deepspeed"):  # DeepSpeed's and the trainers'
            assert f'"{word}"' in known, f"{script.name} has no option {word}"
        if word.startswith("ds_configs/"):
            assert (ROOT / word).is_file()


def test_programs_of_the_commands_are_known():
    assert {command.words[0] for command in COMMANDS} == {
        *("ds_acco", "deepspeed", "python", "pip", "ruff", "mypy", "find", "rm", "torchrun", "accelerate")
    }


def test_extras_that_the_papers_install_exist():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    for path in PAPERS:
        for names in re.findall(r"(?:deepspeed_acco|\.)\[([\w,]+)\]\"", path.read_text()):
            assert set(names.split(",")) <= extras, f"{path.name} installs {names}; there are {sorted(extras)}"


# ---- results


def _sections_of_results():
    text = (ROOT / "docs" / "reference" / "results.md").read_text()
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        files = [RESULTS / name for name in re.findall(r"\]\(\.\./\.\./benchmarks/results/([\w.-]+\.json)\)", body)]
        yield title, body, {file.name: json.loads(file.read_text()) for file in files}


def _numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _numbers_in(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def _shown_of(content: dict):
    """The numbers of a file that a table may show: as they are, in percent, in millions, of 1e-9; and what is derived
    of a comparison: R/C, seconds of a step beyond C, samples a second over those of what only computes; of a sweep:
    ZeRO-0's step over the others'."""
    for number in _numbers_in(content):
        yield from (number, 100 * number, number / 1e6, 1e9 * number)
    for point in content.get("points", []):
        for figures in point.values():
            if isinstance(figures, dict):
                yield point["zero0"]["step_s"] / figures["step_s"]
    if "reference" not in content:
        return
    alone = content["reference"]
    yield alone["round_s"] / alone["compute_s"]
    for config in content["configs"]:
        yield config["step_s"]["median"] - alone["compute_s"]
        yield config["samples_per_s"]["median"] / alone["samples_per_s_alone"]


def test_commands_and_dates_of_the_results_are_those_of_their_files():
    seen = 0
    for title, body, files in _sections_of_results():
        recorded = {command for content in files.values() for command in content.get("commands", [])}
        recorded |= {content["command"] for content in files.values() if "command" in content}
        dates = {content["date"] for content in files.values() if "date" in content}
        for command in re.findall(r"^- Command: `([^`]+)`", body, re.MULTILINE):
            assert command in recorded or command.startswith("ds_acco kernels"), f"{title}: {command}"
            seen += 1
        assert dates <= set(re.findall(r"^- Date: ([\d-]+)", body, re.MULTILINE)), title
    assert seen >= 15


def test_figures_of_the_tables_are_in_their_files():
    seen = 0
    for title, body, files in _sections_of_results():
        shown = {number for content in files.values() for number in _shown_of(content)}
        for line in body.splitlines():
            cells = re.sub(r"`[^`]*`", "", line) if line.startswith("| ") and files else ""
            for text in re.findall(r"(?<![\w.-])[-+]?\d+\.\d+(?![\w.])", cells):
                half_a_digit = 0.5 * 10 ** -len(text.split(".")[1]) + 1e-9
                assert any(abs(number - float(text)) <= half_a_digit for number in shown), f"{title}: {text} in {line}"
                seen += 1
    assert seen >= 200


def test_figures_outside_of_the_results_are_among_them():
    results = (ROOT / "docs" / "reference" / "results.md").read_text()
    readme = (ROOT / "README.md").read_text().split("\n## When it pays, and when not\n")[1].split("\n## ")[0]
    for text in (readme, (ROOT / "docs" / "how-to" / "slow-links.md").read_text()):
        figures = re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.])", prose_of(text))
        assert len(figures) >= 5
        for figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results), f"{figure} is not in results.md"


def test_every_result_of_the_repository_is_linked():
    linked = {name for _, _, files in _sections_of_results() for name in files}
    assert linked == {path.name for path in RESULTS.glob("*.json")}


# ---- the table of the engine's features


def _tests_of(name):
    return set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / "engine" / name).read_text(), re.MULTILINE))


def test_the_engine_table_and_its_tests():
    text = (ROOT / "docs" / "reference" / "engine-features.md").read_text()
    section = text.split("\n## Features and their tests\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    named = set()
    for row in rows:
        file = "test_engine.py"
        for part in re.findall(r"`(test_\w+(?:\.py)?)`", row.rsplit(" | ", 1)[1]):
            if part.endswith(".py"):
                file = part
                continue
            found = "test_engine.py" if part in _tests_of("test_engine.py") else file
            assert part in _tests_of(found), f"{part} of the row {row!r} is in neither test_engine.py nor {file}"
            named.add(part)
    unnamed = _tests_of("test_engine.py") - named
    assert not unnamed, f"in test_engine.py and in no row: {sorted(unnamed)}"


# ---- writing the outputs anew


def write_outputs(folder: Path) -> None:
    """Puts what the cheap commands print into the papers."""
    for path in PAPERS:
        text = path.read_text()
        for command in reversed([command for command in CHEAP if command.path == path and command.printed]):
            at = command.printed.at
            text = text[: at.start] + _output_of(command, folder) + text[at.stop :]
        path.write_text(text)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_outputs(Path(scratch))
