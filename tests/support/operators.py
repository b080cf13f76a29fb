# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Builds what most of the tests need, in a process of its own, so that no limit of a test ends a build: a build that is
killed leaves a lock behind, for which everybody waits."""

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from tests.support.launcher import ROOT, rank_environment


def _built() -> Path:
    return Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "built_for_tests"


def start_build() -> subprocess.Popen | None:
    """Starts to build into the folder that all tests share; None where that was done before.

    What fails here fails again, and says why, in the test that needs it.
    """
    if _built().exists():
        return None
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "tests.support.operators"]
    # In a session of its own, which no interrupt from the keyboard reaches.
    return subprocess.Popen(command, cwd=ROOT, env=rank_environment(), start_new_session=True, **quiet)


def _build() -> None:
    from deepspeed.comm.torch import build_shm_op

    from deepspeed_acco.optim import build

    build.load()
    build_shm_op()  # DeepSpeed's communication between the ranks of a host of CPUs


if __name__ == "__main__":
    _built().parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_built().with_suffix(".lock")):  # several workers start it
        if not _built().exists():
            for left_behind in _built().parent.glob("*/lock"):
                left_behind.unlink()
            _build()
            _built().touch()
