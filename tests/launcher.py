# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Starts a script through DeepSpeed's launcher, as a user does, on this machine."""

import os
import socket
import subprocess
import sys
import tempfile
from getpass import getuser
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 390  # the first use of DeepSpeed's own AdamW compiles it, and its communication on shared memory


def operators_folder() -> str:
    """DeepSpeed builds its operators at first use, and those of different versions do not get on in one folder."""
    built = f"deepspeed_acco_ops_{getuser()}_{version('deepspeed')}_{version('torch')}"
    return str(Path(tempfile.gettempdir()) / built)


def remove_shared_memory(master_port: int | str) -> None:
    """DeepSpeed leaves 66 MiB for each rank of a job in shared memory, named by the port."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{master_port}_*"):
        left.unlink(missing_ok=True)


def launch(script, *arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    """The launcher is a module here, so that it is this interpreter's; ``deepspeed`` calls nothing else."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": search}
    environment.setdefault("TORCH_EXTENSIONS_DIR", operators_folder())
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    try:
        return subprocess.run(
            [*launcher, "--master_port", str(port), str(script), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    finally:
        remove_shared_memory(port)
