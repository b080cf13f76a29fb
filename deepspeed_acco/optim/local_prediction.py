# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Predicts the next weights on one rank alone, in plain PyTorch: what the schedule ``local`` trains at.

AdamW's next step is known but for the other ranks' gradients: its momentum is the last step, and a rank's own gradient
stands for the mean, over one root for each block of 256 elements, since exp_avg_sq itself is sharded. How far a rank
stood from the true weights, ``live - newest``, goes on with the same momentum, or a part ``kept`` of it::

    predicted = newest + momentum * (newest - before + kept * (live - newest)) - clamp(coefficient * grad / root, most)
    momentum = beta1 (1 - beta1^t) / (1 - beta1^(t+1))    coefficient = lr (1 - beta1) / (1 - beta1^(t+1))
    most = coefficient * sqrt((1 - beta2^(t+1)) / (1 - beta2))

t counts the commits. ``most`` is the farthest that one gradient can move a weight in AdamW, that of a weight which
never had one before. Blocks restart at every shard, and a shard's last one may be shorter.

Where curvature times learning rate is large, a rank's gradient drives it back to the others, and too far where nothing
is kept: differences between ranks then grow from window to window (benchmarks/stability.py). What is kept is also the
noise of the rank's own gradients, which grows with the number of ranks that share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adamw import AdamWHyper
from .flat import piece_numel, pieces

BLOCK = 256
SMALLEST_ROOT = torch.finfo(torch.float32).tiny
_RANKS_THAT_KEEP_ALL = 2  # by benchmarks/virtual_ranks.py
_LARGEST = torch.finfo(torch.float32).max


def block_count(shard_numel: int) -> int:
    """Returns the number of blocks, and of roots, of a shard of so many elements."""
    return -(-shard_numel // BLOCK)


def kept_part(ranks: int, dtype: torch.dtype) -> float:
    """Returns the part of its distance from the true weights that each of so many data-parallel ranks keeps.

    Args:
        dtype: of the weights. In 16 bits it is half at most: of one unit in the last place more than half would be
            rounded to the whole again, and never go away.
    """
    most = 1.0 if dtype == torch.float32 else 0.5
    return min(most, _RANKS_THAT_KEEP_ALL / ranks)


@torch.no_grad()
def block_roots(exp_avg_sq: Tensor, step: Tensor, beta2: float, eps: float, roots: Tensor) -> None:
    """Writes to ``roots`` what AdamW divides by, one number for each block of a shard: the root of the mean of its
    exp_avg_sq, corrected for its bias, plus ``eps``; positive also where that is 0.

    Args:
        exp_avg_sq: fp32, 1-D. step: fp32, 0-dim, the number of commits. roots: fp32, 1-D, :func:`block_count`.
    """
    taken = step.double()
    correction = torch.where(taken > 0, 1 - beta2**taken, 1.0)
    numel = piece_numel(exp_avg_sq.device)
    assert numel % BLOCK == 0
    for start, length in pieces(exp_avg_sq.numel(), numel):
        part, first = exp_avg_sq[start : start + length], start // BLOCK
        whole = length // BLOCK * BLOCK
        means = part[:whole].view(-1, BLOCK).mean(dim=1, dtype=torch.float64)
        if whole < length:
            means = torch.cat([means, part[whole:].mean(dtype=torch.float64).view(1)])
        root = (means / correction).sqrt_().add_(eps)
        roots[first : first + means.numel()] = root.clamp_(min=SMALLEST_ROOT)


@dataclass(frozen=True)
class Operands:
    """Holds what a prediction reads and writes: whole shards of one parameter group.

    Attributes:
        newest, before, live: true weights, those one commit earlier, and the live ones, where the rank stands; 1-D of
            one dtype. ``newest`` and ``live`` may be the same.
        grad: this rank's gradient of as many elements, any floating dtype.
        roots: fp32, 1-D, :func:`block_roots` of these shards, one after the other.
        step: fp32, 0-dim, the number of commits behind ``newest``.
        shard_numel: elements of each shard.
    """

    newest: Tensor
    before: Tensor
    live: Tensor
    grad: Tensor
    roots: Tensor
    step: Tensor
    shard_numel: int


@torch.no_grad()
def predict_locally(on: Operands, hyper: AdamWHyper, kept: float, grad_scale: Tensor, is_finite: Tensor) -> None:
    """Writes to ``on.live`` the predicted weights, and to ``on.before`` the newest ones.

    Args:
        kept: of the distance from the newest weights, 0 to 1; what is not finite of it is not kept.
        grad_scale: fp32, 0-dim, multiplies ``on.grad`` (mean, loss scale and clip factor in one).
        is_finite: bool, 0-dim; where False the gradient has no part in the prediction.
    """
    newest, before, shard_numel = on.newest, on.before, on.shard_numel
    taken = on.step.double()
    share = 1 / (1 - hyper.beta1 ** (taken + 1))
    momentum = hyper.beta1 * (1 - hyper.beta1**taken) * share
    of_distance, momentum = (kept * momentum).float(), momentum.float()
    coefficient = hyper.lr * (1 - hyper.beta1) * share
    most = (coefficient * ((1 - hyper.beta2 ** (taken + 1)) / (1 - hyper.beta2)).sqrt()).float()
    factors = (coefficient.float() * grad_scale / on.roots).clamp_(max=_LARGEST)
    blocks = block_count(shard_numel)
    for shard in range(newest.numel() // shard_numel):
        for start, length in pieces(shard_numel, piece_numel(newest.device)):
            begin, first = shard * shard_numel + start, shard * blocks + start // BLOCK
            at = slice(begin, begin + length)
            factor = factors[first : first + block_count(length)].repeat_interleave(BLOCK)[:length]
            moved = torch.minimum(torch.maximum(on.grad[at].float() * factor, -most), most)
            moved = torch.where(is_finite, moved, 0.0)
            weights = newest[at].float()
            distance = (on.live[at].float() - weights).nan_to_num_(0.0, 0.0, 0.0).mul_(of_distance)
            predicted = (weights - before[at].float()).mul_(momentum).add_(weights).add_(distance).sub_(moved)
            before[at] = weights
            on.live[at] = predicted
