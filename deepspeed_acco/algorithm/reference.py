# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Computes the same algorithm in one process, dense, blocking and in float64: the oracle of the distributed tests.

It shares no code with the fast path: the windows are written out as the paper puts them, and each schedule has its
lines in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# gradient(weights, rank, window, micro_batch) -> gradients: flat tensors, one per parameter group, as the loss delivers
# them (already divided by n where the engine divides). It may compute in any precision.
Gradient = Callable[[list[Tensor], int, int, int], list[Tensor]]


@dataclass
class ReferenceHyper:
    """Holds AdamW's hyper-parameters of one parameter group; a test sets ``lr`` between windows as a scheduler does."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2


@dataclass
class WindowReport:
    """Tells what one window did: the weights of its phases, and its COMMIT's norm before clipping."""

    phase_a_weights: list[Tensor]
    phase_b_weights: list[Tensor]
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class Moving:
    """Holds what ``local`` knows at a window's end: true weights and AdamW state without the gradients of the window,
    which still travel, and each rank's own ones."""

    newest: list[Tensor]
    before: list[Tensor]  # the true weights one step before
    exp_avg_sq: list[Tensor]
    step: int
    hyper: list[ReferenceHyper]
    own: list[list[Tensor]]  # by rank: the mean of its gradients, before clipping
    stood: list[list[Tensor]]  # by rank: the weights that it computed them at


@dataclass
class Reference:
    """Trains with every schedule of ACCO in one process.

    Args:
        theta: the initial true weights, flat, one tensor per parameter group (copied to float64).
        hyper: one per group. schedule, clip_grad: as in the configuration.
        see: rounds weights to what the model's forward uses (identity for fp32).
        accumulate: adds one micro-batch's gradient to a rank's sum, in the precision that the run accumulates in.
        send: rounds a rank's sum to what is communicated.
        ranks_per_host, pass_on: so many consecutive ranks share a host, and ``pass_on`` rounds the sum over a host to
            what goes to other hosts.
        most_kept: ``local``, how much of its distance from the true weights a rank keeps at most.
        stands_on_true_after_skip: fp16, where a skipped COMMIT is known before it is launched.
        estimate_bits: an ESTIMATE's gradients, of a host, and its change of the weights are quantized to so many bits;
            None: not.
        commit_bits: likewise the gradients of all other rounds, and the change of their weights; a rank's gradients are
            then quantized inside its host, too, with as many bits as a COMMIT's.
        loss_scale: what multiplies the delivered gradients (``send`` takes it away itself).
        shard_numels: where anything is quantized and with ``local``, elements of one rank's shard of each group:
            blocks restart there.

    Attributes (of those that are no arguments):
        shown: the true weights as all ranks have them; ``theta`` itself, unless changes of it are quantized.
    """

    theta: list[Tensor]
    hyper: list[ReferenceHyper]
    schedule: str
    world_size: int
    clip_grad: float = 0.0
    see: Callable[[Tensor], Tensor] = lambda weights: weights
    accumulate: Callable[[Tensor, Tensor], Tensor] = lambda total, gradient: total + gradient
    send: Callable[[Tensor], Tensor] = lambda gradient: gradient
    ranks_per_host: int = 1
    pass_on: Callable[[Tensor], Tensor] = lambda gradient: gradient
    most_kept: float = 1.0
    stands_on_true_after_skip: bool = False
    estimate_bits: int | None = None
    commit_bits: tuple[int, int] | None = None
    shard_numels: Sequence[int] = ()
    loss_scale: float = 1.0
    step: int = 0
    window: int = 0
    exp_avg: list[Tensor] = field(init=False)
    exp_avg_sq: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.theta = [tensor.detach().double().clone() for tensor in self.theta]
        self.exp_avg = [torch.zeros_like(tensor) for tensor in self.theta]
        self.exp_avg_sq = [torch.zeros_like(tensor) for tensor in self.theta]
        self.shown = self.theta
        self.estimate = self.theta  # acco: where the next phase A stands
        self.previous = self.theta  # dpu: the true weights one window ago
        self.prediction = self.theta  # wp: where this window stands
        self.next_prediction = self.theta  # wp: where the next one stands
        self.moving: Moving | None = None  # local: what each rank moves on by; None: it stands on the true weights

    def run_window(
        self,
        gradient: Gradient,
        n: int,
        a: int | Sequence[int],
        counts: int | Sequence[int] | None = None,
        *,
        runs_sync: bool = False,
    ) -> WindowReport:
        """Takes one optimizer step of ``counts`` micro-batches per rank (default n), the first ``a`` in phase A.

        Adaptive windows: ``counts`` and ``a`` are lists with one number for each rank; the gradients, divided by n as
        delivered, then become the mean over all micro-batches of all ranks.
        """
        is_adaptive = not (counts is None or isinstance(counts, int))
        if counts is None or isinstance(counts, int):
            counts = [n if counts is None else counts] * self.world_size
        counts_of = list(counts)
        in_a_of = [min(a, count) for count in counts_of] if isinstance(a, int) else list(a)
        lines = LINES["sync" if runs_sync else self.schedule]
        first = [self._seen(lines.phase_a(self, rank)) for rank in range(self.world_size)]
        second = first
        if lines.phase_b is not None:
            second = [self._seen(lines.phase_b(self, rank)) for rank in range(self.world_size)]
        is_short = not is_adaptive and counts_of == in_a_of

        totals, in_a = [], []
        for rank in range(self.world_size):
            total = sum_of_a = [torch.zeros_like(tensor) for tensor in self.theta]
            for micro_batch in range(counts_of[rank]):
                weights = first[rank] if micro_batch < in_a_of[rank] else second[rank]
                delivered = gradient(weights, rank, self.window, micro_batch)
                total = [self.accumulate(held, new) for held, new in zip(total, delivered)]
                if micro_batch + 1 == in_a_of[rank]:
                    sum_of_a = total
            in_a.append(sum_of_a)
            totals.append(total)
        over = sum(counts_of) / n if is_adaptive else self.world_size
        mean = [part / over for part in self._sum(totals, self.commit_bits and self.commit_bits[0])]
        mean_a = [part * (n / sum(in_a_of)) for part in self._sum(in_a, self.estimate_bits)]

        shares = [n / count if is_adaptive and count else 1.0 for count in counts_of]
        own = [[part.double() * (share / self.loss_scale) for part in total] for total, share in zip(totals, shares)]
        moving = Moving(
            self.shown,
            self.shown if self.moving is None else self.moving.newest,
            self.exp_avg_sq,
            self.step,
            [replace(hyper) for hyper in self.hyper],
            own,
            first,
        )
        estimated = self._adamw(mean_a, self.theta, self.exp_avg, self.exp_avg_sq, self.step)
        committed = self._adamw(mean, self.theta, self.exp_avg, self.exp_avg_sq, self.step)
        norm = _norm(mean)
        skipped = committed is None
        before = self.shown
        if not skipped:
            self.theta, self.exp_avg, self.exp_avg_sq = committed
            self.step += 1

        stands_on_true = lines.blocks or (lines.phase_b is not None and is_short)
        if skipped and self.stands_on_true_after_skip:
            self.shown, stands_on_true = before if self.commit_bits else self.theta, True
        elif stands_on_true:
            self.shown = self._changed(self.estimate if lines.phase_b is not None else before, self.theta)
        else:
            self.estimate, self.previous = self._installed(estimated, before), before
            predicted = self._adamw(mean, self.theta, self.exp_avg, self.exp_avg_sq, self.step)
            self.prediction = self.next_prediction
            self.next_prediction = self._changed(self.prediction, self.theta if predicted is None else predicted[0])
            self.shown = self._changed(lines.held(self), self.theta)
        self.moving = None if stands_on_true else moving
        if stands_on_true:
            self.estimate = self.previous = self.prediction = self.next_prediction = self.shown
        self.window += 1
        return WindowReport(first[0], second[0], norm, skipped)

    def _seen(self, weights: list[Tensor]) -> list[Tensor]:
        return [self.see(tensor) for tensor in weights]

    def moved_on(self, rank: int) -> list[Tensor]:
        """Returns where ``rank`` computes a window of ``local``: the newest true weights that it knows, moved on."""
        at = self.moving
        if at is None:
            return self.shown
        norm = _norm(at.own[rank])
        is_finite = bool(torch.isfinite(torch.tensor(norm)))
        clip = 1.0 / max(1.0, (norm + 1e-6) / self.clip_grad) if self.clip_grad > 0 and is_finite else 1.0
        smallest = torch.finfo(torch.float32).tiny
        results = []
        for group, h in enumerate(at.hyper):
            newest, before = (self.see(weights[group]).double() for weights in (at.newest, at.before))
            kept, added = 1 - h.beta1**at.step, 1 - h.beta1 ** (at.step + 1)
            distance = (at.stood[rank][group].double() - newest).nan_to_num(0.0, 0.0, 0.0)
            part = min(self.most_kept, 2 / self.world_size)
            moved = newest + h.beta1 * kept / added * (newest - before + part * distance)
            if is_finite:
                root = _roots(at.exp_avg_sq[group], self.shard_numels[group], 1 - h.beta2**at.step) + h.eps
                most = ((1 - h.beta2 ** (at.step + 1)) / (1 - h.beta2)) ** 0.5
                step = (clip * at.own[rank][group] / root.clamp(min=smallest)).clamp(-most, most)
                moved = moved - h.lr * (1 - h.beta1) / added * step
            results.append(moved)
        return results

    def _sum(self, of_ranks: list[list[Tensor]], bits: int | None) -> list[Tensor]:
        """Returns the sum over the ranks of what they send: over each host, then over the hosts."""
        inner = bits if self.ranks_per_host == 1 else (self.commit_bits[0] if bits and self.commit_bits else None)
        if inner is not None:  # quantized as they are
            sent = [[g / self.loss_scale for g in self._quantized(total, inner, of_roots=True)] for total in of_ranks]
        else:
            sent = [[self.send(tensor).double() for tensor in total] for total in of_ranks]
        if self.ranks_per_host == 1:
            return [sum(parts) for parts in zip(*sent)]
        of_hosts = []
        for first in range(0, len(sent), self.ranks_per_host):
            host = [sum(parts) for parts in zip(*sent[first : first + self.ranks_per_host])]
            host = (
                [self.pass_on(tensor).double() for tensor in host]
                if bits is None
                else self._quantized(host, bits, of_roots=True)
            )
            of_hosts.append(host)
        return [sum(parts) for parts in zip(*of_hosts)]

    def _quantized(self, values: list[Tensor], bits: int, *, of_roots: bool = False) -> list[Tensor]:
        return [
            quantized(tensor.double(), bits, shard_numel, of_roots=of_roots)
            for tensor, shard_numel in zip(values, self.shard_numels, strict=True)
        ]

    def _installed(self, estimated, before: list[Tensor]) -> list[Tensor]:
        """Returns where the next phase A stands: ``before`` where the ESTIMATE was skipped."""
        if estimated is None:
            return before
        if self.estimate_bits is None:
            return estimated[0]
        moved = self._moved(before, estimated[0], self.estimate_bits)
        return moved if all(tensor.isfinite().all() for tensor in moved) else before

    def _changed(self, held: list[Tensor], to: list[Tensor]) -> list[Tensor]:
        """Returns what ranks that hold ``held`` have after a COMMIT brought them ``to``."""
        return to if self.commit_bits is None else self._moved(held, to, self.commit_bits[1])

    def _moved(self, held: list[Tensor], to: list[Tensor], bits: int) -> list[Tensor]:
        live = [self.see(tensor).double() for tensor in held]
        change = self._quantized([target - stands_at for target, stands_at in zip(to, live)], bits)
        return [self.see(stands_at + moved).double() for stands_at, moved in zip(live, change)]

    def _adamw(self, gradients: Sequence[Tensor], theta, exp_avg, exp_avg_sq, step):
        """Returns copies (theta, exp_avg, exp_avg_sq) after one AdamW step; None for a gradient that is not finite."""
        norm = _norm(gradients)
        if not torch.isfinite(torch.tensor(norm)):
            return None
        scale = 1.0
        if self.clip_grad > 0:
            scale = 1.0 / max(1.0, (norm + 1e-6) / self.clip_grad)
        results: tuple[list[Tensor], ...] = ([], [], [])
        for gradient, p, m, v, hyper in zip(gradients, theta, exp_avg, exp_avg_sq, self.hyper):
            g = gradient * scale
            m = hyper.beta1 * m + (1 - hyper.beta1) * g
            v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
            m_hat = m / (1 - hyper.beta1 ** (step + 1))
            v_hat = v / (1 - hyper.beta2 ** (step + 1))
            p = p - hyper.lr * hyper.weight_decay * p - hyper.lr * m_hat / (v_hat.sqrt() + hyper.eps)
            for result, tensor in zip(results, (p, m, v)):
                result.append(tensor)
        return results


Weights = Callable[[Reference, int], list[Tensor]]


@dataclass(frozen=True)
class Lines:
    """Says at which weights a schedule computes on a rank: those of phase A, and of phase B where there is one.
    ``blocks``: the next window stands on the weights that this one's COMMIT makes. ``held``: to what its change is
    added otherwise: the true weights before it, or where all ranks stand meanwhile."""

    phase_a: Weights
    phase_b: Weights | None = None
    blocks: bool = False
    held: Callable[[Reference], list[Tensor]] = lambda at: at.previous


LINES = {
    "acco": Lines(lambda at, rank: at.estimate, lambda at, rank: at.shown, held=lambda at: at.estimate),
    "local": Lines(lambda at, rank: at.moved_on(rank)),
    "wp": Lines(lambda at, rank: at.prediction, held=lambda at: at.theta),
    "dpu": Lines(lambda at, rank: at.previous),
    "sync": Lines(lambda at, rank: at.shown, blocks=True),
}


def quantized(values: Tensor, bits: int, shard_numel: int, *, of_roots: bool = False) -> Tensor:
    """Returns what float64 ``values`` are after they were sent in ``bits`` bits: in blocks of 256 that restart at every
    shard, multiples of the block's scale, which is its largest absolute value over L = 2^(bits-1) - 1, rounded up to 8
    significant bits. A block with a value that is not finite becomes NaN.

    Args:
        of_roots: the scale is over L squared instead, and a value is the square of a level, times it.
    """
    power = 2 if of_roots else 1
    largest_level = 2 ** (bits - 1) - 1
    parts = []
    for shard in values.split(shard_numel):
        blocks = torch.nn.functional.pad(shard, (0, -shard.numel() % 256)).view(-1, 256)
        fraction, exponent = torch.frexp(blocks.abs().amax(1, keepdim=True) / largest_level**power)
        scale = torch.ldexp((fraction * 256).ceil() / 256, exponent)
        levels = torch.where(scale > 0, (blocks.abs() / scale) ** (1 / power), 0.0).round()
        parts.append(
            torch.where(scale.isfinite(), levels**power * blocks.sign() * scale, torch.nan).flatten()[: shard.numel()]
        )
    return torch.cat(parts)


def _roots(squares: Tensor, shard_numel: int, correction: float) -> Tensor:
    """Returns for each element the root of the corrected mean of its block of 256, in which the zeros count that fill
    the last shard; 0 before the first step."""
    filled = torch.cat([squares, squares.new_zeros(-squares.numel() % shard_numel)])
    means = [block.mean().expand_as(block) for shard in filled.split(shard_numel) for block in shard.split(256)]
    return (torch.cat(means)[: squares.numel()] / correction).sqrt() if correction else torch.zeros_like(squares)


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([(gradient.double() ** 2).sum() for gradient in gradients]).sum().sqrt())
