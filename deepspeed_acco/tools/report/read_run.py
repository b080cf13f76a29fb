# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the files of one run, and refuses what it cannot read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..compare.results import Point
from ..rank_files import RankFile, read_rank
from ..typed_json import read_line, read_lines
from ..words import shown

CSV_PREFIX = "Train_ACCO_"  # DeepSpeed's csv_monitor names the file of the event Train/ACCO/round_ms so
_LARGEST = 1e30  # of a value that is drawn
_DEEPEST = 2  # csv_monitor writes to output_path/job_name
Series = tuple[list[float], list[float]]  # (samples, values)


@dataclass(frozen=True)
class RunFiles:
    """Holds what the files of one run contain; empty where there is none.

    Attributes:
        metrics: lines of metrics.jsonl.
        ranks: what the recorder wrote of each rank.
        events: of DeepSpeed's csv_monitor, by the name without ``Train/ACCO/``.
        sources: the files that were read.
    """

    folder: Path
    metrics: list[Point]
    ranks: list[RankFile]
    events: dict[str, Series]
    sources: list[Path]


def read_run(folder: Path) -> RunFiles:
    """Reads what is in ``folder`` or up to two levels below it.

    Raises:
        ValueError: nothing to read, files of several runs, or a broken file; says which and what to do.
    """
    metrics = _found(folder, "metrics.jsonl")
    recorded = sorted(_found(folder, "rank*.jsonl"), key=lambda path: (len(path.name), path.name))
    events = _found(folder, CSV_PREFIX + "*.csv")
    if not metrics and not recorded and not events:
        raise ValueError(
            f"{folder} has no file that a report can show; allowed: results.json (of `ds_acco compare`), metrics.jsonl "
            "(examples/train_gpt.py --out), rank*.jsonl (a run of `ds_acco compare`) or "
            f"{CSV_PREFIX}*.csv (DeepSpeed's csv_monitor). Give the folder that holds one of them"
        )
    try:
        return RunFiles(
            folder,
            [read_line(Point, line) for path in metrics for line in read_lines(path)],
            [read_rank(path) for path in recorded],
            {path.stem.removeprefix(CSV_PREFIX): _csv_series(path) for path in events},
            [*metrics, *recorded, *events],
        )
    except ValueError as error:
        raise ValueError(f"{error}. Delete the line or the file, or give another run") from error


def _found(folder: Path, pattern: str) -> list[Path]:
    """Returns the matching files of the highest level that has any."""
    for level in range(_DEEPEST + 1):
        paths = sorted(path for path in folder.glob("*/" * level + pattern) if path.is_file())
        folders = sorted({str(path.parent.relative_to(folder)) for path in paths})
        if len(folders) > 1:
            raise ValueError(
                f"{folder} has {pattern} of several runs, in {', '.join(folders[:8])}"
                f"{', ...' if len(folders) > 8 else ''}. Give the folder of one of them"
            )
        if paths:
            return paths
    return []


def _csv_series(path: Path) -> Series:
    """Returns (samples, values), finite ones only. A heading in mid-file means that the job was started again: what it
    wrote from there on replaces what stands at the same or later samples."""
    rows: list[tuple[float, float]] = []
    starts_again = False
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(_csv_rows(path, file), 1):
            if row[:1] == ["step"]:
                starts_again = True
                continue
            if not row:
                continue
            try:
                samples, value = map(float, row)
            except ValueError as error:
                raise _csv_error(path, number, row, "samples and a value") from error
            if starts_again:
                rows = [earlier for earlier in rows if earlier[0] < samples]
                starts_again = False
            if math.isfinite(samples) and math.isfinite(value):
                if not (0 <= samples <= _LARGEST and abs(value) <= _LARGEST):
                    raise _csv_error(path, number, row, f"samples >= 0 and a value, both up to {_LARGEST:g}")
                rows.append((samples, value))
    return [samples for samples, _ in rows], [value for _, value in rows]


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(file)
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV: {error}") from error


def _csv_error(path: Path, line: int, row: list[str], allowed: str) -> ValueError:
    return ValueError(
        f"{path}, line {line} is {shown(','.join(row))}; allowed: {allowed}, as DeepSpeed's csv_monitor writes them"
    )
