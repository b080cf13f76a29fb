# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Chooses for each type of device between the native kernels of csrc/ and plain PyTorch, and loads the former.

``DEEPSPEED_ACCO_KERNELS`` = ``auto`` (default), ``native`` (an error where they cannot be had) or ``torch``. The choice
is made once per process, at :func:`prepare` or the first call.
"""

from __future__ import annotations

import os
import warnings

import torch

from . import build

CHOICE_VARIABLE = "DEEPSPEED_ACCO_KERNELS"
CHOICES = ("auto", "native", "torch")
_NAMESPACE = "deepspeed_acco"
_PROBED = f"{_NAMESPACE}::adamw_commit_change"  # the youngest: an older library lacks it

_reasons: dict[str, str] = {}  # by device type; empty: native


def kernels_name(device: torch.device | str = "cpu") -> str:
    """Returns what computes the updates on that device, ``native`` or ``torch``; loads the library if nothing did."""
    return "torch" if reason_against(torch.device(device)) else "native"


def kernels_reason(device: torch.device | str = "cpu") -> str:
    """Returns why the native kernels do not compute the updates on that device; empty where they do."""
    return reason_against(torch.device(device))


def prepare(device: torch.device) -> None:
    """Makes the choice now, by the main thread, so that no build happens inside the first round.

    Raises:
        ValueError: for a value of ``DEEPSPEED_ACCO_KERNELS`` that is not allowed.
        RuntimeError: when it is ``native`` and they cannot be had.
    """
    reason_against(device)


def reason_against(device: torch.device) -> str:
    """Returns why that device computes in plain PyTorch, empty where by native kernels; chooses at the first call."""
    known = _reasons.get(device.type)
    if known is None:
        known = _reasons[device.type] = _choose(device.type)
    return known


def _choose(device_type: str) -> str:
    choice = os.environ.get(CHOICE_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(
            f"ACCO: environment variable {CHOICE_VARIABLE} = {choice!r} is not allowed; allowed: {', '.join(CHOICES)}. "
            "Set one of these or unset it"
        )
    if choice == "torch":
        return f"{CHOICE_VARIABLE}=torch"
    reason = _try_native(device_type)
    if reason and choice == "native":
        raise RuntimeError(
            f"ACCO: {CHOICE_VARIABLE}=native, and the native kernels cannot be had on {device_type}: {reason}\n"
            f"{build.HOW_TO_BUILD}"
        )
    if reason and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"ACCO: the updates on {device_type} run in plain PyTorch, several times slower than the native kernels, "
            f"which cannot be had: {reason}\n{build.HOW_TO_BUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _try_native(device_type: str) -> str:
    dispatch_key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if dispatch_key is None:
        return f"there are none for devices of type {device_type}"
    if not _is_registered():
        try:
            build.load(device_type)
        except Exception as failure:  # whatever a compiler, a linker or a file system can do to us
            return f"{type(failure).__name__}: {failure}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_PROBED, dispatch_key):
        return f"{build.loaded_from}, which this process loaded before, has no kernels for {device_type}"
    _register_fakes()
    return ""


def _is_registered() -> bool:
    return torch._C._dispatch_has_kernel(_PROBED)


_fakes: list[torch.library.Library] = []
_UPDATES = ("adamw_estimate", "adamw_commit", "traffic_estimate", "traffic_commit")
_QUANTIZED = ("quantize", "dequantize_sum", "adamw_estimate_change", "adamw_commit_change", "add_change")
_LOCAL = ("block_roots", "predict_locally")
_SHARDS = ("pack", "copy_shards", "swap_shards")


def _register_fakes() -> None:
    """Tells torch.compile and opcheck what the operators do to shapes: nothing, but for the sums."""
    if _fakes:
        return
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    for name in (*_UPDATES, *_QUANTIZED, *_LOCAL, *_SHARDS):
        torch.library.register_fake(f"{_NAMESPACE}::{name}", lambda *_, **__: None, lib=library)
    torch.library.register_fake(
        f"{_NAMESPACE}::grad_sumsq", lambda grad, max_blocks=0: grad.new_empty((), dtype=torch.float64), lib=library
    )
    torch.library.register_fake(
        f"{_NAMESPACE}::error_and_step", lambda master, *_, **__: master.new_empty(2, dtype=torch.float64), lib=library
    )
    _fakes.append(library)
