# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the folder of a comparison, and others out of it while one process measures.

In it: ``command.json`` (what was asked for), ``configs/`` (the JSONs as they were then), ``runs/NAME/PASS/`` (each
run's log and what its ranks recorded; ``done.json`` last of all), ``results.json`` and ``report.html``; and while a
process holds it ``holder.json``, which names that.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..launch.processes import end_processes, processes_of
from ..subcommand import complain
from ..typed_json import load, read
from ..words import listed, shown
from .options import Comparison, extra_reference
from .results import write_whole

COMMAND = "command.json"
DONE = "done.json"
CONFIGS, RUNS = "configs", "runs"  # folders
_LOCK, _HOLDER = "lock", "holder.json"
_BEFORE_COMMAND = {_LOCK, _HOLDER, CONFIGS, "holder.part", "command.part"}  # what a process killed early leaves


@dataclass(frozen=True)
class _Holder:
    """Holds who works in a folder: a process of a host, since a time of that host's clock."""

    pid: int
    host: str
    since: str


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process alone. What a killed one left running in it is ended before.

    Raises:
        ValueError: another process holds it, which is named, or it is not a comparison's.
        OSError: it cannot be made or written.
        RuntimeError: what was left running cannot be ended.
    """
    if not str(out.resolve()).isprintable():
        raise ValueError(f"--out {shown(str(out))} is not allowed; allowed: a path of characters that can be printed")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is no folder. Give another --out")
    if out.exists() and _is_anothers(out):
        raise ValueError(f"--out {out} is not empty and holds no comparison. Give another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK)  # the kernel gives it back, however its holder ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--out {out} is in use by {_describe_holder(out)}. Wait for it, end it, or give another --out"
        ) from None
    try:
        since = datetime.now().isoformat(" ", "seconds")
        write_whole(out / _HOLDER, asdict(_Holder(os.getpid(), socket.gethostname(), since)))
        _end_what_was_left(out / RUNS)
        yield
    finally:
        with suppress(OSError):
            (out / _HOLDER).unlink()
        lock.release()


def _is_anothers(out: Path) -> bool:
    names = {path.name for path in out.iterdir()}
    return bool(names) and COMMAND not in names and not (_LOCK in names and names <= _BEFORE_COMMAND)


def _describe_holder(out: Path) -> str:
    try:
        holder = read(_Holder, load(out / _HOLDER))
    except ValueError:  # it has just begun, or is about to end
        return "another process"
    return f"process {holder.pid} on {holder.host} since {holder.since}"


def _end_what_was_left(runs: Path) -> None:
    left = processes_of(runs)
    if left:
        pids = listed([str(process.pid) for process in left])
        complain(f"compare: an earlier comparison was killed, and its runs in {runs} go on: {pids}. They are ended now")
        end_processes(runs)


def prepare(out: Path, comparison: Comparison) -> None:
    """Fills a folder that is held, or finds in it what the same command left.

    Raises:
        ValueError: when it holds another comparison, with the difference, or a damaged one.
        OSError: it cannot be written.
    """
    asked = asdict(comparison)
    path = out / COMMAND
    if path.is_file():
        try:
            before = load(path)
            if not isinstance(before, dict):
                raise ValueError(f"it holds {shown(before)}")
        except ValueError as cause:
            raise ValueError(f"{path} is damaged: {cause}. Remove {out}, or give another --out") from cause
        difference = _difference(before, json.loads(json.dumps(asked)))
        if difference:
            raise ValueError(f"--out {out} holds another comparison: {difference}. Give another --out, or remove it")
        return
    (out / CONFIGS).mkdir(exist_ok=True)
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
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = (_difference(*pair, f"{key}[{index}]") for index, pair in enumerate(zip(before, now)))
        return next(filter(None, parts), "")
    return "" if before == now else f"{key} was {shown(before)} and is {shown(now)}"
