# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the folder of a comparison.

In it: ``command.json`` (what was asked for), ``configs/`` (the JSONs as they were then), ``runs/NAME/PASS/`` (each
run's log and what its ranks recorded; ``done.json`` last of all), ``results.json`` and ``report.html``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .options import Comparison, extra_reference
from .results import write_whole

COMMAND = "command.json"
DONE = "done.json"
CONFIGS, RUNS = "configs", "runs"  # folders


def prepare(out: Path, comparison: Comparison) -> None:
    """Makes the folder, or finds in it what the same command left.

    Raises:
        ValueError: when it holds something else, with the difference.
    """
    asked = asdict(comparison)
    path = out / COMMAND
    if path.is_file():
        difference = _difference(json.loads(path.read_text()), json.loads(json.dumps(asked)))
        if difference:
            raise ValueError(f"--out {out} holds another comparison: {difference}. Give another --out, or remove it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty and holds no comparison. Give another --out")
    (out / CONFIGS).mkdir(parents=True, exist_ok=True)
    configs = {**comparison.configs, **extra_reference(comparison)}
    for name, config in configs.items():
        (out / CONFIGS / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
    write_whole(path, asked)


def _difference(before: Any, now: Any, key: str = "") -> str:
    """Returns the first difference in words; empty without one."""
    if isinstance(before, dict) and isinstance(now, dict):
        for part in sorted({*before, *now}, key=lambda part: part == "configs"):
            found = _difference(before.get(part), now.get(part), f"{key}.{part}" if key else part)
            if found:
                return found
        if list(before) != list(now):
            return f"the order of {key or 'its parts'} was {list(before)} and is {list(now)}"
        return ""
    return "" if before == now else f"{key} was {before!r} and is {now!r}"
