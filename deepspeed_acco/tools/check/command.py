# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco check``: what deepspeed.initialize would refuse about a JSON, before anything waits for it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import units
from ..subcommand import add_parser, complain
from ..words import counted, printable
from .notes import notes_on, of_the_run
from .problems import checked
from .reading import batch_of, read_config
from .trainers import FilledBy, arguments_in


def add_command(commands) -> None:
    """Adds the subcommand to what ``add_subparsers`` returned."""
    parser = add_parser(
        commands,
        "check",
        help="lists what deepspeed.initialize would refuse about a JSON, in under a second",
        description="Lists all that ACCO refuses about a DeepSpeed JSON, in the words of deepspeed.initialize; which "
        "schedule it comes to, keys without effect, and what only the run tells. Exit code 1: there are problems.",
        example="ds_acco check ds_configs/acco.json\nds_acco check ds_configs/acco_auto.json --hf",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", type=Path, help="DeepSpeed JSONs")
    parser.add_argument(
        "--hf", action="store_true", help='for HF Trainer: it fills "auto"; its arguments stand beside the keys'
    )
    parser.add_argument("--ranks", type=units.count, metavar="N", help="data-parallel ranks (default: any number)")
    parser.add_argument(
        "--deepspeed", action="store_true", help="also asks DeepSpeed about its other keys, which takes some seconds"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0, 1 where a JSON has problems, 2 where one cannot be read."""
    try:
        configs = {path: read_config(path, by_deepspeed=not options.hf) for path in options.configs}
    except ValueError as unreadable:
        complain(f"check: {unreadable}")
        return 2
    count = sum(_tell(path, config, options) for path, config in configs.items())
    if count:
        complain(f"check: {counted(count, 'problem')} of {counted(len(configs), 'JSON')}")
    return 1 if count else 0


def _tell(path: Path, config: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Prints what is found in a JSON and returns the number of its problems."""
    filled_by = FilledBy.HF if options.hf else FilledBy.NOBODY
    found = checked(config, filled_by, options.ranks)
    problems = list(found.problems)
    notes = list(notes_on(config, found, filled_by))
    if not options.deepspeed:
        notes.append("DeepSpeed's other keys were not looked at: --deepspeed asks it")
    elif not problems:
        from .by_deepspeed import problems_by_deepspeed

        micro, n = batch_of(config, options.ranks or 1)
        counts = [count if isinstance(count, int) else 1 for count in (micro, n)]  # else the trainer's
        problems += problems_by_deepspeed(config, *counts)
    lines = [f"{path}: {counted(len(problems), 'problem') if problems else 'no problem'}"]
    for problem in problems:
        lines.append(f"  problem: {problem}")
        arguments = arguments_in(problem) if options.hf else []
        lines += [f"           HF Trainer: {' '.join(arguments)}"] if arguments else []
    lines += [f"  note: {note}" for note in notes]
    lines += [f"  by the run: {line}" for line in of_the_run(config, found, options.ranks, filled_by)]
    print(printable("\n".join(lines)))
    return len(problems)
