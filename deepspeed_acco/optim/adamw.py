# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The two updates of one shard in plain PyTorch: AdamW with the state written (COMMIT) or left alone (ESTIMATE).

The arithmetic is that of ``torch.optim.AdamW`` (decoupled decay, bias correction, ``eps`` outside the root). Nothing
here asks the device for a value: scale and skip flag stay tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import pieces
from .settings import AdamWHyper

# On a CPU a piece stays in the cache, and below torch's own grain size no operator splits it over threads, so that the
# result does not depend on how many threads the caller has (worker and main thread must agree bit by bit).
_CPU_PIECE_NUMEL = 2**15
_DEVICE_PIECE_NUMEL = 2**24
_MEASURED_NUMEL = 2**20  # of the monitor's sums: their temporaries stay at a few MiB on every device


def piece_numel(device: torch.device) -> int:
    """How many elements one operator call handles at a time on that device."""
    return _CPU_PIECE_NUMEL if device.type == "cpu" else _DEVICE_PIECE_NUMEL


class AdamWShard:
    """One parameter group's shard: fp32 state, all 1-D of ``shard_numel`` elements.

    Attributes:
        master, exp_avg, exp_avg_sq: fp32, on the shard's device. step: fp32, 0-dim, the number of commits.
    """

    def __init__(self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor):
        self.master, self.exp_avg, self.exp_avg_sq, self.step = master, exp_avg, exp_avg_sq, step


@torch.no_grad()
def adamw_estimate(
    shard: AdamWShard, grad: Tensor, hyper: AdamWHyper, grad_scale: Tensor, is_finite: Tensor, out: Tensor
):
    """Writes to ``out`` the weights that one AdamW step would give; the state stays as it is.

    Args:
        grad: the shard's summed gradient, 1-D, any floating dtype.
        grad_scale: fp32, 0-dim, multiplies ``grad`` (mean, loss scale and clip factor in one).
        is_finite: bool, 0-dim; where False the step is skipped and ``out`` gets the master weights.
        out: 1-D, any floating dtype.
    """
    _adamw(shard, grad, hyper, grad_scale, is_finite, out, writes_state=False)


@torch.no_grad()
def adamw_commit(
    shard: AdamWShard, grad: Tensor, hyper: AdamWHyper, grad_scale: Tensor, is_finite: Tensor, out: Tensor
):
    """One AdamW step in place, and the new weights to ``out`` (arguments as in :func:`adamw_estimate`)."""
    _adamw(shard, grad, hyper, grad_scale, is_finite, out, writes_state=True)


def _adamw(shard, grad, hyper, grad_scale, is_finite, out, *, writes_state):
    step = shard.step.double() + 1
    taken = is_finite.double()
    # 0-dim factors, each rounded once from float64: with taken = 0 they leave every value as it is.
    grad_weight = ((1 - hyper.beta1) * taken).float()
    square_keep = (1 - (1 - hyper.beta2) * taken).float()
    square_weight = ((1 - hyper.beta2) * taken).float()
    decay = (1 - hyper.lr * hyper.weight_decay * taken).float()
    step_size = (hyper.lr * taken / (1 - hyper.beta1**step)).float()
    root_correction = (1 - hyper.beta2**step).sqrt().float()

    for start, length in pieces(grad.numel(), piece_numel(grad.device)):
        at = slice(start, start + length)
        g = torch.where(is_finite, grad[at].float() * grad_scale, 0.0)  # the scale may be NaN too
        exp_avg = torch.lerp(shard.exp_avg[at], g, grad_weight)
        exp_avg_sq = shard.exp_avg_sq[at] * square_keep
        exp_avg_sq.add_(g.mul_(g).mul_(square_weight))
        denominator = exp_avg_sq.sqrt().div_(root_correction).add_(hyper.eps)
        weights = (shard.master[at] * decay).sub_(denominator.reciprocal_().mul_(exp_avg).mul_(step_size))
        if writes_state:
            shard.exp_avg[at] = exp_avg
            shard.exp_avg_sq[at] = exp_avg_sq
            shard.master[at] = weights
        out[at] = weights
    if writes_state:
        shard.step.add_(taken)


@torch.no_grad()
def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, float64, 0-dim; the order of the additions does not depend on threads."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        for start, length in pieces(tensor.numel(), piece_numel(tensor.device)):
            total += torch.linalg.vector_norm(tensor[start : start + length], dtype=torch.float64).square()
    return total


@torch.no_grad()
def pack(grads: Tensor, packed: Tensor, scale: float, *, clears: bool) -> None:
    """``packed`` <- ``grads * scale`` in the dtype of ``packed``; then ``grads`` <- 0 if ``clears``. Both 1-D."""
    for start, length in pieces(grads.numel(), piece_numel(grads.device)):
        source, target = grads[start : start + length], packed[start : start + length]
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)
        if clears:
            source.zero_()


@torch.no_grad()
def sums_of_error_and_step(shard: AdamWShard, hyper: AdamWHyper, stands_at: Tensor) -> Tensor:
    """|stands_at - master|^2 and |master - master before|^2, right after a commit that was not skipped.

    The step is computed again from the state that the commit left, u = lr m_hat / (sqrt(v_hat) + eps), so that nothing
    is cloned before: after = before (1 - lr wd) - u gives after - before = -(u + lr wd after) / (1 - lr wd).

    Args:
        hyper: that of the commit.
        stands_at: where training stood while the commit ran, 1-D, ``shard_numel``, any floating dtype.
    Returns:
        float64, 2 elements; the differences are fp32. They do not depend on threads. Where lr wd = 1 nothing remembers
        the weights before: the second is NaN.
    """
    step = shard.step.double()
    step_size = (hyper.lr / (1 - hyper.beta1**step)).float()
    root_correction = (1 - hyper.beta2**step).sqrt().float()
    decay = hyper.lr * hyper.weight_decay
    sums = torch.zeros(2, dtype=torch.float64, device=shard.master.device)
    for start, length in pieces(stands_at.numel(), min(piece_numel(stands_at.device), _MEASURED_NUMEL)):
        at = slice(start, start + length)
        master = shard.master[at]
        sums[0] += torch.linalg.vector_norm(stands_at[at] - master, dtype=torch.float64).square()
        denominator = shard.exp_avg_sq[at].sqrt().div_(root_correction).add_(hyper.eps)
        moved = torch.div(shard.exp_avg[at], denominator, out=denominator).mul_(step_size)
        moved.add_(master, alpha=decay)
        sums[1] += torch.linalg.vector_norm(moved, dtype=torch.float64).square()
    sums[1] /= (1 - decay) ** 2 or math.nan
    return sums
