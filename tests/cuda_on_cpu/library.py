# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Puts the emulated kernels in the place of the CPU's, in this process: as a plugin of pytest (``-p``), or by a call.

Loaded first, they are what deepspeed_acco/optim/native.py finds.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import torch

from tests.support.launcher import ROOT

TESTS = (
    *("tests/optim/test_ops.py", "tests/optim/test_quantization_ops.py", "tests/optim/test_local_prediction.py"),
    "tests/optim/test_shards.py",
    "tests/cuda_on_cpu/as_on_gpu.py",
)
VARIABLE = "EMULATED_KERNELS"  # for the plugin: where the library lies


def load(path: str) -> None:
    """Registers the emulated kernels with PyTorch, before anybody else has registered any."""
    torch.ops.load_library(path)


def launches(path: str) -> int:
    """Returns how many kernels this process has launched."""
    return ctypes.CDLL(path).emulated_launches()


def run_tests(path: str) -> tuple[int, int]:
    """Runs the tests of the CPU's kernels on the emulated ones; returns how many passed, and the launches.

    Raises:
        RuntimeError: with their output, where one fails.
    """
    environment = {**os.environ, VARIABLE: path, "DEEPSPEED_ACCO_KERNELS": "native", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", __name__, *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.search(r"^(\d+) emulated launches$.*^(\d+) passed", done.stdout, re.DOTALL | re.MULTILINE)
    if done.returncode or not found:
        raise RuntimeError(done.stdout + done.stderr)
    return int(found[2]), int(found[1])


def train(path: str, **arguments) -> dict:
    """Trains as tests/support/training.py does, by emulated kernels; adds how many were launched."""
    load(path)
    from tests.support import training

    return {**training.train(**arguments), "launches": launches(path)}


def pytest_configure(config) -> None:
    load(os.environ[VARIABLE])


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{launches(os.environ[VARIABLE])} emulated launches")
