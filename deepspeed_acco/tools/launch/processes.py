# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Finds and ends the processes of a run, whatever became of their parents: the launcher's children outlive it.

Every process of a run has $DEEPSPEED_ACCO_RUN, the run's folder, in its environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil

RUN = "DEEPSPEED_ACCO_RUN"
INTERRUPT_S = 2.0
KILL_S = 30.0


def processes_of(folder: Path) -> list[psutil.Process]:
    """Returns the living processes of this machine that belong to the run in ``folder``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RUN) == str(folder.resolve()):
                found.append(process)
    return found


def end_processes(folder: Path) -> None:
    """Ends every process of the run in ``folder``. The ranks are interrupted first: one that is building an operator
    then takes back its lock, for which later runs would wait for ever. What is left after that is killed.

    Raises:
        RuntimeError: when one is still there after half a minute.
    """
    ranks = [process for process in processes_of(folder) if _is_rank(process)]
    for process in ranks:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    psutil.wait_procs(ranks, timeout=INTERRUPT_S)
    kill_processes(folder)


def kill_processes(folder: Path) -> None:
    """Kills every process of the run in ``folder`` at once, as a power cut does.

    Raises:
        RuntimeError: when one is still there after half a minute.
    """
    deadline = time.monotonic() + KILL_S
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {[process.pid for process in left]} of {folder} cannot be killed")
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return "LOCAL_RANK" in process.environ()
    return False
