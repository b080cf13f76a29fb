# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says in one string on what machine and with what versions a figure was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> str:
    """Returns for example ``2 cores, Intel Xeon Processor, Python 3.11.2, torch 2.13.0``."""
    # Imports neither torch nor DeepSpeed, which would take seconds.
    return ", ".join(
        [
            f"{os.cpu_count()} cores",
            _processor(),
            f"Python {platform.python_version()}",
            f"torch {version('torch')}",
        ]
    )


def _processor() -> str:
    """Returns the model's name where the system tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
