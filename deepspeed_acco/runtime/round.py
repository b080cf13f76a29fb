# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Carries out one round: what it takes, what it does to the buffers and the shards, and what it tells afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm.schedules import Round
from ..optim.adamw import AdamWShard
from ..optim.ops import (
    adamw_commit,
    adamw_commit_change,
    adamw_estimate,
    adamw_estimate_change,
    at_most_blocks,
    blocks_of_share,
    sum_of_squares,
    sums_of_error_and_step,
)
from .buffers import FlatBuffers
from .clock import HostValue
from .communicator import Communicator
from .local_prediction import LocalPrediction
from .round_inputs import Contribution, RoundInputs


@dataclass(frozen=True)
class ReportedCounts:
    """Holds what all ranks reported in one round of an adaptive window."""

    round: Round
    window: int
    reported: HostValue  # float64, 1-D: ranks without more data, then the micro-batches of each rank

    def ranks_without_data(self) -> int:
        """Returns how many ranks have no more data; waits until the device has passed the round."""
        self.reported.wait()
        return int(self.reported.value()[0])

    def micro_batches(self) -> list[int]:
        """Returns the micro-batches of each data-parallel rank, in their order; waits as :meth:`ranks_without_data`."""
        self.reported.wait()
        return [int(count) for count in self.reported.value()[1:]]


@dataclass(frozen=True)
class RoundOutcome:
    """Holds what a round tells afterwards."""

    round: Round
    grad_norm: HostValue  # global norm of the mean gradient before clipping, fp32, 0-dim
    is_finite: HostValue  # where False the step was skipped
    is_same_round: HostValue  # where False the ranks were in different rounds
    is_untouched: HostValue  # where False somebody else had written the live weights of a rank
    estimate_error: HostValue | None = None  # float64, NaN where there was no step; None: not measured
    counts: ReportedCounts | None = None  # None: not an adaptive window
    wire_bytes: int = 0  # payload that this rank sent, and as much received
    window: int | None = None  # number of the one whose gradients it took; None: of an earlier run, in a checkpoint


class RoundWork:
    """Does the three parts of a round: packing before it, the round itself on a lane, installing after it.

    Args:
        repeated: of this rank's shard of each group, the parts that a rank with another part of the model has as well,
            and counts in the norm.

    Attributes:
        are_written: float64, 0-dim; not 0 where somebody else has written the live weights, to which changes are added.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        shards: list[AdamWShard],
        comm: Communicator,
        repeated: Sequence[Sequence[slice]] = (),
    ):
        self._buffers = buffers
        self._shards = shards
        self._comm = comm
        self._repeated = repeated
        self.prediction = LocalPrediction(buffers, shards, comm)
        self._most_blocks = blocks_of_share(comm.sm_share, comm.device)
        # Allocated once, since it is written on training's stream and read on the lane's.
        self.are_written = torch.zeros((), dtype=torch.float64, device=comm.device)

    def pack(self, this: Round, pre_scale: float, *, clears: bool) -> None:
        """Copies the gradients out of A into X, times ``pre_scale``, and zeroes them if ``clears``."""
        self._buffers.pack(pre_scale, self._buffers.wire.of(this), clears=clears)

    def install(self, this: Round) -> None:
        """Writes to the live weights what the finished round brought: weights, or changes of those that are there."""
        buffers = self._buffers
        if not buffers.wire.of(this).change:
            buffers.install()
        elif not this.writes_state:
            buffers.add_estimate()
        else:
            if this.predicts_locally:
                buffers.take_true()
            buffers.add_commit(buffers.live)
        buffers.hold(buffers.live)

    @torch.no_grad()
    def run(self, this: Round, inputs: RoundInputs, number: int, measures: bool) -> RoundOutcome:
        """Reduces the gradients, updates this rank's shard, gathers the weights; on the lane's thread or stream.

        Args:
            number: the same on all ranks that are in step.
            measures: whether the estimate's error is measured, which takes a collective.
        """
        with at_most_blocks(self._most_blocks):
            return self._run(this, inputs, number, measures)

    def _run(self, this: Round, inputs: RoundInputs, number: int, measures: bool) -> RoundOutcome:
        buffers, comm, bits = self._buffers, self._comm, self._buffers.wire.of(this)
        sent_before = comm.sent_bytes
        grads = comm.reduce_scatter_sum(buffers.arenas, buffers.reduced, buffers.encoding(bits))
        squares = self._own_squares(grads)
        totals = torch.stack([squares, torch.full_like(squares, number), self.are_written])
        if inputs.contribution is not None:
            totals = torch.cat([totals, self._own_report(totals, inputs.contribution)])
        comm.all_reduce_sum(totals)
        scale = torch.full_like(squares, inputs.grad_scale)
        counts = None
        if inputs.contribution is not None:
            counts = ReportedCounts(this, inputs.window, HostValue(totals[3:]))
            scale *= inputs.contribution.nominal / totals[4:].sum()  # not finite, so skipped, where no rank computed
        norm = totals[0].sqrt() * scale
        is_same_round = totals[1] == number * comm.total_ranks
        is_finite = norm.isfinite() & is_same_round
        if inputs.clip_grad > 0:
            scale /= ((norm + 1e-6) / inputs.clip_grad).clamp(min=1.0)  # as DeepSpeed's unscale_and_clip_grads
        scale = scale.float()
        if bits.change:
            self._write_changes(this, inputs, grads, scale, is_finite)
        else:
            self._write_weights(this, inputs, self._kept(this, grads), scale, is_finite)
        roots = buffers.roots if this.writes_state else []
        if roots:
            self.prediction.write_own_roots(inputs.hyper)
        comm.all_gather([*buffers.gathered(bits), *roots])
        error = HostValue(self._measure_estimate(inputs, is_finite)) if measures else None
        sent = comm.sent_bytes - sent_before
        norm_later, is_finite_later = HostValue(norm.float()), HostValue(is_finite)
        is_same_later, is_untouched_later = HostValue(is_same_round), HostValue(totals[2] == 0)
        soundness = (is_finite_later, is_same_later, is_untouched_later)
        return RoundOutcome(this, norm_later, *soundness, error, counts, sent, inputs.window)

    def _own_squares(self, grads: list[Tensor]) -> Tensor:
        """Returns what this rank adds to the square of the norm, float64, 0-dim; not finite where any gradient is."""
        squares = sum_of_squares(grads)
        repeated = [grad[span] for grad, spans in zip(grads, self._repeated) for span in spans]
        return squares - sum_of_squares(repeated) if repeated else squares

    def _write_weights(self, this: Round, inputs: RoundInputs, grads: list[Tensor], scale: Tensor, is_finite: Tensor):
        """Updates this rank's shards, and writes their new weights to their place in X."""
        for shard, grad, hyper, out in zip(self._shards, grads, inputs.hyper, self._buffers.comm_shards):
            arguments = (shard, grad, hyper, scale, is_finite, out)
            if this.writes_state:
                adamw_commit(*arguments)
            if this.predicts or not this.writes_state:
                adamw_estimate(*arguments)

    def _kept(self, this: Round, grads: list[Tensor]) -> list[Tensor]:
        """Returns the sums where no weights are written over them before each was read for the last time. Sums in X lie
        where the new weights go: one update reads an element before it writes it, if both are of one size."""
        reads_twice = this.writes_state and this.predicts
        kept = []
        for grad, out, reduced in zip(grads, self._buffers.comm_shards, self._buffers.reduced):
            is_in_x = grad is not reduced
            kept.append(reduced.copy_(grad) if is_in_x and (reads_twice or grad.itemsize != out.itemsize) else grad)
        return kept

    def _write_changes(self, this: Round, inputs: RoundInputs, grads: list[Tensor], scale: Tensor, is_finite: Tensor):
        """Updates this rank's shards, and writes the change of their weights to its place in X: against what every rank
        holds; where COMMITs bring whole weights those are the rounded masters. The live weights are not read here:
        whoever evaluates an average may have it there meanwhile."""
        buffers, bits = self._buffers, self._buffers.wire.of(this).change
        for index, (shard, grad, hyper, records) in enumerate(
            zip(self._shards, grads, inputs.hyper, buffers.own_records(bits))
        ):
            held = buffers.held[index] if buffers.held else None
            arguments = (shard, grad, hyper, scale, is_finite)
            if this.writes_state:
                assert held is not None, "a COMMIT brings changes of something"
                adamw_commit_change(*arguments, held, records, bits)
            to_true = records.clone() if this.predicts else None
            if this.predicts or not this.writes_state:
                adamw_estimate_change(*arguments, buffers.live[index].dtype, records, bits, base=held)
            if to_true is not None:  # where training stands on if there is no step to predict
                records.copy_(torch.where(is_finite, records, to_true))

    def _own_report(self, like: Tensor, contribution: Contribution) -> Tensor:
        """Returns what this rank adds to the round's small all-reduce (:class:`ReportedCounts` before the sum). It is
        filled on the device, since a copy from the host would wait for it."""
        own = like.new_zeros(1 + self._comm.world_size)
        own[0].fill_(contribution.is_data_over)
        own[1 + self._comm.rank].fill_(contribution.micro_batches)
        return own

    def _measure_estimate(self, inputs: RoundInputs, is_finite: Tensor) -> Tensor:
        """Returns the error of where training stands now, behind the COMMIT's update: 0-dim, float64, NaN where none
        was. Of a model in parts, what several have counts for each."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._comm.device)
        # Nobody writes the live weights before this round is finished: looks and installations wait for that first.
        for shard, hyper, stands_at in zip(self._shards, inputs.hyper, self._buffers.live_shards):
            sums += sums_of_error_and_step(shard, hyper, stands_at)
        self._comm.all_reduce_sum(sums)
        error, step = sums.sqrt()
        return torch.where(is_finite, error / step, math.nan)
