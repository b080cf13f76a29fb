# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Finds and ends the processes of a run, whatever became of their parents: the launcher's children outlive it.

Every process of a run has $DEEPSPEED_ACCO_RUN, the run's folder, in its environment. As a script this file is the guard
of a run, which ends it when its standard input ends. It imports nothing of the package, so that it is there at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

RUN = "DEEPSPEED_ACCO_RUN"
INTERRUPT_S = 2.0
KILL_S = 30.0
REMOTE_END_S = 30.0  # for the launcher to end what it started on other machines
_ELSEWHERE = "elsewhere"  # an argument of the guard: the run has processes on other machines


@contextlib.contextmanager
def guarded(folder: Path, is_elsewhere: bool) -> Iterator[None]:
    """Lets a process of its own end the run in ``folder`` when this one dies inside, by SIGKILL, too.

    Args:
        is_elsewhere: whether the run also has processes on other machines.
    """
    command = [sys.executable, __file__, str(folder), *([_ELSEWHERE] if is_elsewhere else [])]
    # In a session of its own, so that no signal of a terminal reaches it.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as guard:
        try:
            yield
        finally:
            guard.kill()


def _guard(folder: Path, is_elsewhere: bool) -> None:
    sys.stdin.read()  # until nobody holds the other end any more
    if is_elsewhere:
        let_launchers_end(folder)
    for _ in range(2):  # one that was just being started has its environment a moment later
        end_processes(folder)
        time.sleep(0.5)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Returns the living processes of this machine that belong to the run in ``folder``, or to one below it."""
    found, folder = [], folder.resolve()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            run = process.environ().get(RUN)
            if run and process.pid != os.getpid() and Path(run).is_relative_to(folder):
                found.append(process)
    return found


def let_launchers_end(folder: Path) -> None:
    """Asks the launchers of the run in ``folder`` to end and gives them time to do so elsewhere, too."""
    launchers = [process for process in processes_of(folder) if _is_launcher(process)]
    for process in launchers:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(launchers, timeout=REMOTE_END_S)


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


def _is_launcher(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return "deepspeed.launcher.runner" in process.cmdline()
    return False


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return "LOCAL_RANK" in process.environ()
    return False


if __name__ == "__main__":
    _guard(Path(sys.argv[1]), _ELSEWHERE in sys.argv[2:])
