# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says which elements of a flat parameter group belong to which rank, and where the communication buffer has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .levels import Levels


@dataclass(frozen=True)
class GroupLayout:
    """Cuts one flat parameter group into equal shards, one for each rank (DeepSpeed runtime/zero/stage_1_and_2.py,
    ``get_data_parallel_partitions``: the flat group is padded so that the shards are equal)."""

    padded_numel: int
    levels: Levels
    rank: int

    def __post_init__(self):
        if self.padded_numel % self.world_size:
            raise ValueError(
                f"flat group of {self.padded_numel} elements cannot be cut into {self.world_size} equal shards; "
                "DeepSpeed pads it to a multiple of the number of ranks"
            )

    @property
    def world_size(self) -> int:
        """Returns the number of ranks."""
        return self.levels.world_size

    @property
    def shard_numel(self) -> int:
        """Returns the elements of one shard, with padding."""
        return self.padded_numel // self.world_size

    def shard_of(self, rank: int) -> slice:
        """Returns where that rank's shard lies in the flat group."""
        return slice(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def comm_shard_of(self, rank: int) -> slice:
        """Returns where that rank's shard lies in the communication buffer, likewise in elements."""
        return self.shard_of(self.levels.place(rank))

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """Yields slices of the flat group and of the communication buffer that belong together and cover both."""
        if self.levels.is_flat:
            yield slice(0, self.padded_numel), slice(0, self.padded_numel)
            return
        for rank in range(self.world_size):
            yield self.shard_of(rank), self.comm_shard_of(rank)
