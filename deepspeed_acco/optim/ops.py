# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Dispatches the updates: by the native kernels of csrc/ where they can be had (native.py), else by plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import adamw, flat, local_prediction, quantization
from .adamw import AdamWHyper, AdamWShard
from .flat import Shards
from .native import reason_against

BLOCK_THREADS = 256  # kThreads of csrc/cuda/device.h
_most_blocks = 0


@contextmanager
def at_most_blocks(count: int) -> Iterator[None]:
    """Bounds the thread blocks that each native kernel has on CUDA where it is called inside, so that what runs beside
    it keeps the rest of the device; results keep their bits.

    Args:
        count: of :data:`BLOCK_THREADS` threads; 0: as many as fill the device. Other devices know no such bound.
    """
    global _most_blocks
    before, _most_blocks = _most_blocks, count
    try:
        yield
    finally:
        _most_blocks = before


def blocks_of_share(share: float, device: torch.device) -> int:
    """Returns the thread blocks of that share of a CUDA device, 0 < ``share`` <= 1; 0, no bound, for all of it."""
    if share == 1.0 or device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    resident = properties.multi_processor_count * properties.max_threads_per_multi_processor // BLOCK_THREADS
    return max(1, int(share * resident))


# ---- the operators; arguments as in adamw.py and flat.py


@torch.no_grad()
def adamw_estimate(
    shard: AdamWShard, grad: Tensor, hyper: AdamWHyper, grad_scale: Tensor, is_finite: Tensor, out: Tensor
) -> None:
    """Does what :func:`adamw.adamw_estimate` does, in one pass that reads the state and writes ``out`` alone."""
    if reason_against(grad.device):
        adamw.adamw_estimate(shard, grad, hyper, grad_scale, is_finite, out)
    else:
        arguments = _arguments(shard, grad, hyper, grad_scale, is_finite, out)
        torch.ops.deepspeed_acco.adamw_estimate(*arguments, max_blocks=_most_blocks)


@torch.no_grad()
def adamw_commit(
    shard: AdamWShard, grad: Tensor, hyper: AdamWHyper, grad_scale: Tensor, is_finite: Tensor, out: Tensor
) -> None:
    """Does what :func:`adamw.adamw_commit` does, in one pass."""
    if reason_against(grad.device):
        adamw.adamw_commit(shard, grad, hyper, grad_scale, is_finite, out)
    else:
        arguments = _arguments(shard, grad, hyper, grad_scale, is_finite, out)
        torch.ops.deepspeed_acco.adamw_commit(*arguments, max_blocks=_most_blocks)


def _arguments(shard, grad, hyper, grad_scale, is_finite, last):
    state = (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step)
    return (*state, grad, grad_scale, is_finite, *_numbers(hyper), last)


def _numbers(hyper):
    return hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay


@torch.no_grad()
def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Does what :func:`flat.sum_of_squares` does, in one pass over each tensor."""
    if reason_against(tensors[0].device):
        return flat.sum_of_squares(tensors)
    total, *others = (torch.ops.deepspeed_acco.grad_sumsq(tensor, max_blocks=_most_blocks) for tensor in tensors)
    for other in others:
        total += other
    return total


@torch.no_grad()
def sums_of_error_and_step(shard: AdamWShard, hyper: AdamWHyper, stands_at: Tensor) -> Tensor:
    """Does what :func:`adamw.sums_of_error_and_step` does, in one pass."""
    if reason_against(stands_at.device):
        return adamw.sums_of_error_and_step(shard, hyper, stands_at)
    state = (shard.master, shard.exp_avg, shard.exp_avg_sq, shard.step)
    sums = torch.ops.deepspeed_acco.error_and_step(*state, *_numbers(hyper), stands_at, max_blocks=_most_blocks)
    sums[1] /= adamw.square_of_what_remains(hyper)
    return sums


@torch.no_grad()
def pack(grads: Tensor, packed: Tensor, scale: float, *, clears: bool, shards: Shards | None = None) -> None:
    """Does what :func:`flat.pack` does, in one pass."""
    if reason_against(grads.device):
        flat.pack(grads, packed, scale, clears=clears, shards=shards)
    else:
        torch.ops.deepspeed_acco.pack(grads, packed, scale, clears, _table(shards), max_blocks=_most_blocks)


@torch.no_grad()
def copy_shards(source: Tensor, target: Tensor, shards: Shards | None = None) -> None:
    """Does what :func:`flat.copy_shards` does, in one pass."""
    if shards is None or reason_against(source.device):
        flat.copy_shards(source, target, shards)
    else:
        torch.ops.deepspeed_acco.copy_shards(source, target, shards.table, max_blocks=_most_blocks)


@torch.no_grad()
def swap_shards(one: Tensor, other: Tensor, shards: Shards | None = None) -> None:
    """Does what :func:`flat.swap_shards` does, in one pass."""
    if reason_against(one.device):
        flat.swap_shards(one, other, shards)
    else:
        torch.ops.deepspeed_acco.swap_shards(one, other, _table(shards), max_blocks=_most_blocks)


def _table(shards: Shards | None) -> Tensor | None:
    return None if shards is None else shards.table


# ---- the quantized rounds; arguments as in quantization.py


@torch.no_grad()
def quantize(values: Tensor, records: Tensor, bits: int, scale: float, shards: Shards | None = None) -> None:
    """Does what :func:`quantization.quantize` does, in one pass."""
    if reason_against(values.device):
        quantization.quantize(values, records, bits, scale, shards)
    else:
        torch.ops.deepspeed_acco.quantize(values, records, bits, scale, _table(shards), max_blocks=_most_blocks)


@torch.no_grad()
def dequantize_sum(messages: list[Tensor], total: Tensor, bits: int) -> None:
    """Does what :func:`quantization.dequantize_sum` does, in one pass over ``total``."""
    if reason_against(total.device):
        quantization.dequantize_sum(messages, total, bits)
    else:
        torch.ops.deepspeed_acco.dequantize_sum(messages, total, bits, max_blocks=_most_blocks)


@torch.no_grad()
def adamw_estimate_change(
    shard: AdamWShard,
    grad: Tensor,
    hyper: AdamWHyper,
    grad_scale: Tensor,
    is_finite: Tensor,
    live_dtype: torch.dtype,
    records: Tensor,
    bits: int,
    base: Tensor | None = None,
) -> None:
    """Does what :func:`quantization.adamw_estimate_change` does, in one pass that writes ``records`` alone."""
    if reason_against(grad.device):
        quantization.adamw_estimate_change(shard, grad, hyper, grad_scale, is_finite, live_dtype, records, bits, base)
    else:
        arguments = _arguments(shard, grad, hyper, grad_scale, is_finite, live_dtype)
        torch.ops.deepspeed_acco.adamw_estimate_change(*arguments, records, bits, base, max_blocks=_most_blocks)


@torch.no_grad()
def adamw_commit_change(
    shard: AdamWShard,
    grad: Tensor,
    hyper: AdamWHyper,
    grad_scale: Tensor,
    is_finite: Tensor,
    base: Tensor,
    records: Tensor,
    bits: int,
) -> None:
    """Does what :func:`quantization.adamw_commit_change` does, in one pass."""
    if reason_against(grad.device):
        quantization.adamw_commit_change(shard, grad, hyper, grad_scale, is_finite, base, records, bits)
    else:
        arguments = _arguments(shard, grad, hyper, grad_scale, is_finite, base)
        torch.ops.deepspeed_acco.adamw_commit_change(*arguments, records, bits, max_blocks=_most_blocks)


@torch.no_grad()
def add_change(records: Tensor, is_added: Tensor, live: Tensor, bits: int, shards: Shards | None = None) -> None:
    """Does what :func:`quantization.add_change` does, in one pass."""
    if reason_against(live.device):
        quantization.add_change(records, is_added, live, bits, shards)
    else:
        torch.ops.deepspeed_acco.add_change(records, is_added, live, bits, _table(shards), max_blocks=_most_blocks)


# ---- the prediction of the schedule local; arguments as in local_prediction.py


@torch.no_grad()
def block_roots(exp_avg_sq: Tensor, step: Tensor, beta2: float, eps: float, roots: Tensor) -> None:
    """Does what :func:`local_prediction.block_roots` does, in one pass."""
    if reason_against(exp_avg_sq.device):
        local_prediction.block_roots(exp_avg_sq, step, beta2, eps, roots)
    else:
        torch.ops.deepspeed_acco.block_roots(exp_avg_sq, step, beta2, eps, roots, max_blocks=_most_blocks)


@torch.no_grad()
def predict_locally(
    on: local_prediction.Operands, hyper: AdamWHyper, kept: float, grad_scale: Tensor, is_finite: Tensor
) -> None:
    """Does what :func:`local_prediction.predict_locally` does, in one pass."""
    if reason_against(on.newest.device):
        local_prediction.predict_locally(on, hyper, kept, grad_scale, is_finite)
    else:
        read = (on.newest, on.before, on.grad, on.roots, on.step, hyper.lr, hyper.beta1, hyper.beta2)
        torch.ops.deepspeed_acco.predict_locally(
            *read, kept, grad_scale, is_finite, on.live, on.shard_numel, max_blocks=_most_blocks
        )
