# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Moves a round by few large collectives: what suits NCCL, for which every message costs the host time.

What arrives lies in the part of the communication buffer that was sent already, so that nothing is cut into pieces.
Where a COMMIT is quantized there is no such part: a few pieces then share a room for what arrives.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.flat import pieces
from .encoding import Encoding
from .levels import Levels

PIECES = 8  # of a shard, at most, where what arrives has no room in the communication buffer
SMALLEST_PIECE = 2**20  # elements


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
            if encoding.inner_bits:
                self._sum_in_pieces(arena, total, encoding)
                continue
            leaving, room = self._messages(arena, total.numel(), encoding)
            self._exchange(leaving, room, total, encoding)
        return totals

    def _sum_in_pieces(self, arena: Tensor, total: Tensor, encoding: Encoding) -> None:
        """Sums what leaves from an arena without room for what arrives: a piece of every message at a time, inside the
        host and then between the hosts."""
        world, hosts, numel = self._levels.world_size, self._levels.host_count, total.numel()
        first = encoding if self._levels.is_flat else encoding.inner
        whole = arena[: world * first.message_stride(numel)].view(world, -1)
        most = -(-numel // PIECES // encoding.unit_numel) * encoding.unit_numel
        for start, length in pieces(numel, max(most, SMALLEST_PIECE)):
            messages = [first.piece_of(message, start, length) for message in whole]
            if not self._levels.is_flat:
                columns = [messages[at : at + hosts] for at in range(0, world, hosts)]
                of_row = self._exchange_messages(columns, self._at_row, self._row_group)
                messages = []
                partial = torch.empty(length, dtype=torch.float32, device=total.device)
                for terms in zip(*of_row):
                    first.add_up(list(terms), partial)
                    messages.append(arena.new_empty(encoding.message_bytes(length)))
                    encoding.encode(partial, messages[-1])
            of_column = self._exchange_messages(
                [[message] for message in messages], self._at_column, self._column_group
            )
            encoding.add_up([message for (message,) in of_column], total.narrow(0, start, length))

    def _exchange_messages(self, leaving: list[list[Tensor]], at: int, group) -> list[list[Tensor]]:
        """Sends every other member of the group what is for it, in one operation; returns what all sent to this one, in
        their order, its own included."""
        arriving = [
            own if member == at else [torch.empty_like(message) for message in leaving[at]]
            for member, own in enumerate(leaving)
        ]
        operations = []
        for member, peer in enumerate(dist.get_process_group_ranks(group)):
            if member != at:
                operations += [dist.P2POp(dist.isend, message, peer, group) for message in leaving[member]]
                operations += [dist.P2POp(dist.irecv, message, peer, group) for message in arriving[member]]
                self.sent_bytes += sum(message.nbytes for message in leaving[member])
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        return arriving

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
