# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The updates as everybody calls them: by the native kernels of csrc/ where they can be had, else by update.py.

``DEEPSPEED_ACCO_KERNELS`` = ``auto`` (default), ``native`` (an error where they cannot be had) or ``torch``. The choice
is made once per process, at :func:`prepare` or the first call.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import quantize as _quantize
from . import update
from .settings import AdamWHyper
from .update import AdamWShard

__all__ = [
    "AdamWShard",
    "adamw_commit",
    "adamw_estimate",
    "adamw_estimate_change",
    "add_change",
    "dequantize_sum",
    "kernels_name",
    "kernels_reason",
    "pack",
    "prepare",
    "quantize",
    "set_loader",
    "sum_of_squares",
]

CHOICE_VARIABLE = "DEEPSPEED_ACCO_KERNELS"
CHOICES = ("auto", "native", "torch")
_NAMESPACE = "deepspeed_acco"
_PROBED = f"{_NAMESPACE}::adamw_commit"

_loader: Callable[[], str] | None = None
_how_to_build = ""
_reasons: dict[str, str] = {}  # by device type; empty: native


def set_loader(loader: Callable[[], str], how_to_build: str) -> None:
    """Says how the native library is loaded: ``loader`` registers its operators and returns where it lies, or raises.
    Called by a higher floor, since building goes through DeepSpeed."""
    global _loader, _how_to_build
    _loader, _how_to_build = loader, how_to_build


def kernels_name(device: torch.device | str = "cpu") -> str:
    """``native`` or ``torch``: what computes the updates on that device. Loads the library if nothing did before."""
    return "torch" if _reason(torch.device(device)) else "native"


def kernels_reason(device: torch.device | str = "cpu") -> str:
    """Why it is not the native kernels; empty where it is."""
    return _reason(torch.device(device))


def prepare(device: torch.device) -> None:
    """Makes the choice now, by the main thread, so that no build happens inside the first round.

    Raises:
        ValueError: for a value of ``DEEPSPEED_ACCO_KERNELS`` that is not allowed.
        RuntimeError: when it is ``native`` and they cannot be had.
    """
    _reason(device)


def _reason(device: torch.device) -> str:
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
            f"{_how_to_build}"
        )
    if reason and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"ACCO: the updates on {device_type} run in plain PyTorch, several times slower than the native kernels, "
            f"which cannot be had: {reason}\n{_how_to_build}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _try_native(device_type: str) -> str:
    dispatch_key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if dispatch_key is None:
        return f"there are none for devices of type {device_type}"
    if not _is_registered():
        if _loader is None:
            return "nothing has said how to load them"
        try:
            _loader()
        except Exception as failure:  # whatever a compiler, a linker or a file system can do to us
            return f"{type(failure).__name__}: {failure}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_PROBED, dispatch_key):
        return f"the library was built without kernels for {device_type}"
    _register_fakes()
    return ""


def _is_registered() -> bool:
    return torch._C._dispatch_has_kernel(_PROBED)


_fakes: list[torch.library.Library] = []
_QUANTISED = ("quantize", "dequantize_sum", "adamw_estimate_change", "add_change")


def _register_fakes() -> None:
    """What the operators do to shapes: nothing, but for the sum. For torch.compile and opcheck."""
    if _fakes:
        return
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    for name in ("adamw_estimate", "adamw_commit", *_QUANTISED, "pack", "traffic_estimate", "traffic_commit"):
        torch.library.register_fake(f"{_NAMESPACE}::{name}", lambda *_, **__: None, lib=library)
    torch.library.register_fake(
        f"{_NAMESPACE}::grad_sumsq", lambda grad: grad.new_empty((), dtype=torch.float64), lib=library
    )
    _fakes.append(library)


# ---- the operators; arguments as in update.py


@torch.no_grad()
def adamw_estimate(
    shard: AdamWShard, grad: Tensor, hyper: AdamWHyper, grad_scale: Tensor, is_finite: Tensor, out: Tensor
) -> None:
    """As :func:`update.adamw_estimate`, in one pass that reads the state and writes ``out`` alone."""
    if _reason(grad.device):
        update.adamw_estimate(shard, grad, hyper, grad_scale, is_finite, out)
    else:
        torch.ops.deepspeed_acco.adamw_estimate(*_arguments(shard, grad, hyper, grad_scale, is_finite, out))


@torch.no_grad()
def adamw_commit(
    shard: AdamWShard, grad: Tensor, hyper: AdamWHyper, grad_scale: Tensor, is_finite: Tensor, out: Tensor
) -> None:
    """As :func:`update.adamw_commit`, in one pass."""
    if _reason(grad.device):
        update.adamw_commit(shard, grad, hyper, grad_scale, is_finite, out)
    else:
        torch.ops.deepspeed_acco.adamw_commit(*_arguments(shard, grad, hyper, grad_scale, is_finite, out))


def _arguments(shard, grad, hyper, grad_scale, is_finite, out):
    numbers = (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    return (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step, grad, grad_scale, is_finite, *numbers, out)


@torch.no_grad()
def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """As :func:`update.sum_of_squares`."""
    if _reason(tensors[0].device):
        return update.sum_of_squares(tensors)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        total += torch.ops.deepspeed_acco.grad_sumsq(tensor)
    return total


@torch.no_grad()
def pack(grads: Tensor, packed: Tensor, scale: float, *, clears: bool) -> None:
    """As :func:`update.pack`, in one pass."""
    if _reason(grads.device):
        update.pack(grads, packed, scale, clears=clears)
    else:
        torch.ops.deepspeed_acco.pack(grads, packed, scale, clears)


# ---- the quantised estimate; arguments as in quantize.py


@torch.no_grad()
def quantize(values: Tensor, records: Tensor, bits: int, scale: float) -> None:
    """As :func:`quantize.quantize`, in one pass."""
    if _reason(values.device):
        _quantize.quantize(values, records, bits, scale)
    else:
        torch.ops.deepspeed_acco.quantize(values, records, bits, scale)


@torch.no_grad()
def dequantize_sum(messages: list[Tensor], total: Tensor, bits: int) -> None:
    """As :func:`quantize.dequantize_sum`, in one pass over ``total``."""
    if _reason(total.device):
        _quantize.dequantize_sum(messages, total, bits)
    else:
        torch.ops.deepspeed_acco.dequantize_sum(messages, total, bits)


@torch.no_grad()
def adamw_estimate_change(
    shard: AdamWShard,
    grad: Tensor,
    hyper: AdamWHyper,
    grad_scale: Tensor,
    is_finite: Tensor,
    live: Tensor,
    records: Tensor,
    bits: int,
) -> None:
    """As :func:`quantize.adamw_estimate_change`, in one pass that writes ``records`` alone."""
    if _reason(grad.device):
        _quantize.adamw_estimate_change(shard, grad, hyper, grad_scale, is_finite, live, records, bits)
    else:
        arguments = _arguments(shard, grad, hyper, grad_scale, is_finite, live)
        torch.ops.deepspeed_acco.adamw_estimate_change(*arguments, records, bits)


@torch.no_grad()
def add_change(records: Tensor, is_added: Tensor, live: Tensor, bits: int) -> None:
    """As :func:`quantize.add_change`, in one pass."""
    if _reason(live.device):
        _quantize.add_change(records, is_added, live, bits)
    else:
        torch.ops.deepspeed_acco.add_change(records, is_added, live, bits)
