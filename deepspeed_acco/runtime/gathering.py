# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Fills the communication buffer with the weights of all ranks' shards while no round is in flight: for looks and after
loading. Every rank must call it."""

from __future__ import annotations

from torch import Tensor

from ..algorithm.schedules import names_of
from ..optim.adamw import AdamWShard
from .buffers import FlatBuffers
from .communicator import Communicator
from .lanes import InlineLane


class Gathering:
    """Gathers shards into X, and says of a look that some rank left out what was wrong."""

    def __init__(self, buffers: FlatBuffers, shards: list[AdamWShard], comm: Communicator, lane: InlineLane):
        self._buffers = buffers
        self._shards = shards
        self._comm = comm
        self._lane = lane

    def shards(self, shards: list[Tensor]) -> None:
        """Fills X with what every rank passes, its shards, 1-D, one per group."""
        for target, shard in zip(self._buffers.comm_shards, shards):
            target.copy_(shard)
        self._comm.all_gather(self._buffers.comm_weights, is_look=True)

    def own_masters(self) -> list[Tensor]:
        """Returns this rank's master weights, to be gathered rounded to the weights' dtype."""
        return [shard.master.detach() for shard in self._shards]

    def for_look(self, shards: list[Tensor]) -> None:
        """Does what :meth:`shards` does, for a look.

        Raises:
            RoundFailed: some rank did not look.
        """
        try:
            self.shards(shards)
        except RuntimeError as cause:
            raise self._lane.fail(
                RuntimeError(
                    f"with the schedule {names_of(lambda schedule: schedule.looks_together)} the true weights are "
                    "gathered from all ranks, and some rank did not join within comm_timeout_s = "
                    f"{self._comm.timeout_s:g} s. Evaluate, save and read state_dict() on every rank, not on rank 0 "
                    "alone"
                )
            ) from cause
