# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Puts the emulated kernels in the place of the CPU's, in this process: as a plugin of pytest (``-p``), or by a call.

Loaded first, they are what deepspeed_acco/optim/native.py finds.
"""

from __future__ import annotations

import ctypes
import os

import torch

VARIABLE = "EMULATED_KERNELS"  # for the plugin: where the library lies


def load(path: str) -> None:
    """Registers the emulated kernels with PyTorch, before anybody else has registered any."""
    torch.ops.load_library(path)


def launches(path: str) -> int:
    """Returns how many kernels this process has launched."""
    return ctypes.CDLL(path).emulated_launches()


def train(path: str, **arguments) -> dict:
    """Trains as tests/support/training.py does, by emulated kernels; adds how many were launched."""
    load(path)
    from tests.support import training

    return {**training.train(**arguments), "launches": launches(path)}


def pytest_configure(config) -> None:
    load(os.environ[VARIABLE])


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{launches(os.environ[VARIABLE])} emulated launches")
