# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Carries out the rounds that algorithm/schedules.py decides, in the right order on a lane, and shows the true weights.

It knows nothing of DeepSpeed. The caller says when a phase or a window ends, and never while a graph is outstanding.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..algorithm.schedules import COMMIT, Place, Round
from ..optim.adamw import AdamWHyper, AdamWShard
from ..optim.huge_pages import use_huge_pages
from .buffers import FlatBuffers
from .clock import HostValue
from .communicator import Communicator
from .gathering import Gathering
from .lanes import InlineLane
from .looks import Stand, looks_of
from .outcomes import OutcomeLog
from .round import RoundOutcome, RoundWork
from .round_inputs import RoundInputs
from .states import Look, ResumeState, RoundState
from .written import Fingerprint

_KINDS = 65_537  # numbers of rounds are so far apart; a digest fits between, and sums over ranks stay exact in float64


class RoundDriver:
    """Drives one rank's round through its states, and exchanges the true weights with the live ones for a look.

    Weights that somebody else writes into the live ones, an average swapped in for an evaluation, say, are what every
    look shows until training goes on. Restored, they change nothing; not restored, training goes on at them until a
    round's weights are installed: at the window's end, which waits for its COMMIT, where a full copy was overwritten.

    Args:
        fingerprint: of the live weights. repeated: see RoundWork.

    Attributes:
        outcomes: what the finished rounds told.
        has_met_writing: somebody else wrote the weights of a look and did not restore them.
        weights_version: changes whenever the live weights do; for the guard against a changed forward.
        measures_estimate: whether the COMMITs behind computation measure how far it stands from what they make. The
            same on all ranks, since it takes a collective.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        shards: list[AdamWShard],
        comm: Communicator,
        lane: InlineLane,
        fingerprint: Fingerprint,
        repeated: Sequence[Sequence[slice]] = (),
    ):
        self.outcomes = OutcomeLog()
        self.has_met_writing = False
        self.weights_version = 0
        self.measures_estimate = False
        self._buffers = buffers
        self._shards = shards
        self._comm = comm
        self._lane = lane
        self._fingerprint = fingerprint
        self._work = RoundWork(buffers, shards, comm, repeated)
        self._gathering = Gathering(buffers, shards, comm, lane)
        self.looks = looks_of(buffers, self._gathering, self._work.prediction)
        self._state = RoundState.IDLE
        self._round: Round | None = None  # None: idle
        self._look: Look | None = None  # None: nobody looks
        self._is_overwritten = False  # the only full copy of the newest true weights, by somebody else
        self._rounds_started = 0
        self._in_step = self.outcomes.reader()
        self._versions = itertools.count(1)

    def take_state(self, hyper: tuple[AdamWHyper, ...], is_loaded: bool) -> None:
        """Prepares for the shards' state as it is now: fresh, or loaded, by every rank."""
        for shard in self._shards:
            use_huge_pages((shard.master, shard.exp_avg, shard.exp_avg_sq))
        use_huge_pages(self._buffers.tensors())
        prediction = self._work.prediction
        (prediction.renew_roots if is_loaded else prediction.fill_roots)(hyper)

    # ---- boundaries

    def advance(self, following: Round, inputs: RoundInputs, *, clears: bool, blocks: bool) -> None:
        """Crosses a boundary: finishes the running round, installs its weights, packs the gradients, starts the next.

        Args:
            clears: the gradients are zeroed after they were packed (the window ends).
            blocks: the following round is finished and installed before this returns.
        """
        self.hide_true()
        are_written = self._fingerprint.difference() if self._buffers.held else None
        measures = self.measures_estimate and following.writes_state and not blocks
        if self._is_overwritten and clears:
            blocks, self._is_overwritten = True, False
            self.finish()
            self._round = None
        if following.predicts_locally and not blocks:
            self.finish()
            has_newest = self._round is not None
            if not has_newest and self.are_written:
                self._work.prediction.forgets_step = True
            self._work.prediction.install(inputs, has_newest)
            self._note_weights()
        else:
            self._install_arrived()
        if are_written is not None:
            self._work.are_written.copy_(are_written)
        self._work.pack(following, inputs.pre_scale, clears=clears)
        self._round, self._state = following, RoundState.IN_FLIGHT
        self._rounds_started += 1
        # Ranks that are in step have the same number: of the round, of its kind and of what it computes with.
        self._comm.note_round(f"{following.name} of window {inputs.window}", self.is_round_finished)
        used = repr((following.name, inputs.window, inputs.hyper, inputs.clip_grad))
        number = _KINDS * self._rounds_started + zlib.crc32(used.encode()) % _KINDS
        self._lane.start(
            lambda: self._work.run(following, inputs, number, measures), name=f"{following.name} {inputs.window}"
        )
        if blocks:
            assert following.leaves_true_weights is Place.COMM, "only a COMMIT leaves weights to stand on"
            self._install_arrived()

    def is_round_finished(self) -> bool:
        """Tells whether :meth:`finish` would return, or raise, without waiting; never waits itself."""
        return self._state is not RoundState.IN_FLIGHT or self._lane.has_failed or self._lane.is_finished()

    def finish(self) -> None:
        """Waits for the running round, if any. Its weights stay in the communication buffer.

        Raises:
            RoundFailed: with the cause, when the round failed.
        """
        self._lane.raise_failure()
        if self._state is not RoundState.IN_FLIGHT:
            return self._lane.order()
        outcome = self._lane.finish()
        self._state = RoundState.ARRIVED
        self.outcomes.enter(outcome)
        are_in_step, are_untouched = self._in_step.take_whether_sound()
        if not are_in_step:
            raise self._lane.fail(
                RuntimeError(
                    "the ranks are in different rounds, because they ended a phase or window after different numbers "
                    "of micro-batches, or their learning rates or other hyper-parameters differ. Give every rank the "
                    "same number of micro-batches in every step, and the same scheduler"
                )
            )
        if not are_untouched:
            raise self._lane.fail(
                RuntimeError(
                    "the model's weights were written between two rounds on some rank and not restored. Where "
                    'commit_comm is not "full" a round adds changes to them, so that what was written would stay. '
                    "Restore an average that was swapped in before training goes on, load weights by "
                    'engine.load_checkpoint(), or set commit_comm to "full"'
                )
            )

    def drain(self, *, forgets_step: bool = False) -> None:
        """Finishes the running round and makes the live weights the newest true ones; an ESTIMATE is dropped.

        Args:
            forgets_step: somebody else writes the masters next.
        """
        if forgets_step:
            self._work.prediction.forgets_step = True
        self.hide_true()
        self.finish()
        place = self.true_weights_place
        if place is Place.SHARDS:
            self._gathering.for_look(self._gathering.into_live, self._gathering.own_masters())
            self.adopt_live()
        if place is not Place.COMM:
            self._round = None
        self._install_arrived()

    def _install_arrived(self):
        self.finish()
        if self._round is not None:
            self._work.install(self._round)
            self._note_weights()
        self._round, self._state = None, RoundState.IDLE

    def _note_weights(self, version: int | None = None):
        """Takes the live weights as they stand for this package's own: new ones, unless ``version`` is given."""
        self.weights_version = next(self._versions) if version is None else version
        self._fingerprint.take()

    # ---- looking at the true weights

    @property
    def true_weights_place(self) -> Place:
        """Returns where the newest true weights are in full, once the running round is finished."""
        return Place.LIVE if self._round is None else self._round.leaves_true_weights

    @property
    def is_showing_true(self) -> bool:
        """Tells whether the live weights are exchanged with the true ones for a look."""
        return self._look is not None

    def show_true(self) -> None:
        """Makes the live weights the newest true ones until :meth:`hide_true`; the trajectory stays as it is.

        Only a prediction has no full copy of them: there this is a collective, and every rank must look. Where somebody
        else wrote the live weights, they stay.
        """
        self._lane.raise_failure()
        place = self.true_weights_place
        if self._look is None:
            self._comm.whereabouts.note("behind a look at the true weights (evaluation, saving or state_dict)")
        if self._look is not None or place is Place.LIVE or self.are_written:
            return
        self.finish()
        self._look = self.looks.show(place, self.weights_version)
        self._note_weights()

    @property
    def are_written(self) -> bool:
        """Tells whether somebody else has written the live weights, and not restored them; waits for the device."""
        return self._fingerprint.differs()

    def hide_true(self) -> None:
        """Gives training exactly the weights and the pending round that it had before :meth:`show_true`; or, where
        somebody else wrote into the weights that were shown, leaves them."""
        look, self._look = self._look, None
        if look is None:
            return
        are_written = self.are_written
        self.has_met_writing |= are_written
        if self.looks.hide(look, are_written):
            self._note_weights(look.version)
        elif look.predictions is None:
            # What lies in the communication buffer is older: nothing is installed before the next COMMIT.
            self._round, self._state, self._is_overwritten = None, RoundState.IDLE, True

    def spread_masters(self) -> None:
        """Makes the live weights those of all ranks' masters, where each rank had its own; every rank must call it."""
        if self._buffers.before:
            self._gathering.into_live(self._gathering.own_masters())
            self.adopt_live()

    def adopt_live(self) -> None:
        """Takes the live weights for what all ranks hold, and for this package's own."""
        self._buffers.hold(self._buffers.live)
        self._note_weights()

    def bounded(self, work: str, *groups) -> AbstractContextManager[None]:
        """Bounds what ``work`` may wait for, as :meth:`Communicator.bounded`; raises where a round has failed."""
        self._lane.raise_failure()
        return self._comm.bounded(work, *groups)

    # ---- checkpoints

    def adopt_weights(self) -> None:
        """Takes the live weights, which were overwritten from outside, as the true ones; nothing is pending."""
        self.finish()
        self._round, self._state, self._look, self._is_overwritten = None, RoundState.IDLE, None, False
        self.outcomes.forget()
        self.adopt_live()

    def resume_state(self) -> ResumeState:
        """Returns what must be kept, besides master weights and AdamW state, so that training goes on bit for bit. An
        ESTIMATE is not: the window that it belongs to is not over."""
        self.finish()
        pending = None if self.true_weights_place is Place.LIVE else self._round
        return self.looks.resume_state(Stand(float(self.grad_norm), pending, self._look, self.are_written))

    def restore(self, state: ResumeState) -> None:
        """Does the inverse of :meth:`resume_state`, right after :meth:`adopt_weights`; every rank must call it."""
        assert self._state is RoundState.IDLE and self._look is None, "the live weights are the true ones"
        norm = HostValue(torch.tensor(state.grad_norm, device=self._comm.device))
        true = HostValue(torch.tensor(True, device=self._comm.device))
        self.outcomes.last_commit = RoundOutcome(COMMIT, norm, true, true, true)
        self._round = self.looks.restore(state)
        self._state = RoundState.IDLE if self._round is None else RoundState.ARRIVED
        self._note_weights()

    @property
    def grad_norm(self) -> Tensor:
        """Returns the global gradient norm of the newest finished COMMIT, fp32, 0-dim, in host memory where the host
        knows it; 0.0 before the first."""
        newest = self.outcomes.last_commit
        return torch.zeros(()) if newest is None else newest.grad_norm.tensor()

    def close(self) -> None:
        """Ends lane and process group; a round in flight is finished first, its failure is not raised."""
        self._lane.close()
        if not self._lane.is_own_thread:
            self._comm.destroy(is_broken=self._lane.has_failed)
