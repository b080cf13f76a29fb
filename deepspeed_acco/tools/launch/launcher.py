# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Starts scripts through DeepSpeed's launcher, on this machine, on a hostfile's or on shaped hosts, and ends them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.recorder_format import RECORD_FOLDER, RECORD_RUN
from .processes import RUN, end_processes, guarded, let_launchers_end
from .shaped_hosts import INTERFACE, ShapedHosts

LOG = "log.txt"
POLL_S = 0.1
TIMED_OUT = 124  # as timeout(1) says it


@dataclass(frozen=True)
class Ranks:
    """Says where the ranks run.

    Attributes:
        world_size: number of ranks, all hosts together.
        slots: ranks of one host; None: all its accelerators.
        hostfile: DeepSpeed's hostfile of real machines, reached by the launcher's ssh; they share the run's folder.
        hosts: shaped hosts, already entered.
        is_cpu: whether DeepSpeed is told to use CPUs.
        per_node: whether the module is started that the launcher starts on each node, which saves its imports; on this
            machine alone, with ``slots``.
    """

    world_size: int
    slots: int | None = None
    hostfile: Path | None = None
    hosts: ShapedHosts | None = None
    is_cpu: bool = False
    per_node: bool = False


def run(
    script: Sequence[str],
    arguments: Sequence[str],
    folder: Path,
    place: Ranks,
    limit_s: float | None = None,
    watch: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs the script to its end and records it; no process of it is left on return or exception.

    Args:
        script: a path, or ``--module`` and a module's name.
        folder: for the ranks' records and for ``log.txt``, what they print; it exists.
        limit_s: a run that takes longer is ended.
        watch: called again and again while it runs.
        environment: of the ranks, beside this process's.

    Returns:
        The launcher's exit code, 0 when all went well; 124 at the limit.
    """
    recorded = {RECORD_FOLDER: str(folder.resolve()), **(environment or {})}
    with (
        open(folder / LOG, "w") as log,
        started(script, arguments, folder, place, recorded, stdout=log, stderr=subprocess.STDOUT) as launchers,
    ):
        return _wait(launchers, limit_s, watch)


@contextlib.contextmanager
def started(
    script: Sequence[str],
    arguments: Sequence[str],
    folder: Path,
    place: Ranks,
    environment: Mapping[str, str] | None = None,
    **pipes: Any,
) -> Iterator[list[subprocess.Popen]]:
    """Starts the script and gives its launchers; no process of it is left when the context ends, or this process.

    Args:
        pipes: ``stdout``, ``stderr`` and what else ``subprocess.Popen`` takes. The others as in :func:`run`.
    """
    folder = folder.resolve()
    port = free_port()
    launchers: list[subprocess.Popen] = []
    with guarded(folder, is_elsewhere=place.hostfile is not None):
        try:
            for command, variables in _commands(script, arguments, folder, place, port, environment or {}):
                # In a session of its own: Ctrl-C in the terminal reaches this process alone, which ends the others.
                launchers.append(
                    subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, start_new_session=True, **pipes)
                )
            yield launchers
        finally:
            if place.hostfile is not None:
                let_launchers_end(folder)
            end_processes(folder)
            for launcher in launchers:
                launcher.wait()
            remove_shared_memory(port)


def _wait(launchers: list[subprocess.Popen], limit_s: float | None, watch: Callable[[], None]) -> int:
    """Returns 0 once all have ended well, else the code of the first that has not; TIMED_OUT after ``limit_s``."""
    begin = time.monotonic()
    while limit_s is None or time.monotonic() - begin < limit_s:
        codes = [launcher.poll() for launcher in launchers]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        watch()
        time.sleep(POLL_S)
    return TIMED_OUT


def _commands(script, arguments, folder: Path, place: Ranks, port: int, changes: Mapping[str, str]):
    """Gives (command, environment) of each launcher to start: one, or one in each shaped host."""
    environment = {**os.environ, **changes, RUN: str(folder), "PYTHONPATH": search_path()}
    if place.is_cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    # As a module, so that it is this interpreter's; the command "deepspeed" calls nothing else.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    options = ["--master_port", str(port)]
    if place.hosts is not None:
        hosts = place.hosts
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{hosts.address(i)} slots={place.slots or 1}\n" for i in range(hosts.count)))
        environment["GLOO_SOCKET_IFNAME"] = INTERFACE
        # A host cannot know that it shares the cores with the others.
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // place.world_size))
        options += ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", hosts.address(0)]
        for i in range(hosts.count):
            command = [*hosts.enter(i), *launcher, *options, "--node_rank", str(i), *script, *arguments]
            yield command, environment
        return
    if place.per_node:
        world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(place.world_size))}).encode()).decode()
        launcher = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info", world]
        options += ["--master_addr", "127.0.0.1"]
    elif place.slots is not None:
        options += ["--num_accelerators", str(place.slots)]
    if place.hostfile is not None:
        options += ["--hostfile", str(place.hostfile.resolve())]
        environment["DS_ENV_FILE"] = str(_environment_file(folder, environment))
    yield [*launcher, *options, *script, *arguments], environment


def search_path() -> str:
    """Returns PYTHONPATH with this package in front, where it is not an installed one."""
    root = Path(__file__).resolve().parents[3]
    own = [] if root == Path(sysconfig.get_paths()["purelib"]).resolve() else [str(root)]
    return os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


def _environment_file(folder: Path, environment: dict[str, str]) -> Path:
    """Writes what the launcher is to set on other machines: it passes no other variables on. The user's own is kept."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines = []
    for place in (Path.home(), Path()):
        if (place / name).is_file():
            lines += (place / name).read_text().splitlines()
    passed_on = (RECORD_FOLDER, RECORD_RUN, "DS_ACCELERATOR")
    lines += [f"{key}={environment[key]}" for key in passed_on if key in environment]
    path = folder / "environment"
    path.write_text("".join(f"{line}\n" for line in lines if line.strip()))
    return path


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def remove_shared_memory(port: int | str) -> None:
    """Removes what a job left in shared memory: 66 MiB for each rank, which DeepSpeed names by the job's port."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        with contextlib.suppress(OSError):
            left.unlink()
