# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads what the ranks of a run recorded: ``rank{R}.jsonl``, as engine/recorder_format.py declares it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engine.recorder_format import RankHeader, RankStep
from .typed_json import read_line, read_lines
from .words import shown


@dataclass(frozen=True)
class RankFile:
    """Holds what one rank recorded."""

    header: RankHeader
    steps: list[RankStep]


def read_rank(path: Path) -> RankFile:
    """Reads one rank's file.

    Raises:
        ValueError: empty or broken; says where.
    """
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: the run ended before its first line")
    header = read_line(RankHeader, lines[0])
    for key in ("n", "micro_batch", "samples_per_step", "world_size"):
        if getattr(header, key) == 0:
            raise ValueError(f"{path}, line 1: {key} is 0; allowed: a whole number >= 1")
    return RankFile(header, [read_line(RankStep, line) for line in lines[1:]])


def read_ranks(folder: Path, world_size: int, run: str | None = None) -> list[RankFile]:
    """Reads the files of all ranks of a finished run.

    Args:
        run: the id that the run was given; None: none.

    Raises:
        ValueError: one is missing, with what the script lacks, broken, or written by another run.
    """
    for rank in range(world_size):
        path = folder / f"rank{rank}.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path} was not written: the script must import deepspeed_acco and train with the engine that "
                f"deepspeed.initialize returns, in {world_size} ranks"
            )
    ranks = [read_rank(folder / f"rank{rank}.jsonl") for rank in range(world_size)]
    for rank, file in enumerate(ranks):
        if file.header.run != run:
            raise ValueError(
                f"{folder / f'rank{rank}.jsonl'} was written by run {shown(file.header.run)}, and this is run "
                f"{shown(run)}: an earlier one is still going on. End it on every host"
            )
    return ranks


def steps_so_far(folder: Path) -> int:
    """Returns the optimizer steps that rank 0 of the run in ``folder`` has recorded."""
    try:
        return max(0, (folder / "rank0.jsonl").read_bytes().count(b"\n") - 1)  # the first line is the header
    except OSError:
        return 0
