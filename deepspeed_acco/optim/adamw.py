# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Updates one shard in plain PyTorch: AdamW with the state written (COMMIT) or left alone (ESTIMATE).

The arithmetic is that of ``torch.optim.AdamW`` (decoupled decay, bias correction, ``eps`` outside the root). Nothing
here asks the device for a value: scale and skip flag stay tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .flat import piece_numel, pieces


@dataclass(frozen=True)
class AdamWHyper:
    """Holds the AdamW hyper-parameters of one parameter group at one moment (defaults: torch.optim.AdamW's)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> AdamWHyper:
        """Copies the numbers out of a ``param_groups`` entry; later changes by a scheduler do not reach the copy."""
        beta1, beta2 = group["betas"]
        return cls(float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]))


class AdamWShard:
    """Holds the fp32 state of one parameter group's shard, all 1-D of ``shard_numel`` elements.

    Attributes:
        master, exp_avg, exp_avg_sq: fp32, on the shard's device. step: fp32, 0-dim, the number of commits.
    """

    def __init__(self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor):
        self.master, self.exp_avg, self.exp_avg_sq, self.step = master, exp_avg, exp_avg_sq, step

    @classmethod
    def fresh(cls, master: Tensor, state: dict[str, Any]) -> AdamWShard:
        """Makes a shard that no commit has touched, and enters its tensors into torch's ``state`` of ``master``."""
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
        return cls(master, state["exp_avg"], state["exp_avg_sq"], state["step"])

    def adopt(self, state: dict[str, Any]) -> None:
        """Takes the tensors that torch's ``state`` has now; loading replaced them."""
        step = torch.as_tensor(state["step"], dtype=torch.float32, device=self.master.device).reshape(())
        state["step"] = step
        self.exp_avg, self.exp_avg_sq, self.step = state["exp_avg"], state["exp_avg_sq"], step


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
    """Takes one AdamW step in place and writes the new weights to ``out`` (arguments as in :func:`adamw_estimate`)."""
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
def sums_of_error_and_step(shard: AdamWShard, hyper: AdamWHyper, stands_at: Tensor) -> Tensor:
    """Returns |stands_at - master|^2 and |master - master before|^2, right after a commit that was not skipped.

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
    for start, length in pieces(stands_at.numel(), piece_numel(stands_at.device)):
        at = slice(start, start + length)
        master = shard.master[at]
        sums[0] += torch.linalg.vector_norm(stands_at[at] - master, dtype=torch.float64).square()
        denominator = shard.exp_avg_sq[at].sqrt().div_(root_correction).add_(hyper.eps)
        moved = torch.div(shard.exp_avg[at], denominator, out=denominator).mul_(step_size)
        moved.add_(master, alpha=decay)
        sums[1] += torch.linalg.vector_norm(moved, dtype=torch.float64).square()
    sums[1] /= square_of_what_remains(hyper)
    return sums


def square_of_what_remains(hyper: AdamWHyper) -> float:
    """Returns the square of what the decay of a step leaves of a weight; NaN where that is nothing."""
    return (1 - hyper.lr * hyper.weight_decay) ** 2 or math.nan
