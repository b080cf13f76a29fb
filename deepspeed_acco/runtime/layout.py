# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says which elements of a flat parameter group belong to which rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupLayout:
    """Cuts one flat parameter group into ``world_size`` equal shards (DeepSpeed runtime/zero/stage_1_and_2.py,
    ``get_data_parallel_partitions``: the flat group is padded so that the shards are equal)."""

    padded_numel: int
    world_size: int
    rank: int

    def __post_init__(self):
        if self.padded_numel % self.world_size:
            raise ValueError(
                f"flat group of {self.padded_numel} elements cannot be cut into {self.world_size} equal shards; "
                "DeepSpeed pads it to a multiple of the number of ranks"
            )

    @property
    def shard_numel(self) -> int:
        """Returns the elements of one shard, with padding."""
        return self.padded_numel // self.world_size

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Returns the first element of that rank's shard and the one after its last."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel
