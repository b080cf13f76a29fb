# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what is installed: versions, kernels, and locks of builds."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from ... import __version__
from ...optim import build, build_locks, native
from .finding import FAIL, OK, WARN, Finding
from .subject import Subject

_OLD_S = 300.0  # of a lock: builds take up to some minutes


def check_versions(subject: Subject) -> Finding:
    """Compares the versions over the ranks."""
    own = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "deepspeed_acco": __version__,
    }
    if subject.device.type == "cuda":
        own |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    of_ranks = subject.control.gather_objects(own)
    different = [what for what in own if own[what] != of_ranks[0].get(what)]
    if different:
        told = ", ".join(f"{what} {own[what]} where rank 0 has {of_ranks[0].get(what)}" for what in different)
        return Finding(FAIL, f"{told}.", "Install the same versions on every host", own)
    told = ", ".join(f"{what} {value}" for what, value in own.items())
    return Finding(OK, f"{told}: the same on all ranks.", figures=own)


def check_kernels(subject: Subject) -> Finding:
    """Says what computes the updates, and why."""
    reason = native.kernels_reason(subject.device)
    if reason:
        sentence = f"The updates run in plain PyTorch, several times slower: {reason.splitlines()[0]}."
        is_chosen = reason.startswith(native.CHOICE_VARIABLE)
        advice = f"Unset {native.CHOICE_VARIABLE}" if is_chosen else build.HOW_TO_BUILD
        return Finding(WARN, sentence, advice, {"kernels": "torch", "reason": reason})
    return Finding(OK, "The updates run on the native kernels.", figures={"kernels": "native"})


def check_locks(subject: Subject) -> Finding:
    """Finds the locks of builds on this host, for which runs wait."""
    locks = build_locks.find_locks()
    if not locks:
        return Finding(OK, "No build has left a lock.")
    is_old = any(_age_s(lock) > _OLD_S for lock in locks)
    advice = "Remove it where no process builds" if is_old else "Wait until the build is over"
    rows = tuple((lock.parent.name, build_locks.describe_lock(lock)) for lock in locks)
    figures = {"locks": [str(lock) for lock in locks]}
    return Finding(FAIL if is_old else WARN, "Runs wait without a word for a build lock.", advice, figures, rows)


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # it has just been released
