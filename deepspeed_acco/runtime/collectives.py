# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Moves a round by few large collectives: what suits NCCL, for which every message costs the host time.

What arrives lies in the part of the communication buffer that was sent already, so that nothing is cut into pieces.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .encoding import Encoding
from .levels import Levels


def _gather_in_place(whole: Tensor, own: Tensor, group) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, own, group=group)


def _reduce_scatter_in_place(own: Tensor, whole: Tensor, group) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, whole, group=group)


class Collectives:
    """Reduces and gathers over the levels, with a process group for each.

    Args:
        row_group, column_group: of this rank's row and column, in their order. Where there is one level, the column is
            all ranks.

    Attributes:
        sent_bytes: payload that this rank sent so far, by the count of a ring; it received as much.
    """

    def __init__(self, row_group, column_group, rank: int, levels: Levels):
        self.sent_bytes = 0
        self._row_group, self._column_group = row_group, column_group
        self._levels = levels
        self._at_row, self._at_column = levels.row(rank).index(rank), levels.column(rank).index(rank)

    def reduce_scatter_sum(self, arenas: list[Tensor], totals: list[Tensor], encoding: Encoding) -> list[Tensor]:
        """Sums over the ranks, as :meth:`Communicator.reduce_scatter_sum`. Between hosts the sum is in fp32; in one
        level of values, and inside a host, it is the backend's in their dtype."""
        if self._levels.is_flat and not encoding.bits:
            sizes = (self._levels.world_size * total.numel() for total in totals)
            return [
                self._reduce_scatter(encoding.message_in(arena, numel), self._at_column, self._column_group)
                for arena, numel in zip(arenas, sizes)
            ]
        for arena, total in zip(arenas, totals):
            leaving, room = self._messages(arena, total.numel(), encoding)
            self._exchange(leaving, room, total, encoding)
        return totals

    def _reduce_scatter(self, whole: Tensor, at: int, group) -> Tensor:
        own = whole.chunk(dist.get_world_size(group))[at]
        _reduce_scatter_in_place(own, whole, group)
        self.sent_bytes += whole.nbytes - own.nbytes
        return own

    def _messages(self, arena: Tensor, shard_numel: int, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Returns this host's messages to every host (uint8), and where as much may arrive."""
        hosts = self._levels.host_count
        size = hosts * encoding.message_stride(shard_numel)
        if self._levels.is_flat:
            return arena[:size], _room(arena[size:], size)
        values = Encoding(encoding.dtype)
        whole = values.message_in(arena, self._levels.world_size * shard_numel)
        own = self._reduce_scatter(whole, self._at_row, self._row_group)
        begin = self._at_row * own.nbytes
        before, held, after = arena.split([begin, own.nbytes, arena.numel() - begin - own.nbytes])
        free = max(before, after, key=Tensor.numel)
        if not encoding.bits:
            return held, _room(free, size)
        leaving = _room(free, size)
        for values_of_host, message in zip(own.chunk(hosts), leaving.chunk(hosts)):
            encoding.encode(values_of_host, encoding.message_in(message, shard_numel))
        return leaving, _room(held, size)

    def _exchange(self, leaving: Tensor, arriving: Tensor, total: Tensor, encoding: Encoding) -> None:
        dist.all_to_all_single(arriving, leaving, group=self._column_group)
        hosts = self._levels.host_count
        self.sent_bytes += leaving.nbytes // hosts * (hosts - 1)
        encoding.add_up([encoding.message_in(part, total.numel()) for part in arriving.chunk(hosts)], total)

    def all_gather(self, whole: list[Tensor], is_look: bool = False) -> None:
        """Gathers, as :meth:`Communicator.all_gather`: between hosts, then inside."""
        for tensor in whole:
            column = tensor.chunk(self._levels.ranks_per_host)[self._at_row]
            own = column.chunk(self._levels.host_count)[self._at_column]
            _gather_in_place(column, own, self._column_group)
            self.sent_bytes += column.nbytes - own.nbytes
            if not self._levels.is_flat:
                _gather_in_place(tensor, column, self._row_group)
                self.sent_bytes += tensor.nbytes - column.nbytes


def _room(free: Tensor, size: int) -> Tensor:
    """Returns the first ``size`` bytes of ``free``; shards of a few elements have longer messages than values."""
    return free[:size] if free.numel() >= size else torch.empty(size, dtype=torch.uint8, device=free.device)
