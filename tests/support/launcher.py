# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Starts a script through DeepSpeed's launcher, as a user does, on this machine."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from getpass import getuser
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 390  # the first use of DeepSpeed's own AdamW compiles it, and its communication on shared memory


def operators_folder() -> str:
    """DeepSpeed builds its operators at first use, and those of different versions do not get on in one folder."""
    built = f"deepspeed_acco_ops_{getuser()}_{version('deepspeed')}_{version('torch')}"
    return str(Path(tempfile.gettempdir()) / built)


def remove_shared_memory(master_port: int | str) -> None:
    """DeepSpeed leaves 66 MiB for each rank of a job in shared memory, named by the port."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{master_port}_*"):
        left.unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment() -> dict[str, str]:
    """The environment of a rank: this one's, the checkout, the operators' folder, and one thread, since the ranks of a
    test are as many as the cores."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    defaults = {"TORCH_EXTENSIONS_DIR": operators_folder(), "OMP_NUM_THREADS": "1"}
    return {**defaults, **os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": search}


class Launched:
    """A script started by the launcher in a session of its own. The launcher is a module here, so that it is this
    interpreter's; ``deepspeed`` calls nothing else.

    Args:
        per_node: starts the module that the launcher starts on each node, which saves its imports.
    """

    def __init__(self, script, *arguments, ranks: int = 2, per_node: bool = False, **options):
        self._port = free_port()
        if per_node:
            world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
            command = ["deepspeed.launcher.launch", "--world_info", world, "--master_addr", "127.0.0.1"]
        else:
            command = ["deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command = [sys.executable, "-m", *command, "--master_port", str(self._port), str(script)]
        command += map(str, arguments)
        self.process = subprocess.Popen(command, env=rank_environment(), start_new_session=True, **options)

    def kill(self) -> None:
        """SIGKILL for the launcher and every rank at once."""
        for child in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.kill()
        self.process.wait()
        remove_shared_memory(self._port)

    def wait(self) -> tuple[str | None, str | None]:
        """Output and errors, when the script has ended."""
        try:
            return self.process.communicate(timeout=LIMIT_S)
        finally:
            if self.process.poll() is None:
                self.kill()
            remove_shared_memory(self._port)


def launch(script, *arguments, ranks: int = 2, per_node: bool = False) -> subprocess.CompletedProcess:
    """Runs a script through the launcher to its end."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    run = Launched(script, *arguments, ranks=ranks, per_node=per_node, **pipes)
    output, errors = run.wait()
    return subprocess.CompletedProcess(run.process.args, run.process.returncode, output, errors)
