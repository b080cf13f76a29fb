# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the locks of torch's builds, for which a run waits without a word (torch/utils/file_baton.py): also those that
a killed build of anybody's operators left behind, so that every later run waits for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .build import NAME
from .build_folder import build_root


def describe_locks() -> list[str]:
    """Returns a sentence for each lock, as :func:`describe_lock`."""
    return [describe_lock(lock) for lock in find_locks()]


def find_locks() -> list[Path]:
    """Returns the paths of the locks. Builds of this package's kernels remove what is left of a killed one, and have
    none."""
    root = build_root()
    locks = [path for depth in ("*/lock", "*/*/lock") for path in sorted(root.glob(depth)) if path.is_file()]
    return [path for path in locks if not path.relative_to(root).parts[0].startswith(f"{NAME}_")]


def is_forgotten(lock: Path) -> bool:
    """Tells whether no process of this machine holds the lock, so that whoever waits for it waits for ever."""
    return lock.is_file() and _holders(lock) == []


def describe_lock(lock: Path) -> str:
    """Returns a sentence: where the lock is, how old, who holds it, and what to do where nobody does."""
    try:
        age_s = max(0.0, time.time() - lock.stat().st_mtime)
    except FileNotFoundError:
        return f"{lock}: has just been released"
    age = f"{age_s:.0f} s" if age_s < 120 else f"{age_s / 60:.0f} min"
    holders = _holders(lock)
    if holders is None:
        return f"{lock}: a build lock, {age} old. Remove it if no process builds: every run waits for it"
    if holders:
        return f"{lock}: process {', '.join(map(str, holders))} has been building for {age}, and runs wait for it"
    return f"{lock}: a build lock, {age} old, that no process of this machine holds. Remove it: every run waits for it"


def _holders(lock: Path) -> list[int] | None:
    """Returns the processes that have the file open, as the one that builds has; None where that cannot be seen."""
    if not Path("/proc/self/fd").is_dir():
        return None
    holders, target = set(), str(lock.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == target:
                holders.add(int(link.parts[2]))
        except OSError:
            continue  # it has ended, or is another user's
    return sorted(holders)
