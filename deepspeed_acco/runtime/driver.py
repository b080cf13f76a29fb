# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Carries out the rounds that rounds.py decides: buffers, collectives and updates, in the right order on a lane.

Knows nothing of DeepSpeed. The caller says when a phase or a window ends, and never while a graph is outstanding.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm.schedules import COMMIT, ESTIMATE, PREDICT, Place, Round
from ..optim.adamw import AdamWHyper, sums_of_error_and_step
from ..optim.huge_pages import use_huge_pages
from ..optim.ops import (
    AdamWShard,
    adamw_commit,
    adamw_estimate,
    adamw_estimate_change,
    dequantize_sum,
    sum_of_squares,
)
from ..optim.quantization import BLOCK, RECORDS_OF_A_PIECE, message_bytes, record_bytes
from .buffers import FlatBuffers
from .clock import HostValue
from .communicator import Communicator
from .lanes import InlineLane


@dataclass(frozen=True)
class RoundInputs:
    """What a round needs from the moment it was launched: later changes (LR scheduler, loss scale) do not reach it."""

    hyper: tuple[AdamWHyper, ...]  # one per parameter group
    pre_scale: float  # multiplies the gradients before they are summed over the ranks
    grad_scale: float  # multiplies the sum: together they make the mean gradient without loss scale
    clip_grad: float  # largest global norm; 0: no clipping
    window: int  # number of the window whose gradients it takes
    share: AdaptiveShare | None = None  # None: every rank sends as many micro-batches as every other


@dataclass(frozen=True)
class AdaptiveShare:
    """What one rank tells the others in a round of an adaptive window."""

    micro_batches: int  # whose gradients it sends
    nominal: int  # micro-batches of all ranks for which ``grad_scale`` makes the mean
    is_data_over: bool  # it has no micro-batch after these


@dataclass(frozen=True)
class ToldCounts:
    """What all ranks told in one round of an adaptive window."""

    round: Round
    window: int
    told: HostValue  # float64, 1-D: ranks without more data, then the micro-batches of each rank

    def ranks_without_data(self) -> int:
        """Waits on CUDA until the device has passed the round, as :meth:`micro_batches`."""
        self.told.wait()
        return int(self.told.value()[0])

    def micro_batches(self) -> list[int]:
        """Of each data-parallel rank, in their order."""
        self.told.wait()
        return [int(count) for count in self.told.value()[1:]]


@dataclass(frozen=True)
class RoundOutcome:
    """What a round tells afterwards; tensors on the parameters' device."""

    grad_norm: Tensor  # global norm of the mean gradient before clipping, fp32, 0-dim
    is_finite: HostValue  # where False the step was skipped
    is_same_round: HostValue  # where False the ranks were in different rounds
    estimate_error: HostValue | None = None  # float64, NaN where there was no step; None: not measured
    counts: ToldCounts | None = None  # None: not an adaptive window
    wire_bytes: int = 0  # payload that this rank sent, and as much received


@dataclass(frozen=True)
class Standing:
    """Where training stands between two rounds, beyond the true weights: this rank's shards, 1-D in the weights' dtype,
    one per parameter group."""

    live: list[Tensor]  # of the weights that training computes at; empty where they are the true ones
    predictions: list[Tensor]  # of a finished prediction that is not installed yet; empty where there is none
    grad_norm: float  # of the newest COMMIT


class RoundDriver:
    """The buffers of one rank and the round that is in flight.

    Attributes:
        running: the Round in flight or waiting to be installed, None when the live weights are the newest true ones.
        weights_version: changes whenever the live weights do; for the guard against a changed forward.
        last_commit: the newest finished COMMIT, or None.
        last_counts: what the newest finished round of an adaptive window told, or None.
        wire_bytes: payload that this rank sent in the finished rounds, and as much received.
        measures_estimate: whether the COMMITs behind computation measure how far it stands from what they make. The
            same on all ranks, since it takes a collective.
    """

    def __init__(self, buffers: FlatBuffers, shards: list[AdamWShard], comm: Communicator, lane: InlineLane):
        self.buffers = buffers
        self.shards = shards
        self.comm = comm
        self.lane = lane
        self.running: Round | None = None
        self.weights_version = 0
        self._versions = itertools.count(1)
        self._hidden_version = 0
        self.last_commit: RoundOutcome | None = None
        self.measures_estimate = False
        self.wire_bytes = 0
        self._is_finished = True
        self._unreported: list[RoundOutcome] = []
        self._estimate_errors: list[HostValue] = []
        self.last_counts: ToldCounts | None = None
        self._untaken_counts: list[ToldCounts] = []
        self._unchecked: list[RoundOutcome] = []
        self._rounds_started = 0
        self._is_showing_true = False
        self._kept_predictions: list[Tensor] | None = None
        self.lay_out_pages()

    def lay_out_pages(self) -> None:
        """Large pages for everything that a round walks through; again whenever a tensor of the shards was replaced."""
        for shard in self.shards:
            use_huge_pages((shard.master, shard.exp_avg, shard.exp_avg_sq))
        use_huge_pages(self.buffers.tensors())

    # ---- boundaries

    def turn(self, following: Round, inputs: RoundInputs, *, clears: bool, blocks: bool) -> None:
        """A boundary: finish the running round, install its weights, pack the gradients, start the next round.

        Args:
            clears: the gradients are zeroed after they were packed (the window ends).
            blocks: the following round is finished and installed before this returns.
        """
        self.hide_true()
        self._install_running()
        if self._sends_records(following):
            assert not clears, "the whole window's gradients are still needed"
            self.buffers.pack_records(inputs.pre_scale)
        else:
            self.buffers.pack(inputs.pre_scale, clears=clears)
        self.running, self._is_finished = following, False
        self._rounds_started += 1
        # Ranks that are in step have the same number: of the round and of its kind.
        number = 4 * self._rounds_started + (ESTIMATE, COMMIT, PREDICT).index(following)
        measures = self.measures_estimate and following.writes_state and not blocks
        self.lane.start(
            lambda: self._run(following, inputs, number, measures), name=f"{following.name} {inputs.window}"
        )
        if blocks:
            assert following.leaves_true_weights is Place.COMM, "only a COMMIT leaves weights to stand on"
            self._install_running()

    def settle(self) -> None:
        """Finishes the running round and makes the live weights the newest true ones; an ESTIMATE is dropped."""
        self.hide_true()
        self.finish()
        if self.running is not None:
            if self.running.leaves_true_weights is Place.SHARDS:
                self._gather_masters()
            if self.running.leaves_true_weights is not Place.LIVE:
                self._install()
        self.running = None

    def adopt_live(self) -> None:
        """The live weights were overwritten from outside (a checkpoint): they are the true ones, nothing is pending."""
        self.finish()
        self.running = None
        self._is_showing_true, self._kept_predictions = False, None
        self.last_commit = None
        self._unreported.clear()
        self._estimate_errors.clear()
        self._untaken_counts.clear()
        self.weights_version = next(self._versions)

    def standing(self) -> Standing:
        """What must be kept, besides master weights and AdamW state, so that training goes on bit for bit. An ESTIMATE
        is not: the window that it belongs to is not over."""
        self.finish()
        norm = float(self.norm_or_zero())
        place = self.running.leaves_true_weights if self.running is not None else Place.LIVE
        if place is Place.LIVE:
            return Standing([], [], norm)
        live, pending = self.buffers.live_shards, self.buffers.comm_shards
        if self._is_showing_true:  # exchanged
            live, pending = pending, self._kept_predictions or []
        predictions = pending if place is Place.SHARDS else []
        return Standing([shard.clone() for shard in live], [shard.clone() for shard in predictions], norm)

    def stand_on(self, standing: Standing) -> None:
        """The inverse of :meth:`standing`, right after :meth:`adopt_live`; every rank must call it."""
        assert self.running is None and not self._is_showing_true, "the live weights are the true ones"
        device = self.comm.device
        norm, true = torch.tensor(standing.grad_norm, device=device), torch.tensor(True, device=device)
        self.last_commit = RoundOutcome(norm, HostValue(true), HostValue(true))
        if not standing.live:
            return
        self._gather(standing.live)
        self.buffers.exchange()
        self.weights_version = next(self._versions)
        self.running, self._is_finished = COMMIT, True
        if standing.predictions:
            self._gather(standing.predictions)
            self.running = PREDICT

    def _gather(self, shards):
        for target, shard in zip(self.buffers.comm_shards, shards):
            target.copy_(shard)
        self.comm.all_gather(self.buffers.comm_weights)

    def is_round_finished(self) -> bool:
        """Whether :meth:`finish` would return, or raise, without waiting; never waits itself."""
        return self.running is None or self._is_finished or self.lane.has_failed or self.lane.is_finished()

    def finish(self) -> None:
        """Waits for the running round, if any. Its weights stay in the communication buffer.

        Raises:
            RoundFailed: with the cause, when the round failed.
        """
        self.lane.raise_failure()
        if self._is_finished or self.running is None:
            return
        outcome = self.lane.finish()
        self._is_finished = True
        self._unchecked.append(outcome)
        self.wire_bytes += outcome.wire_bytes
        self._check_same_round()
        if outcome.counts is not None:
            self.last_counts = outcome.counts
            self._untaken_counts.append(outcome.counts)
        if self.running.writes_state:
            self.last_commit = outcome
            self._unreported.append(outcome)
            if outcome.estimate_error is not None:
                self._estimate_errors.append(outcome.estimate_error)

    def take_skipped(self, *, waits: bool = False) -> int:
        """How many finished COMMITs are newly known to have been skipped for a non-finite gradient. On CUDA the host
        learns of one when the device has passed it; only ``waits`` makes this wait for that."""
        for outcome in self._unreported if waits else ():
            outcome.is_finite.wait()
        known = list(itertools.takewhile(lambda outcome: outcome.is_finite.is_known(), self._unreported))
        self._unreported = self._unreported[len(known) :]
        return sum(1 for outcome in known if not outcome.is_finite.value())

    def take_estimate_errors(self) -> list[float]:
        """The errors, oldest first, of the finished COMMITs of which they are newly known: |where training stood
        meanwhile - the new true weights| / |step|, L2 norms over all parameters. Skipped COMMITs and steps of length 0
        have none. Never waits, as :meth:`take_skipped`."""
        known = list(itertools.takewhile(HostValue.is_known, self._estimate_errors))
        self._estimate_errors = self._estimate_errors[len(known) :]
        return [error for error in (value.value() for value in known) if math.isfinite(error)]

    def take_counts(self) -> list[ToldCounts]:
        """What the adaptive windows' rounds told that finished since the last call, oldest first."""
        taken, self._untaken_counts = self._untaken_counts, []
        return taken

    def _check_same_round(self):
        while self._unchecked and self._unchecked[0].is_same_round.is_known():
            if not self._unchecked.pop(0).is_same_round.value():
                cause = RuntimeError(
                    "the ranks are in different rounds, because they ended a phase or window after different numbers "
                    "of micro-batches. Give every rank the same number of micro-batches in every step"
                )
                raise self.lane.fail(cause)

    def _install_running(self):
        self.finish()
        if self.running is not None:
            self._install()
        self.running = None

    def _install(self):
        if self.running is not None and self._sends_records(self.running):
            self.buffers.install_change()
        else:
            self.buffers.install()
        self.weights_version = next(self._versions)

    # ---- looking at the true weights

    @property
    def is_showing_true(self) -> bool:
        """Whether the live weights are exchanged with the true ones for a look."""
        return self._is_showing_true

    def show_true(self) -> None:
        """Makes the live weights the newest true ones until :meth:`hide_true`; the trajectory stays as it is.

        Only a prediction has no full copy of them: there this is a collective, and every rank must look.
        """
        self.lane.raise_failure()
        place = self.running.leaves_true_weights if self.running is not None else Place.LIVE
        if self._is_showing_true or place is Place.LIVE:
            return
        self.finish()
        if place is Place.SHARDS:
            self._kept_predictions = [shard.clone() for shard in self.buffers.comm_shards]
            self._gather_masters()
        self.buffers.exchange()
        self._hidden_version, self.weights_version = self.weights_version, next(self._versions)
        self._is_showing_true = True

    def hide_true(self) -> None:
        """Gives training exactly the weights and the pending round that it had before :meth:`show_true`."""
        if not self._is_showing_true:
            return
        self._is_showing_true = False
        self.buffers.exchange()
        self.weights_version = self._hidden_version
        if self._kept_predictions is not None:
            for shard, kept in zip(self.buffers.comm_shards, self._kept_predictions):
                shard.copy_(kept)
            self._kept_predictions = None
            self._gather_for_look()

    def _gather_masters(self):
        for shard, target in zip(self.shards, self.buffers.comm_shards):
            target.copy_(shard.master.detach())
        self._gather_for_look()

    def _gather_for_look(self):
        try:
            self.comm.all_gather(self.buffers.comm_weights)
        except RuntimeError as cause:
            raise self.lane.fail(
                RuntimeError(
                    'with the schedule "wp" the true weights are gathered from all ranks, and some rank did not join '
                    f"within comm_timeout_s = {self.comm.timeout_s:g} s. Evaluate, save and read state_dict() on every "
                    "rank, not on rank 0 alone"
                )
            ) from cause

    def _sends_records(self, this: Round) -> bool:
        """Only what is thrown away after half a step may lose bits: its errors do not add up."""
        return self.buffers.estimate_bits > 0 and not this.writes_state

    # ---- the round itself, on the lane's thread or stream

    @torch.no_grad()
    def _run(self, this: Round, inputs: RoundInputs, number: int, measures: bool) -> RoundOutcome:
        buffers, sent_before = self.buffers, self.comm.sent_bytes
        sends_records = self._sends_records(this)
        if sends_records:
            self._reduce_records()
        else:
            self.comm.reduce_scatter_sum(buffers.comm_grads, buffers.reduced)
        squares = sum_of_squares(buffers.reduced)
        totals = torch.stack([squares, torch.full_like(squares, number)])
        if inputs.share is not None:
            totals = torch.cat([totals, self._own_share(totals, inputs.share)])
        self.comm.all_reduce_sum(totals)
        scale = torch.full_like(squares, inputs.grad_scale)
        counts = None
        if inputs.share is not None:
            counts = ToldCounts(this, inputs.window, HostValue(totals[2:]))
            scale *= inputs.share.nominal / totals[3:].sum()  # not finite, so skipped, where no rank computed anything
        norm = totals[0].sqrt() * scale
        is_same_round = totals[1] == number * self.comm.world_size
        is_finite = norm.isfinite() & is_same_round
        if inputs.clip_grad > 0:
            scale /= ((norm + 1e-6) / inputs.clip_grad).clamp(min=1.0)  # as DeepSpeed's unscale_and_clip_grads
        scale = scale.float()
        if sends_records:
            self._estimate_records(inputs, scale, is_finite)
        for shard, grad, hyper, out in zip(self.shards, buffers.reduced, inputs.hyper, buffers.comm_shards):
            arguments = (shard, grad, hyper, scale, is_finite, out)
            if this.writes_state:
                adamw_commit(*arguments)
            if this.predicts or not (this.writes_state or sends_records):
                adamw_estimate(*arguments)
        self.comm.all_gather(buffers.comm_records if sends_records else buffers.comm_weights)
        error = HostValue(self._measure_estimate(inputs, is_finite)) if measures else None
        sent = self.comm.sent_bytes - sent_before
        return RoundOutcome(norm.float(), HostValue(is_finite), HostValue(is_same_round), error, counts, sent)

    def _reduce_records(self):
        """The reduce-scatter of the gradients that lie in X as records: the sum is taken in fp32."""
        reduced, bits = self.buffers.reduced, self.buffers.estimate_bits
        record = record_bytes(bits)

        def add_up(group: int, start: int, parts: list[Tensor]) -> None:
            first = start // record * BLOCK
            values = min(-(-parts[0].numel() // record) * BLOCK, reduced[group].numel() - first)
            if values > 0:  # the last piece may be the message's padding alone
                messages = [part[: message_bytes(values, bits)] for part in parts]
                dequantize_sum(messages, reduced[group].narrow(0, first, values), bits)

        self.comm.all_to_all(self.buffers.comm_records, RECORDS_OF_A_PIECE * record, add_up)

    def _estimate_records(self, inputs: RoundInputs, scale: Tensor, is_finite: Tensor):
        """The change of this rank's weights to its place in X. The live weights are the true ones now, and nobody
        writes them before this round is installed."""
        buffers = self.buffers
        for operands in zip(self.shards, buffers.reduced, inputs.hyper, buffers.live_shards, buffers.own_records()):
            shard, grad, hyper, live, records = operands
            adamw_estimate_change(shard, grad, hyper, scale, is_finite, live, records, buffers.estimate_bits)

    def _own_share(self, like: Tensor, share: AdaptiveShare) -> Tensor:
        """What this rank adds to the round's small all-reduce (:class:`ToldCounts` before the sum). Filled on the
        device, since a copy from the host would wait for it."""
        own = like.new_zeros(1 + self.comm.world_size)
        own[0].fill_(share.is_data_over)
        own[1 + self.comm.rank].fill_(share.micro_batches)
        return own

    def _measure_estimate(self, inputs: RoundInputs, is_finite: Tensor) -> Tensor:
        """The error of where training stands now, behind the COMMIT's update: 0-dim, float64, NaN where none was."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.comm.device)
        # Nobody writes the live weights before this round is finished: looks and installations wait for that first.
        for shard, hyper, stands_at in zip(self.shards, inputs.hyper, self.buffers.live_shards):
            sums += sums_of_error_and_step(shard, hyper, stands_at)
        self.comm.all_reduce_sum(sums)
        error, step = sums.sqrt()
        return torch.where(is_finite, error / step, math.nan)

    # ---- the end

    def close(self) -> None:
        """Ends lane and process group; a round in flight is finished first, its failure is not raised."""
        self.lane.close()
        if not self.lane.is_own_thread:
            self.comm.destroy()

    def norm_or_zero(self) -> Tensor:
        """Global gradient norm of the newest finished COMMIT, fp32, 0-dim; 0.0 before the first."""
        if self.last_commit is None:
            return torch.zeros((), device=self.comm.device)
        return self.last_commit.grad_norm


def describe_bytes(count: int) -> str:
    """``12.3 MB``: decimal units."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count) // 3), 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"
