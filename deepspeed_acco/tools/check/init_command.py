# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco init``: writes the JSON that trains with ACCO in the place of somebody's ZeRO JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..subcommand import add_parser, complain
from ..words import printable
from .convert import converted
from .reading import read_config


def add_command(commands) -> None:
    """Adds the subcommand to what ``add_subparsers`` returned."""
    parser = add_parser(
        commands,
        "init",
        help="makes of a ZeRO JSON one that trains with ACCO, and says what changed and why",
        description="Makes of a DeepSpeed JSON with Adam or AdamW and ZeRO stage 0, 1, 2 or 3 one that trains with "
        "ACCO, and says what changed and why. What would train something else is not converted: exit code 1.",
        example="ds_acco init --from ds_configs/zero1.json\nds_acco init --from ds_configs/zero2.json --out acco.json",
    )
    parser.add_argument("--from", dest="source", metavar="CONFIG", type=Path, required=True, help="a DeepSpeed JSON")
    parser.add_argument("--out", metavar="FILE", type=Path, help="writes the JSON there; default: prints it")
    parser.add_argument("--force", action="store_true", help="overwrites --out where it exists")
    parser.add_argument("--hf", action="store_true", help='for HF Trainer, also where the JSON has no "auto"')
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0, 1 where the JSON cannot be converted, 2 for files that cannot be used."""
    out: Path | None = options.out
    try:
        given = read_config(options.source, by_deepspeed=not options.hf)
        if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
            raise ValueError(f"--out {out} is not allowed; allowed: a file in a folder that exists")
        if out is not None and out.exists() and not options.force:
            raise ValueError(f"--out {out} exists; give another name, or --force to overwrite it")
    except ValueError as unusable:
        complain(f"init: {unusable}")
        return 2
    made = converted(given, options.hf)
    if made.refused:
        reasons = "".join(f"\n  {reason}" for reason in made.refused)
        complain(f"init: {options.source} was not converted:{reasons}")
        return 1
    text = json.dumps(made.config, indent=2)
    # Of what is printed, the JSON alone goes where it can be redirected.
    print(printable("\n".join(made.changes)), file=sys.stderr if out is None else sys.stdout)
    if out is None:
        print(text)
        return 0
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        complain(f"init: --out {out} cannot be written: {error}")
        return 2
    return 0
