# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Fuzzes what ``ds_acco plan --results`` and ``ds_acco report`` read: a comparison's results.json, and the files of one
run, damaged."""

import contextlib
import copy
import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.in_process import NO_NUMBER, problem, without_pictures

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("compare_*.json"))
VALUES: list[Any] = [None, True, False, 0, 1, -1, 0.5, -0.0, 2, 10**18, 10**25, 10**400, -(10**400), 1e-320, 1e-30]
VALUES += [1e29, 1e300, -1e300, float("nan"), float("inf"), float("-inf"), "", "x", "1", "cuda", "cpu", "tpu", "acco"]
VALUES += ["\x1b[31m", "<script>", "\u202e", "a" * 5000, [], {}, [[]], [None], [1], {"median": 1.0}, {"a": {"b": []}}]
HEADER = {"rank": 0, "world_size": 2, "optimizer": "ACCO", "schedule": "acco", "stage": 1, "numel": 1000, "n": 4}
HEADER |= {"a": 2, "weight_bytes": 2, "comm_bytes": 2, "micro_batch": 1, "samples_per_step": 8}
HEADER |= {"device": "cpu"}
STEP = {"step_s": 0.5, "inside_s": 0.125, "round_s": 0.25, "exposed_s": 0.0625, "rounds": 2, "peak_bytes": 1e6}
POINT = {"samples": 8, "seconds": 1.0, "val_loss": 2.5, "loss": 2.75}
DRAWN = 40  # every so many pages have their pictures drawn, which takes longest


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (object or list, key or index) of everything in a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _damage(value: Any, choose: random.Random) -> str:
    """Changes some places of a value and says which and how."""
    said = []
    for _ in range(choose.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        # Short lists of few keys at the top would else never be met among thousands of losses.
        inside = [place for place in places if isinstance(place[1], str)]
        owner, key = choose.choice(inside if inside and choose.random() < 0.9 else places)
        if choose.random() < 0.15:
            del owner[key]
            said.append(f"{key} left out")
        else:
            owner[key] = copy.deepcopy(choose.choice(VALUES))
            said.append(f"{key} = {str(owner[key])[:40]!r}")
    return ", ".join(said)


def _damage_text(text: str, choose: random.Random) -> tuple[bytes, str]:
    data = bytearray(text.encode())
    kind = choose.choice(("cut", "flipped", "deep", "empty", "twice"))
    if kind == "cut":
        del data[choose.randrange(len(data)) :]
    elif kind == "flipped":
        for _ in range(choose.choice((1, 3, 50))):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == "deep":
        data[-1:-1] = b"[" * 5000
    elif kind == "empty":
        data.clear()
    else:
        data *= 2
    return bytes(data), kind


def _write_results(folder: Path, choose: random.Random) -> tuple[list[list[str]], str]:
    source = choose.choice(RESULTS)
    text, said = source.read_text(), ""
    if choose.random() < 0.8:
        results = json.loads(text)
        said = _damage(results, choose)
        data = json.dumps(results).encode()
    else:
        data, said = _damage_text(text, choose)
    (folder / "results.json").write_bytes(data)
    path = str(folder / "results.json")
    return [["plan", "--results", path], ["report", path]], f"{source.name}: {said}"


def _write_run(folder: Path, choose: random.Random) -> tuple[list[list[str]], str]:
    steps = [STEP | {"step": number} for number in range(1, 8)]
    lines: dict[str, list[Any]] = {
        "rank0.jsonl": [HEADER, *steps],
        "rank1.jsonl": [HEADER | {"rank": 1}, *steps],
        "metrics.jsonl": [POINT | {"step": number} for number in range(5)],
        "Train_ACCO_round_ms.csv": [["step", "round_ms"], *([8 * number, 250.0] for number in range(9))],
    }
    lines = copy.deepcopy(lines)
    name = choose.choice(list(lines))
    said = _damage(lines[name], choose)
    for file, content in lines.items():
        if file.endswith(".csv"):
            text = "".join(",".join(map(str, row)) + "\n" for row in content if isinstance(row, list))
        else:
            text = "".join(json.dumps(line) + "\n" for line in content)
        data = text.encode()
        if file == name and text and choose.random() < 0.2:
            data, said = _damage_text(text, choose)
        (folder / file).write_bytes(data)
    return [["report", str(folder)]], f"{name}: {said}"


def run(seed: int, count: int) -> Iterator[str]:
    """Yields one line for each file with which something goes wrong."""
    for index in range(count):
        choose = random.Random(f"{seed} {index}")
        folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        try:
            write = _write_run if index % 4 == 0 else _write_results
            command_lines, said = write(folder, choose)
            for words in command_lines:
                drawn = contextlib.nullcontext() if index % DRAWN == 0 else without_pictures()
                with drawn:
                    wrong, status = problem(words)
                page = folder / "report.html"
                if not wrong and status == 0 and page.is_file():
                    wrong = _wrong_in_page(page.read_text())
                if wrong:
                    yield f"ds_acco {words[0]}, seed {seed}, input {index}, {said}: {wrong}"
        finally:
            shutil.rmtree(folder)


def _wrong_in_page(page: str) -> str:
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    found = NO_NUMBER.search(text)
    return f"the page says {text[max(0, found.start() - 40) : found.end() + 20]!r}" if found else ""
