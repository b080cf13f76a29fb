# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads what a report shows, and refuses what it cannot read: ``results.json``, or the files of one run."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
CSV_PREFIX = "Train_ACCO_"  # DeepSpeed's csv_monitor names the file of the event Train/ACCO/round_ms so
_DEEPEST = 2  # csv_monitor writes to output_path/job_name


class _Maybe:
    """What may be null or missing, or NaN, which scripts write that diverge."""

    def __init__(self, kind):
        self.kind = kind


_NUMBER, _WHOLE, _TEXT = "a number", "a whole number", "a text"
_INTERVAL = {"median": _NUMBER, "low": _Maybe(_NUMBER), "high": _Maybe(_NUMBER)}
_LOSS = {key: _Maybe(_NUMBER) for key in ("median", "low", "high")}
_POINT = {"step": _Maybe(_WHOLE)} | {key: _Maybe(_NUMBER) for key in ("samples", "seconds", "val_loss", "loss")}
_CONFIG = {
    "name": _TEXT,
    "file": _Maybe(_TEXT),
    "optimizer": _Maybe(_TEXT),
    "schedule": _Maybe(_TEXT),
    "stage": _Maybe(_WHOLE),
    "accumulation": _Maybe(_TEXT),
    "estimate_comm": _Maybe(_TEXT),
    "step_s": _Maybe(_INTERVAL),
    "samples_per_step": _Maybe(_NUMBER),
    "samples_per_s": _Maybe(_INTERVAL),
    "estimate_s": _Maybe(_NUMBER),
    "sent_bytes": _Maybe(_NUMBER),
    "bound_s": _Maybe(_NUMBER),
    "of_bound": _Maybe(_NUMBER),
    "split": _Maybe({"compute_s": _NUMBER, "exposed_s": _NUMBER, "overhead_s": _NUMBER, "note": _Maybe(_TEXT)}),
    "hidden_share": _Maybe(_NUMBER),
    "idle_share": _Maybe(_NUMBER),
    "peak_bytes": _Maybe([_Maybe(_NUMBER)]),
    "failed": _Maybe(_TEXT),
    "runs": [{"pass": _Maybe(_WHOLE), "curve": _Maybe([_POINT]), "batch": _Maybe([_WHOLE])}],
    "final_val_loss": _Maybe(_LOSS),
}
_RATIO = {"config": _TEXT, "baseline": _TEXT, "speedup": _Maybe(_INTERVAL), "verdict": _TEXT}
_MANAGER = {
    "config": _TEXT,
    "baseline": _TEXT,
    "saved_share": _Maybe(_NUMBER),
    "saved_hours_per_1000_accelerator_hours": _Maybe(_NUMBER),
    "idle_share": _Maybe(_NUMBER),
    "hidden_share": _Maybe(_NUMBER),
}
_RESULTS = {
    "command": _TEXT,
    "date": _TEXT,
    "machine": _TEXT,
    "script": _TEXT,
    "arguments": [_TEXT],
    "world_size": _Maybe(_WHOLE),
    "network": _TEXT,
    "emulated_ms": _Maybe(_NUMBER),
    "device": _Maybe(_TEXT),
    "model": _Maybe({"numel": _Maybe(_WHOLE), "weight_bytes": _Maybe(_WHOLE), "comm_bytes": _Maybe(_WHOLE)}),
    "n": _Maybe(_WHOLE),
    "samples_per_step": _Maybe(_WHOLE),
    "tokens_per_sample": _Maybe(_NUMBER),
    "passes": _WHOLE,
    "reference": _Maybe(
        {key: _Maybe(_NUMBER) for key in ("compute_s", "round_s", "micro_batch_s")} | {"failed": _Maybe(_TEXT)},
    ),
    "configs": [_CONFIG],
    "ratios": [_RATIO],
    "manager": [_MANAGER],
    "verdict": [_TEXT],
}
_HEADER = {
    "rank": _WHOLE,
    "world_size": _Maybe(_WHOLE),
    "optimizer": _Maybe(_TEXT),
    "schedule": _Maybe(_TEXT),
    "accumulation": _Maybe(_TEXT),
    "estimate_comm": _Maybe(_TEXT),
    "stage": _Maybe(_WHOLE),
    "numel": _Maybe(_WHOLE),
    "weight_bytes": _Maybe(_WHOLE),
    "comm_bytes": _Maybe(_WHOLE),
    "n": _Maybe(_WHOLE),
    "a": _Maybe(_WHOLE),
    "micro_batch": _Maybe(_WHOLE),
    "samples_per_step": _WHOLE,
    "device": _Maybe(_TEXT),
    "torch": _Maybe(_TEXT),
    "deepspeed": _Maybe(_TEXT),
}
_STEP = {"step": _WHOLE, "looked": _Maybe("true or false"), "samples": _Maybe(_WHOLE)} | {
    key: _Maybe(_NUMBER)
    for key in (
        "step_s",
        "inside_s",
        "round_s",
        "exposed_s",
        "estimate_s",
        "peak_bytes",
        "sent_bytes",
        "received_bytes",
    )
}


def _is(value: Any, kind: str) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _NUMBER:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (int if kind == _WHOLE else bool)


def _checked(value: Any, kind: Any, place: str) -> Any:
    """``value`` with every key that ``kind`` names (None where a key that may be missing is) and no other."""
    if isinstance(kind, _Maybe):
        is_known = value is not None and not (isinstance(value, float) and not math.isfinite(value))
        return _checked(value, kind.kind, place) if is_known else None
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise ValueError(f"{place} is {value!r:.60}; allowed: a list")
        return [_checked(item, kind[0], f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{place or 'it'} is {value!r:.60}; allowed: an object")
        for key, part in kind.items():
            if key not in value and not isinstance(part, _Maybe):
                raise ValueError(f"{place + ' has' if place else 'there is'} no key {key!r}")
        prefix = f"{place}." if place else ""
        return {key: _checked(value.get(key), part, prefix + key) for key, part in kind.items()}
    if not _is(value, kind):
        raise ValueError(f"{place} is {value!r:.60}; allowed: {kind}")
    return value


def read_results(path: Path) -> dict:
    """``results.json`` of ``ds_acco compare``, checked: every key that the report uses is there, with None where the
    file may have null.

    Raises:
        ValueError: broken, of a newer version, or something else; says what is wrong and what to do.
        OSError: not readable.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it holds {data!r:.60}; allowed: an object")
        version = data.get("version")
        if type(version) is int and version > VERSION:
            raise _NewerVersion(
                f"{path} has version {version}; this deepspeed_acco reads version {VERSION}. "
                "Update it (pip install -U deepspeed_acco), or take the one that wrote the file"
            )
        if type(version) is not int or version != VERSION:
            raise ValueError(f"its version is {version!r}; allowed: {VERSION}")
        return _checked(data, _RESULTS, "")
    except _NewerVersion:
        raise
    except ValueError as error:
        raise ValueError(
            f"{path} is no results.json that can be read: {error}. Give the file that `ds_acco compare` wrote, its "
            "folder, or the folder of one run; where it was damaged, run `ds_acco compare` again"
        ) from error


class _NewerVersion(ValueError):
    pass


@dataclass(frozen=True)
class Run:
    """The files of one run; empty where there is none.

    Attributes:
        metrics: lines of metrics.jsonl, with the keys of a curve in results.json.
        headers: of the recorder's files, one per rank.
        steps: of the recorder's files, one list per rank.
        events: of DeepSpeed's csv_monitor: name without ``Train/ACCO/`` -> (samples, values).
        sources: the files that were read.
    """

    folder: Path
    metrics: list[dict]
    headers: list[dict]
    steps: list[list[dict]]
    events: dict[str, tuple[list[float], list[float]]]
    sources: list[Path]


def read_run(folder: Path) -> Run:
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
    ranks = [_json_lines(path) for path in recorded]
    for path, lines in zip(recorded, ranks):
        if not lines:
            raise ValueError(f"{path} is empty: the run ended before its first line. Delete it, or give another run")
    return Run(
        folder,
        [_in_file(path, number, line, _POINT) for path in metrics for number, line in enumerate(_json_lines(path), 1)],
        [_in_file(path, 1, lines[0], _HEADER) for path, lines in zip(recorded, ranks)],
        [
            [_in_file(path, number, line, _STEP) for number, line in enumerate(lines[1:], 2)]
            for path, lines in zip(recorded, ranks)
        ],
        {path.stem.removeprefix(CSV_PREFIX): _csv_series(path) for path in events},
        [*metrics, *recorded, *events],
    )


def _found(folder: Path, pattern: str) -> list[Path]:
    """The matching files of the highest level that has any."""
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


def _json_lines(path: Path) -> list[Any]:
    """The lines; a last one that its writer was killed in is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}. Delete the line, or give another run") from error
    return values


def _in_file(path: Path, number: int, line: Any, kind: dict) -> dict:
    try:
        return _checked(line, kind, "")
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}. Delete the line, or give another run") from error


def _csv_series(path: Path) -> tuple[list[float], list[float]]:
    """(samples, values), finite ones only. A heading in mid-file means that the job was started again: what it wrote
    from there on replaces what stands at the same or later samples."""
    rows: list[tuple[float, float]] = []
    starts_again = False
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if row[:1] == ["step"]:
                starts_again = True
                continue
            if not row:
                continue
            try:
                samples, value = map(float, row)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is {','.join(row)!r:.60}; allowed: samples and a value, as DeepSpeed's "
                    "csv_monitor writes them. Delete the line, or give another run"
                ) from error
            if starts_again:
                rows = [earlier for earlier in rows if earlier[0] < samples]
                starts_again = False
            if math.isfinite(samples) and math.isfinite(value):
                rows.append((samples, value))
    return [samples for samples, _ in rows], [value for _, value in rows]
