# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Gathers the weights of all ranks' shards while no round is in flight: for looks and after loading. Every rank must
call it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..algorithm.schedules import names_of
from ..optim.adamw import AdamWShard
from ..optim.flat import pieces
from .buffers import FlatBuffers
from .communicator import Communicator
from .lanes import InlineLane


class Gathering:
    """Gathers shards, and says of a look that some rank left out what was wrong."""

    def __init__(self, buffers: FlatBuffers, shards: list[AdamWShard], comm: Communicator, lane: InlineLane):
        self._buffers = buffers
        self._shards = shards
        self._comm = comm
        self._lane = lane

    def into_comm(self, shards: list[Tensor]) -> None:
        """Fills X with what every rank passes, its shards, 1-D, one per group."""
        for target, shard in zip(self._buffers.comm_shards, shards):
            target.copy_(shard)
        self._comm.all_gather(self._buffers.comm_weights, is_look=True)

    def into_live(self, shards: list[Tensor]) -> None:
        """Fills P with what every rank passes, through X in as many pieces as it takes."""
        levels = self._comm.levels
        for live, arena, shard in zip(self._buffers.live, self._buffers.arenas, shards):
            most = arena.numel() // (levels.world_size * live.element_size())
            for start, numel in pieces(shard.numel(), most):
                whole = arena[: levels.world_size * numel * live.element_size()].view(live.dtype)
                of_ranks = whole.split(numel)
                of_ranks[levels.place(self._comm.rank)].copy_(shard[start : start + numel])
                self._comm.all_gather([whole], is_look=True)
                for rank in range(levels.world_size):
                    begin = rank * shard.numel() + start
                    live[begin : begin + numel].copy_(of_ranks[levels.place(rank)])

    def changes(self, records: list[Tensor]) -> None:
        """Fills X with the records of every rank's change by a COMMIT, uint8, 1-D, one per group."""
        bits = self._buffers.wire.commit.change
        for target, own in zip(self._buffers.own_records(bits), records):
            target.copy_(own)
        self._comm.all_gather(self._buffers.comm_records(bits), is_look=True)

    def own_masters(self) -> list[Tensor]:
        """Returns this rank's master weights, to be gathered rounded to the weights' dtype."""
        return [shard.master.detach() for shard in self._shards]

    def for_look(self, gather: Callable[[list[Tensor]], None], shards: list[Tensor]) -> None:
        """Calls ``gather``, one of those above, for a look.

        Raises:
            RoundFailed: some rank did not look.
        """
        try:
            gather(shards)
        except RuntimeError as cause:
            raise self._lane.fail(
                RuntimeError(
                    f"with the schedule {names_of(lambda schedule: schedule.looks_together)} the true weights are "
                    "gathered from all ranks, and some rank did not join within comm_timeout_s = "
                    f"{self._comm.timeout_s:g} s. Evaluate, save and read state_dict() on every rank, not on rank 0 "
                    "alone"
                )
            ) from cause
