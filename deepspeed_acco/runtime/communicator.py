# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the collectives of a round on a process group of our own. It is the only file that names torch.distributed.

Two threads on one gloo group silently mix their payloads, so ACCO never shares DeepSpeed's group; and on every rank one
thread at a time issues the same collectives in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim.flat import pieces

# gloo needs room for what arrives before it is summed. Two sets of pieces: one arrives while the other is summed.
STAGING_BYTES = 8 * 2**20
_SLOT_ALIGNMENT = 16  # bytes

Taker = Callable[[int, int, list[Tensor]], None]


def _all_gather_in_place(whole: Tensor, own: Tensor, group) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, own, group=group)


def _reduce_scatter_in_place(own: Tensor, whole: Tensor, group) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, whole, group=group)


class CommFailed(RuntimeError):
    """Says that a collective did not complete; the cause is chained."""


def _names_the_timeout(method):
    """Adds to the backend's error, which says what broke on the wire, what that means for the user."""

    @functools.wraps(method)
    def checked(self, *args):
        try:
            return method(self, *args)
        except RuntimeError as cause:
            raise CommFailed(
                f"{method.__name__.lstrip('_')} failed on rank {self.rank} of {self.world_size}: another rank has "
                f"ended, or did not answer within comm_timeout_s = {self.timeout_s:g} s ({cause}). Look at the other "
                "ranks' output"
            ) from cause

    return checked


class Communicator:
    """Owns one process group over the data-parallel ranks, used by one thread at a time.

    Args:
        parallel_group: DeepSpeed's data-parallel group (its ranks are taken over), or None for all ranks.
        device: the parameters' device; ``cuda`` takes NCCL, ``cpu`` takes gloo.
        timeout_s: seconds until a collective that a peer does not join raises an error.

    Attributes:
        sent_bytes: payload that this rank sent in all rounds' collectives so far, by the count of a ring or of direct
            messages, whatever the backend adds to it; it received as much.
    """

    def __init__(self, parallel_group, device: torch.device, timeout_s: float):
        self.device = device
        self.timeout_s = timeout_s
        ranks = dist.get_process_group_ranks(parallel_group if parallel_group is not None else dist.group.WORLD)
        options = None
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        self._group = dist.new_group(
            ranks,
            timeout=timedelta(seconds=timeout_s),
            backend="nccl" if device.type == "cuda" else "gloo",
            pg_options=options,
            # A group over some of the ranks is made by its members alone: with tensor parallelism each data-parallel
            # group belongs to another engine call.
            use_local_synchronization=len(ranks) != dist.get_world_size(),
        )
        self.rank = dist.get_rank(self._group)
        self.world_size = dist.get_world_size(self._group)
        self._global_ranks = ranks
        self._staging: Tensor | None = None
        self.sent_bytes = 0

    @property
    def is_alive(self) -> bool:
        """Tells whether the group can still be used: not destroyed, here or with all others."""
        return self._group is not None and dist.is_initialized()

    def require_same(self, description: str) -> None:
        """Raises RuntimeError on every rank unless all ranks pass the same text (compared by its hash)."""
        digest = hashlib.sha256(description.encode()).digest()[:8]
        mine = torch.tensor(list(digest), dtype=torch.uint8, device=self.device)
        everyone = torch.empty(self.world_size * len(mine), dtype=torch.uint8, device=self.device)
        _all_gather_in_place(everyone, mine, self._group)
        different = [
            rank for rank, theirs in enumerate(everyone.view(self.world_size, -1)) if not torch.equal(theirs, mine)
        ]
        if different:
            raise RuntimeError(
                f"ACCO: data-parallel ranks {different} differ from rank {self.rank} in model layout or configuration; "
                f"rank {self.rank} has: {description}. Start every rank with the same model, config and versions"
            )

    def _part(self, tensor: Tensor, rank: int) -> Tensor:
        """Returns that rank's part, of as many equal ones as there are ranks, as a view."""
        numel = tensor.numel() // self.world_size
        return tensor.narrow(0, rank * numel, numel)

    def reduce_scatter_sum(self, whole: list[Tensor], shard: list[Tensor]) -> None:
        """Sums ``whole`` over the ranks; this rank's part goes to ``shard`` (both 1-D, one per group; shard fp32).

        On gloo each rank sends every other its part directly and the sum is taken in fp32 in the order of the ranks:
        half the bytes of gloo's own reduce-scatter, which moves as much as an all-reduce. ``whole`` is kept there; on
        NCCL this rank's part of it is overwritten.
        """
        if self.device.type == "cuda":
            self._reduce_scatter(whole, shard)
            return

        def add_up(group: int, start: int, terms: list[Tensor]) -> None:
            total = shard[group].narrow(0, start, terms[0].numel())
            total.copy_(terms[0])
            for term in terms[1:]:
                total.add_(term)

        self._exchange(whole, 1, add_up)

    @_names_the_timeout
    def _reduce_scatter(self, whole, shard):
        for source, target in zip(whole, shard):
            own = self._part(source, self.rank)
            _reduce_scatter_in_place(own, source, self._group)
            self._count(source.nbytes - own.nbytes)
            target.copy_(own)

    def all_to_all(self, whole: list[Tensor], unit_numel: int, take: Taker) -> None:
        """Sends each rank its part of ``whole`` (1-D, one per group, as many equal parts as ranks) and gives what
        arrives to ``take``, piece by piece, so that no second buffer of that size is needed.

        Args:
            unit_numel: pieces begin at multiples of it.
            take: called as ``take(group, start, terms)``: elements ``start`` and following of this rank's part, as each
                rank sent them, in the order of the ranks. They are overwritten afterwards.
        """
        self._exchange(whole, unit_numel, take)

    def _exchange(self, whole: list[Tensor], unit_numel: int, take: Taker) -> None:
        arriving = None
        for piece in [*self._exchange_pieces(whole, unit_numel), None]:
            following = None if piece is None else self._start_exchange(whole, *piece)
            if arriving is not None:
                group, start, terms, requests = arriving
                self._end_exchange(requests)
                take(group, start, terms)  # its own errors pass as they are
            arriving = following

    def _exchange_pieces(self, whole, unit_numel):
        """Yields what is exchanged at a time: (group, start, length, slot), alternating between the staging slots."""
        itemsize = whole[0].element_size()
        peers = max(1, self.world_size - 1)
        parts = [source.numel() // self.world_size for source in whole]
        units = max(1, STAGING_BYTES // (2 * peers * itemsize * unit_numel))
        largest = min(units * unit_numel, max(parts))
        needed = 2 * -(-peers * largest * itemsize // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        if self._staging is None or self._staging.numel() < needed:
            self._staging = torch.empty(needed, dtype=torch.uint8, device=self.device)
        slot = 0
        for group, part in enumerate(parts):
            for start, length in pieces(part, largest):
                yield group, start, length, slot
                slot = 1 - slot

    @_names_the_timeout
    def _start_exchange(self, whole, group, start, length, slot):
        source = whole[group]
        half = self._staging.view(2, -1)[slot].view(source.dtype)
        terms, sent, received = [], [], []
        for rank in range(self.world_size):
            theirs = self._part(source, rank).narrow(0, start, length)
            if rank != self.rank:
                sent.append((rank, theirs))
                theirs = half.narrow(0, len(received) * length, length)
                received.append((rank, theirs))
            terms.append(theirs)
        requests = []
        for (rank, arriving), (_, leaving) in zip(received, sent):
            requests.append(dist.P2POp(dist.irecv, arriving, self._global_ranks[rank], self._group))
            requests.append(dist.P2POp(dist.isend, leaving, self._global_ranks[rank], self._group))
        self._count(len(sent) * length * source.element_size())
        return group, start, terms, dist.batch_isend_irecv(requests) if requests else []

    @_names_the_timeout
    def _end_exchange(self, requests):
        for request in requests:
            request.wait()

    @_names_the_timeout
    def all_gather(self, whole: list[Tensor]) -> None:
        """Fills every tensor (1-D, one per group) with all ranks' shards; this rank's lies at its place already."""
        if self.device.type == "cuda":
            for tensor in whole:
                _all_gather_in_place(tensor, self._part(tensor, self.rank), self._group)
        else:
            self._pass_round(whole)
        for tensor in whole:
            self._count(tensor.nbytes - tensor.nbytes // self.world_size)

    def _pass_round(self, whole):
        """Gathers by a ring: each rank sends on to the next what arrives from the one before.

        gloo tells the sender of every receive, and only then the data leaves; on the connection that the data take. So
        all receives come first: in gloo's own all-gather that word waits behind half of the data.
        """
        before, following = (self._global_ranks[(self.rank + step) % self.world_size] for step in (-1, 1))
        steps = range(self.world_size - 1)

        def shards(first):
            return [[self._part(tensor, (first - step) % self.world_size) for step in steps] for tensor in whole]

        arriving = [[dist.irecv(part, before, self._group) for part in parts] for parts in shards(self.rank - 1)]
        leaving = []
        for parts, requests in zip(shards(self.rank), arriving):
            for part, request in zip(parts, requests):
                leaving.append(dist.isend(part, following, self._group))
                request.wait()
        for request in leaving:
            request.wait()

    @_names_the_timeout
    def all_reduce_sum(self, value: Tensor) -> None:
        """Sums a small tensor over the ranks, in place."""
        dist.all_reduce(value, group=self._group)
        self._count(2 * value.nbytes * (self.world_size - 1) // self.world_size)

    def _count(self, sent_bytes: int) -> None:
        """Counts what this rank sent; in all collectives here every rank receives as much."""
        self.sent_bytes += sent_bytes

    @_names_the_timeout
    def gather_objects(self, value) -> list:
        """Returns what every rank passed, small picklable objects in the order of the ranks; waits for the device."""
        everyone = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    @_names_the_timeout
    def barrier(self) -> None:
        """Returns when every rank has come here; on CUDA it waits for the device."""
        arrived = torch.zeros((), device=self.device)
        dist.all_reduce(arrived, group=self._group)
        arrived.item()

    def destroy(self) -> None:
        """Leaves the group; harmless when called twice or after ``dist.destroy_process_group()``."""
        group, self._group = self._group, None
        self._staging = None
        if group is not None and dist.is_initialized():
            with suppress(ValueError, RuntimeError), warnings.catch_warnings():  # destroyed with all the others
                warnings.simplefilter("ignore")
                dist.destroy_process_group(group)


def max_over_ranks(value: Tensor, group) -> None:
    """Takes the maximum over DeepSpeed's own ``group`` in place, by the main thread (the overflow check of fp16)."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)


def sum_over_ranks(value: Tensor, group) -> None:
    """Sums over DeepSpeed's own ``group`` in place, by the main thread (a full gradient that the user asked for)."""
    dist.all_reduce(value, group=group)


def ranks_of(group) -> int:
    """Returns the number of ranks of DeepSpeed's own ``group``."""
    return dist.get_world_size(group)
