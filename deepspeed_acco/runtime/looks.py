# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Shows the true weights in P and gives training back what it had, bit for bit: in two ways, by what a COMMIT brings.

Where it brings whole weights, X has the true ones, and P and X change places. Where it brings changes, they are added
to P, of which a copy waits in host memory meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ..algorithm.schedules import COMMIT, COMMIT_FORESEEN, PREDICT, Place, Round
from .buffers import FlatBuffers
from .gathering import Gathering
from .local_prediction import LocalPrediction
from .states import Look, ResumeState


@dataclass(frozen=True)
class Stand:
    """Says where training stands between two rounds."""

    grad_norm: float  # of the newest COMMIT
    pending: Round | None  # whose weights are not installed; None: P has the true ones
    look: Look | None  # None: nobody looks
    are_written: bool  # P, by somebody else: what training stood on is not there


class Looks(Protocol):
    """Shows and hides the true weights, and says and takes over what a checkpoint must have beside them."""

    def show(self, place: Place, version: int) -> Look:
        """Makes P the newest true weights, which are not in P.

        Args:
            version: of the weights that training has.
        """
        ...

    def hide(self, look: Look, are_written: bool) -> bool:
        """Gives training what it had, and returns True; or leaves in P what somebody else wrote there meanwhile, and
        returns False."""
        ...

    def true_copy(self, group: int, start: int, numel: int) -> Tensor:
        """Returns a copy of elements of the true weights, which are not in P, by their places in the flat group."""
        ...

    def resume_state(self, at: Stand) -> ResumeState:
        """Returns what must be kept so that training goes on from there bit for bit."""
        ...

    def restore(self, state: ResumeState) -> Round | None:
        """Does the inverse while P has the true weights, rounded from the masters; every rank must call it. Returns
        what is pending again."""
        ...


class LooksByExchange:
    """Shows the true weights where X has them, or can be filled with them."""

    def __init__(self, buffers: FlatBuffers, gathering: Gathering, prediction: LocalPrediction):
        self._buffers = buffers
        self._gathering = gathering
        self._prediction = prediction

    def show(self, place: Place, version: int) -> Look:
        """Shows them, as :meth:`Looks.show`."""
        predictions = None
        if place is Place.SHARDS:
            predictions = [shard.clone() for shard in self._buffers.comm_shards]
            self._gathering.for_look(self._gathering.into_comm, self._gathering.own_masters())
        self._buffers.exchange()
        return Look(version, predictions)

    def hide(self, look: Look, are_written: bool) -> bool:
        """Gives training what it had, as :meth:`Looks.hide`. What was predicted is gathered again, so that every rank
        must call it then."""
        if not are_written:
            self._buffers.exchange()
        if look.predictions is not None:
            self._gathering.for_look(self._gathering.into_comm, look.predictions)
        return not are_written

    def true_copy(self, group: int, start: int, numel: int) -> Tensor:
        """Returns a copy, as :meth:`Looks.true_copy`."""
        return self._buffers.true_copy(group, start, numel)

    def resume_state(self, at: Stand) -> ResumeState:
        """Returns what to keep, as :meth:`Looks.resume_state`."""
        if at.pending is None or at.are_written:
            return ResumeState([], [], at.grad_norm)
        if at.pending.predicts_locally:
            return self._prediction.resume_state(at.grad_norm, is_shown=at.look is not None)
        live, arrived = self._buffers.live_shards, self._buffers.comm_shards
        if at.look is not None:  # exchanged
            live, arrived = arrived, at.look.predictions or []
        predictions = arrived if at.pending.leaves_true_weights is Place.SHARDS else []
        return ResumeState([shard.clone() for shard in live], [shard.clone() for shard in predictions], at.grad_norm)

    def restore(self, state: ResumeState) -> Round | None:
        """Takes over what was kept, as :meth:`Looks.restore`."""
        if not state.live:
            return None
        self._gathering.into_comm(state.before or state.live)
        if state.before:
            self._prediction.restore(state)
            return COMMIT_FORESEEN
        self._buffers.exchange()
        if not state.predictions:
            return COMMIT
        self._gathering.into_comm(state.predictions)
        return PREDICT


class LooksByCopy:
    """Shows the true weights where X has their change, and P or, with a local prediction, a buffer beside it has what
    it is added to."""

    def __init__(self, buffers: FlatBuffers, gathering: Gathering, prediction: LocalPrediction):
        self._buffers = buffers
        self._gathering = gathering
        self._prediction = prediction

    def show(self, place: Place, version: int) -> Look:
        """Shows them, as :meth:`Looks.show`."""
        buffers = self._buffers
        look = Look(version, kept=buffers.host_copies(of_shown=False))
        if place is Place.SHARDS:
            look.kept.extend(arena.to("cpu", copy=True) for arena in buffers.arenas)
            self._gathering.for_look(self._gathering.into_live, self._gathering.own_masters())
        else:
            buffers.take_true()
            buffers.add_commit(buffers.live)
        return look

    def hide(self, look: Look, are_written: bool) -> bool:
        """Gives training what it had, as :meth:`Looks.hide`. What somebody wrote is gone: the master weights win."""
        for target, kept in zip([*self._buffers.live, *self._buffers.arenas], look.kept):
            target.copy_(kept)
        return True

    def true_copy(self, group: int, start: int, numel: int) -> Tensor:
        """Returns a copy, as :meth:`Looks.true_copy`."""
        return self._buffers.changed_copy(group, start, numel)

    def resume_state(self, at: Stand) -> ResumeState:
        """Returns what to keep, as :meth:`Looks.resume_state`: what every rank holds, which is not the masters rounded,
        and the change that will be added to it."""
        buffers = self._buffers
        held = [shard.clone() for shard in buffers.held]
        if at.pending is None:
            return ResumeState(held, [], at.grad_norm)
        kept = [] if at.look is None else at.look.kept
        arenas = kept[len(buffers.live) :] or buffers.arenas
        changes = [records.clone() for records in buffers.own_records(buffers.wire.commit.change, arenas)]
        state = ResumeState(held, [], at.grad_norm, changes=changes, pending=at.pending)
        if not at.pending.predicts_locally:
            return state
        live = [flat.clone() for flat in kept[: len(buffers.live)]] or buffers.host_copies(of_shown=False)
        return replace(state, live=live, before=held, forgets_step=self._prediction.forgets_step)

    def restore(self, state: ResumeState) -> Round | None:
        """Takes over what was kept, as :meth:`Looks.restore`."""
        buffers = self._buffers
        if not state.live:
            return None
        self._gathering.into_live(state.before or state.live)
        buffers.hold(buffers.live)
        if state.before:
            for before, live, kept in zip(buffers.before, buffers.live, state.live):
                before.copy_(live)
                live.copy_(kept)
            self._prediction.forgets_step = state.forgets_step
        if state.pending is not None:
            self._gathering.changes(state.changes)
        return state.pending


def looks_of(buffers: FlatBuffers, gathering: Gathering, prediction: LocalPrediction) -> Looks:
    """Returns the way that fits what a COMMIT brings."""
    return (LooksByCopy if buffers.held else LooksByExchange)(buffers, gathering, prediction)
