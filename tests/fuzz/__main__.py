# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Tries odd inputs and prints what goes wrong with them, one line each: ``python -m tests.fuzz NAME``.

A finding is a traceback out of this package, something ignored without a word, something that does not end, or a figure
that is no number. The same seed makes the same inputs.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from importlib import import_module

TARGETS = {name: f"tests.fuzz.{name}" for name in ("checkpoints", "command_lines", "configs", "results")}


def findings(name: str, seed: int, count: int) -> Iterator[str]:
    """Yields what goes wrong with ``count`` inputs of a target; its module is imported now."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    yield from import_module(TARGETS[name]).run(seed, count)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Tries odd inputs.")
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    found = 0
    for finding in findings(options.name, options.seed, options.count):
        found += 1
        print(finding, flush=True)
    print(f"{options.count} inputs of {options.name}, seed {options.seed}: {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
