# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The README's table of the engine's features names tests that exist, and every test of that file is in it."""

import json
import re
from pathlib import Path

import torch

from deepspeed_acco.optimizer import ACCO

ROOT = Path(__file__).parents[1]


def _tests_of(name):
    return set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / "engine" / name).read_text(), re.MULTILINE))


def test_the_engine_table_and_its_tests():
    section = (ROOT / "README.md").read_text().split("## The rest of the engine")[1].split("\n## ")[0]
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


def test_optimizers_of_the_snippets_are_accepted():
    text = (ROOT / "README.md").read_text()
    snippets = re.findall(r'"optimizer": (\{"type": "ACCO", "params": \{.*?\}\})', text)
    assert len(snippets) >= 3
    for snippet in snippets:
        params = json.loads(snippet)["params"]
        assert ACCO([torch.nn.Parameter(torch.zeros(1))], **params).defaults["lr"] == params["lr"]
