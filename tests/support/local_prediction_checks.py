# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks what block_roots and predict_locally must do, the same on every device and in the plain path."""

from __future__ import annotations

import math

import torch

from deepspeed_acco.optim import local_prediction as plain
from deepspeed_acco.optim.adamw import AdamWHyper
from tests.support.kernel_checks import CANARY, Surrounded, same_bits

HYPER = AdamWHyper(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
# Around the blocks; several threads' shares and pieces of the plain path.
SHARDS = (1, 2, 255, 256, 257, 513, 2**15 + 5)
STEPS = (0.0, 1.0, 7.0, 4000.0)


def true_roots(exp_avg_sq, step, hyper):
    """Returns the roots in float64, block by block."""
    correction = 1 - hyper.beta2**step if step else 1.0
    roots = [math.sqrt(block.double().mean().item() / correction) + hyper.eps for block in exp_avg_sq.cpu().split(256)]
    return torch.tensor(roots, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)


def check_roots(ops, numel, step, device="cpu", hyper=HYPER):
    """Checks the roots of a shard with blocks of zeros, huge and tiny values."""
    generator = torch.Generator().manual_seed(numel)
    squares = torch.randn(numel, generator=generator).square() * 1e-6
    for number, block in enumerate(squares.split(256)):
        block.mul_((1.0, 0.0, 1e-30, 1e30)[number % 4])
    count = plain.block_count(numel)
    buffer = torch.full((count + 2,), CANARY, device=device)
    ops.block_roots(squares.to(device), torch.tensor(step, device=device), hyper.beta2, hyper.eps, buffer[1:-1])
    roots = buffer[1:-1].cpu()
    torch.testing.assert_close(roots.double(), true_roots(squares, step, hyper), rtol=2e-7, atol=0)
    assert (roots > 0).all() and buffer[0] == buffer[-1] == CANARY


class Case(Surrounded):
    """Holds the operands of a prediction, of ``shards`` shards."""

    def __init__(self, shard_numel, shards, weight_dtype, grad_dtype, *, step=7.0, kept=0.4, device="cpu", shift=0):
        numel, generator = shards * shard_numel, torch.Generator().manual_seed(shard_numel)
        super().__init__(numel, device)
        operand = self.operand
        self.kept, normal = kept, torch.randn(4, numel, generator=generator)
        gradient = normal[2] * 0.01
        gradient[::7] *= 100  # beyond what AdamW may move by
        gradient[::11] = 0.0
        self.numel, self.shard_numel = numel, shard_numel
        self.newest = operand(normal[0], weight_dtype, shift)
        self.before = operand(normal[0] + normal[1] * 0.01, weight_dtype, 2 * shift)
        self.grad = operand(gradient, grad_dtype, 3 * shift)
        self.live = operand(normal[0] + normal[3] * 0.01, weight_dtype, shift)
        roots = torch.rand(shards * plain.block_count(shard_numel), generator=generator) * 0.02
        roots[::3] = torch.finfo(torch.float32).tiny  # never a gradient before
        self.roots = roots.to(device)
        self.step = torch.tensor(step, device=device)
        self.scale = torch.tensor(0.37, device=device)
        self.is_finite = torch.tensor(True, device=device)

    def run(self, ops, live=None, hyper=HYPER):
        """Predicts; returns what the operands were before."""
        before = {name: getattr(self, name).cpu().double() for name in ("newest", "before", "grad", "roots")}
        weights = (self.newest, self.before, self.live if live is None else live)
        before["live"] = weights[2].cpu().double()
        on = plain.Operands(*weights, self.grad, self.roots, self.step, self.shard_numel)
        ops.predict_locally(on, hyper, self.kept, self.scale, self.is_finite)
        self.require_untouched_around()
        return before


def expected(before, step, scale, shard_numel, hyper=HYPER, has_gradient=True, kept=0.4):
    """Returns the prediction in float64, as AdamW's next step with the own gradient over the block's root."""
    beta1, beta2 = hyper.beta1, hyper.beta2
    added = 1 - beta1 ** (step + 1)
    moved = torch.zeros_like(before["newest"])
    if has_gradient:
        blocks = plain.block_count(shard_numel)
        for shard, grad in enumerate(before["grad"].split(shard_numel)):
            for block, part in enumerate(grad.split(256)):
                root = before["roots"][shard * blocks + block]
                begin = shard * shard_numel + 256 * block
                bound = (1 - beta1) / added * math.sqrt((1 - beta2 ** (step + 1)) / (1 - beta2))
                own = ((1 - beta1) / added * scale * part / root).clamp(-bound, bound)
                moved[begin : begin + part.numel()] = hyper.lr * own
    momentum = beta1 * (1 - beta1**step) / added
    distance = before["live"] - before["newest"]
    distance[~distance.isfinite()] = 0.0
    return before["newest"] + momentum * (before["newest"] - before["before"] + kept * distance) - moved


def check_prediction(ops, shard_numel, shards, weight_dtype, grad_dtype, step=7.0, device="cpu", shift=0):
    """Checks the predicted weights, the kept ones, and that nothing else changes."""
    case = Case(shard_numel, shards, weight_dtype, grad_dtype, step=step, device=device, shift=shift)
    newest, grad = case.newest.clone(), case.grad.clone()
    true = expected(case.run(ops), step, 0.37, shard_numel)
    rounding = 2.0 ** {torch.float32: -22, torch.bfloat16: -8, torch.float16: -11}[weight_dtype]
    error = (case.live.cpu().double() - true).abs()
    assert (error <= rounding * (true.abs() + 0.1)).all()
    assert same_bits(case.before, newest) and same_bits(case.newest, newest) and same_bits(case.grad, grad)
    # In place, as where nothing was gathered: the bits of a rank that stands on the true weights.
    alike = dict(step=step, device=device, shift=shift)
    in_place, other = (Case(shard_numel, shards, weight_dtype, grad_dtype, **alike) for _ in range(2))
    other.live.copy_(other.newest)
    other.run(ops)
    in_place.run(ops, live=in_place.newest)
    assert same_bits(in_place.newest, other.live)


def check_not_finite(ops, weight_dtype, grad_dtype, device="cpu"):
    """Checks that a gradient which is not finite has no part in the prediction, whatever the scale."""
    for bad, scale in ((math.nan, 1.0), (math.inf, math.nan), (-math.inf, 0.0)):
        case = Case(513, 2, weight_dtype, grad_dtype, device=device)
        case.grad[5], case.is_finite, case.scale = bad, case.is_finite.logical_not(), case.scale.fill_(scale)
        true = expected(case.run(ops), 7.0, 0.0, 513, has_gradient=False)
        rounding = 2.0 ** {torch.float32: -22, torch.bfloat16: -8, torch.float16: -11}[weight_dtype]
        assert ((case.live.cpu().double() - true).abs() <= rounding * (true.abs() + 0.1)).all()


def check_distance_that_is_not_finite(ops, weight_dtype, grad_dtype, device="cpu"):
    """Checks that a live weight which is not finite leaves no trace in the next prediction, whatever is kept."""
    rounding = 2.0 ** {torch.float32: -22, torch.bfloat16: -8, torch.float16: -11}[weight_dtype]
    for kept in (0.0, 1.0):
        case = Case(513, 2, weight_dtype, grad_dtype, kept=kept, device=device)
        case.live[3], case.live[300], case.live[1000] = math.nan, math.inf, -math.inf
        true = expected(case.run(ops), 7.0, 0.37, 513, kept=kept)
        assert ((case.live.cpu().double() - true).abs() <= rounding * (true.abs() + 0.1)).all()


def check_plain_path(ops, weight_dtype, grad_dtype, device="cpu"):
    """Checks for the bits of the plain path, which has the same arithmetic in the same order."""
    for shard_numel in SHARDS:
        fast = Case(shard_numel, 3, weight_dtype, grad_dtype, device=device)
        slow = Case(shard_numel, 3, weight_dtype, grad_dtype, device=device)
        fast.run(ops)
        slow.run(plain)
        assert same_bits(fast.live, slow.live) and same_bits(fast.before, slow.before)


def opcheck_arguments(device="cpu"):
    """Returns each operator with arguments for torch.library.opcheck."""
    case = Case(300, 2, torch.bfloat16, torch.float32, device=device)
    ops = torch.ops.deepspeed_acco
    squares, roots = torch.rand(300, device=device), torch.empty(2, device=device)
    numbers = (HYPER.lr, HYPER.beta1, HYPER.beta2)
    operands = (case.newest, case.before, case.grad, case.roots, case.step, *numbers, 0.4, case.scale, case.is_finite)
    return [
        (ops.block_roots.default, (squares, case.step, HYPER.beta2, HYPER.eps, roots)),
        (ops.predict_locally.default, (*operands, case.live, 300)),
    ]
