# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Moves a round by direct messages in pieces: what suits gloo, whose own reduce-scatter moves as much as an all-reduce.

Pieces bound the room for what arrives before it is summed, and let one travel inside the host while the one before
travels between hosts. gloo announces every receive to its sender, and only then the data leaves; on the connection
that the data take. So a receive is started as soon as there is room for it, or that word waits behind other data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.flat import pieces
from .encoding import Encoding
from .failures import Guard
from .levels import Levels

# Of both halves: the pieces in one arrive while those in the other are summed.
STAGING_BYTES = 8 * 2**20
_ALIGNMENT = 16  # bytes
_GATHER_PIECES = 16  # of a shard that is also sent inside the host, at most
SMALLEST_GATHER_PIECE = 2**20  # bytes


class _Room:
    """Gives parts of a buffer, one after the other."""

    def __init__(self, buffer: Tensor):
        self._left = buffer

    def take(self, encoding: Encoding, numel: int) -> Tensor:
        """Returns room for a message of so many elements."""
        return encoding.message_in(self.bytes(encoding.message_bytes(numel)), numel)

    def bytes(self, size: int) -> Tensor:
        """Returns room for so many bytes: uint8, 1-D."""
        room, self._left = self._left[:size], self._left[_aligned(size) :]
        return room


@dataclass
class _Piece:
    """Holds what is known of elements ``start`` and following of every shard of a group while they are exchanged."""

    group: int
    start: int
    numel: int
    room: _Room
    messages: list[Tensor] = field(default_factory=list)  # of this host to every host; then of every host to this one
    values: list[list[Tensor]] = field(default_factory=list)  # messages for every host, of every rank of this one
    requests: list = field(default_factory=list)


class Messages:
    """Reduces and gathers over the levels by messages of this rank, all on one process group.

    Args:
        group: the process group of all ranks. global_ranks: the numbers that they have in the world.
        rank: this one's number in the group.
        guard: names the collective in the backend's errors.

    Attributes:
        sent_bytes: payload that this rank sent so far; it received as much.
    """

    def __init__(self, group, global_ranks: list[int], rank: int, levels: Levels, guard: Guard):
        self.sent_bytes = 0
        self._group = group
        self._global_ranks = global_ranks
        self._guard = guard
        self._levels = levels
        self._rank = rank
        self._row, self._column = levels.row(rank), levels.column(rank)
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._partial = torch.empty(0, dtype=torch.float32)

    def _receive(self, tensor: Tensor, rank: int, tag: int = 0):
        return dist.irecv(tensor, self._global_ranks[rank], self._group, tag)

    def _send(self, tensor: Tensor, rank: int, tag: int = 0):
        self.sent_bytes += tensor.nbytes
        return dist.isend(tensor, self._global_ranks[rank], self._group, tag)

    # ---- reducing

    def reduce_scatter_sum(self, arenas: list[Tensor], totals: list[Tensor], encoding: Encoding) -> list[Tensor]:
        """Sums over the ranks, as :meth:`Communicator.reduce_scatter_sum`: inside the host, then between hosts, each in
        fp32 and in the order of the ranks."""
        inner = outer = None
        for piece in [*self._pieces(totals, encoding), None, None]:
            if inner is not None:
                self._end_inner(inner, encoding)
                self._start_outer(inner, encoding)
            if outer is not None:
                self._end_outer(outer, totals, encoding)
            if piece is not None:  # in the room of the one that has just ended
                self._start_inner(piece, arenas[piece.group], totals[piece.group].numel(), encoding)
            inner, outer = piece, inner
        return totals

    def _pieces(self, totals: list[Tensor], encoding: Encoding) -> Iterator[_Piece]:
        """Yields what is exchanged at a time; every second one has the same room."""
        unit = encoding.unit_numel
        units = max(1, STAGING_BYTES // (2 * max(1, self._room_bytes(unit, encoding))))
        largest = min(units * unit, max(total.numel() for total in totals))
        aligned = self._room_bytes(largest, encoding) + _ALIGNMENT * (self._levels.world_size + len(self._column))
        if self._staging.numel() < 2 * aligned:
            self._staging = torch.empty(2 * aligned, dtype=torch.uint8)
        if len(self._row) > 1 and self._partial.numel() < largest:
            self._partial = torch.empty(largest)
        rooms = itertools.cycle(self._staging.split(self._staging.numel() // 2 // _ALIGNMENT * _ALIGNMENT)[:2])
        for group, total in enumerate(totals):
            for start, numel in pieces(total.numel(), largest):
                yield _Piece(group, start, numel, _Room(next(rooms)))

    def _room_bytes(self, numel: int, encoding: Encoding) -> int:
        """Returns the bytes of the neighbors' messages, of this host's messages where the sums' own place is not one,
        and of the other hosts' messages."""
        hosts, neighbors = len(self._column), len(self._row) - 1
        messages = hosts - 1 + hosts * bool(neighbors and encoding.bits)
        return neighbors * hosts * encoding.inner.message_bytes(numel) + messages * encoding.message_bytes(numel)

    def _start_inner(self, piece: _Piece, arena: Tensor, shard_numel: int, encoding: Encoding) -> None:
        """Starts to exchange inside the host: messages of the others' columns for those of this rank's."""
        hosts = len(self._column)
        inner = encoding if len(self._row) == 1 else encoding.inner
        whole = arena[: self._levels.world_size * inner.message_stride(shard_numel)].view(self._levels.world_size, -1)
        if len(self._row) == 1:
            piece.messages = [inner.piece_of(message, piece.start, piece.numel) for message in whole]
            return
        terms: list[list[Tensor]] = []
        with self._guard("reduce_scatter"):
            for peer, column in zip(self._row, whole.split(hosts)):
                own = [inner.piece_of(message, piece.start, piece.numel) for message in column]
                if peer == self._rank:
                    terms.append(own)
                    continue
                # The messages of a column lie one after the other: where they are not cut, one takes them all.
                leaving = [column.view(-1)] if own[0].nbytes == column.shape[1] else own
                rooms = [piece.room.bytes(part.nbytes) for part in leaving]
                for arriving, part in zip(rooms, leaving):
                    piece.requests += [self._receive(arriving, peer), self._send(part.view(torch.uint8), peer)]
                messages = itertools.chain(*(room.split(own[0].nbytes) for room in rooms))
                terms.append([inner.message_in(message, piece.numel) for message in messages])
        piece.values = [list(of_host) for of_host in zip(*terms)]

    def _end_inner(self, piece: _Piece, encoding: Encoding) -> None:
        """Makes the messages to the other hosts of the sums over this one."""
        self._wait(piece)
        own = self._row.index(self._rank)
        for terms in piece.values:
            partial, message = self._partial[: piece.numel], terms[own]  # which nobody needs any more
            encoding.inner.add_up(terms, partial)
            if encoding.bits:
                message = piece.room.take(encoding, piece.numel)
            encoding.encode(partial, message)
            piece.messages.append(message)

    def _start_outer(self, piece: _Piece, encoding: Encoding) -> None:
        """Starts to exchange messages with the other hosts."""
        with self._guard("reduce_scatter"):
            for host, peer in enumerate(self._column):
                if peer != self._rank:
                    arriving, leaving = piece.room.take(encoding, piece.numel), piece.messages[host]
                    piece.requests += [self._receive(arriving, peer), self._send(leaving, peer)]
                    piece.messages[host] = arriving

    def _end_outer(self, piece: _Piece, totals: list[Tensor], encoding: Encoding) -> None:
        self._wait(piece)
        encoding.add_up(piece.messages, totals[piece.group].narrow(0, piece.start, piece.numel))

    def _wait(self, piece: _Piece) -> None:
        with self._guard("reduce_scatter"):
            for request in piece.requests:
                request.wait()
        piece.requests.clear()

    # ---- gathering

    def all_gather(self, whole: list[Tensor], is_look: bool = False) -> None:
        """Gathers, as :meth:`Communicator.all_gather`. What arrives from the host before is sent on at once, to the
        next host and inside this one."""
        tag = int(is_look)  # gloo ends the process where a message meets a receive of another size
        at = self._column.index(self._rank)
        before, following = self._column[at - 1], self._column[(at + 1) % len(self._column)]
        neighbors = [peer for peer in self._row if peer != self._rank]
        with self._guard("all_gather"):
            requests, from_before = [], []
            for tensor in whole:
                _, *hops = self._hops(tensor, self._rank)
                from_before.append(iter([self._receive(part, before, tag) for hop in hops for part in hop]))
                for peer in neighbors:
                    requests += [self._receive(part, peer, tag) for hop in self._hops(tensor, peer) for part in hop]
            for tensor, arriving in zip(whole, from_before):
                for hop, parts in enumerate(self._hops(tensor, self._rank), 1):
                    for part in parts:
                        if hop > 1:
                            next(arriving).wait()
                        if hop < len(self._column):
                            requests.append(self._send(part, following, tag))
                        requests += [self._send(part, peer, tag) for peer in neighbors]
            for request in requests:
                request.wait()

    def _hops(self, tensor: Tensor, rank: int) -> list[list[Tensor]]:
        """Returns the shards of that rank's column in the order in which they come to its host, its own first, each in
        the pieces that are sent on."""
        numel = tensor.numel() // self._levels.world_size
        column, length = self._levels.column(rank), numel
        at = column.index(rank)
        if len(self._row) > 1:  # what one host passes on inside, the next one can be sent meanwhile
            length = max(-(-numel // _GATHER_PIECES), SMALLEST_GATHER_PIECE // tensor.element_size())
        shards = (
            tensor.narrow(0, self._levels.place(peer) * numel, numel) for peer in (*column[at::-1], *column[:at:-1])
        )
        return [list(shard.split(length)) for shard in shards]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
