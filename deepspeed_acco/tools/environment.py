# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Prints for ``ds_acco env`` what was found on this machine, and which kernels are used and why."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

from ..optim import build, build_locks, native


def describe() -> list[tuple[str, str]]:
    """Returns (what, value) pairs; loads the kernels, and so may build them."""
    nvcc = f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else "nvcc"
    cuda_is_buildable, why_not = build.cuda_is_buildable()
    pairs = [
        ("deepspeed_acco", _version("deepspeed_acco")),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("DeepSpeed", _version("deepspeed")),
        ("C++ compiler", _first_line_of([build.compiler(), "--version"])),
        ("ninja", "found" if is_ninja_available() else "not found (pip install ninja)"),
        ("nvcc", _first_line_of([nvcc, "--version"], "release")),
        ("CUDA kernels", "can be built" if cuda_is_buildable else f"not built: {why_not}"),
        ("CUDA architectures", ", ".join(_architectures()) or "no device is visible"),
        ("kernels' sources", str(build.csrc())),
    ]
    pairs += [("build lock", text) for text in build_locks.describe_locks()]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        name, reason = native.kernels_name(device), native.kernels_reason(device)
        pairs.append((f"kernels on {device}", f"{name}: {reason}" if reason else name))
    if build.loaded_from:
        pairs.append(("kernels' library", build.loaded_from))
    return pairs


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed (pip install {package})"


def _first_line_of(command: list[str], keyword: str = "") -> str:
    """Returns the first line with the keyword of what the command prints, and where the command lies."""
    path = shutil.which(command[0])
    if path is None:
        return f"not found ({command[0]})"
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if keyword in line]
    return f"{lines[0]} ({path})" if lines else f"gives no version ({path})"


def _architectures() -> list[str]:
    if not torch.cuda.is_available():
        return []
    capabilities = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return sorted({f"sm_{major}{minor}" for major, minor in capabilities})
