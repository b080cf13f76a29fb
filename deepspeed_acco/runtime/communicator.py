# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Owns the process groups of the rounds, and runs their collectives.

Two threads on one gloo group silently mix their payloads, so ACCO never shares DeepSpeed's group; and on every rank one
thread at a time issues the same collectives in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import devices
from .collectives import Collectives
from .encoding import Encoding
from .failures import Guard
from .levels import Levels
from .messages import Messages
from .overdue import Overdue
from .waits import at_most
from .whereabouts import Whereabouts


class Communicator:
    """Owns one process group over the data-parallel ranks, and those of the levels, used by one thread at a time.

    Args:
        parallel_group: DeepSpeed's data-parallel group (its ranks are taken over), or None for all ranks.
        model_group: DeepSpeed's group over the ranks that hold the parts of one model, or None where each holds all.
        device: the parameters' device; ``cuda`` takes NCCL, ``cpu`` takes gloo.
        timeout_s: seconds until a collective that a peer does not join raises an error.
        sm_share: of the device's multiprocessors, how many rounds may take; 1: as many as they have use for.

    Attributes:
        levels: which ranks share a host; one level until :meth:`use_levels`.
        total_ranks: data-parallel ranks times the parts of a model: those that go through the rounds in step.
        whereabouts: where the ranks were last seen.
    """

    def __init__(self, parallel_group, device: torch.device, timeout_s: float, sm_share: float = 1.0, model_group=None):
        self.device = device
        self.timeout_s = timeout_s
        self.sm_share = sm_share
        self._global_ranks = dist.get_process_group_ranks(parallel_group or dist.group.WORLD)
        self._groups: list = []
        # Some rank may have built kernels before, which takes longer than a collective of the rounds may wait.
        dist.barrier(parallel_group)
        if model_group is not None:
            dist.barrier(model_group)
        self._group = self._new_group(self._global_ranks)
        self.rank = dist.get_rank(self._group)
        self.world_size = dist.get_world_size(self._group)
        self.whereabouts = Whereabouts(self._group, self.rank, self.world_size)
        where = (self.rank, self.world_size, timeout_s, self.whereabouts)
        self._guard = Guard(*where)
        self._overdue = Overdue(*where) if devices.uses_nccl(device) else None  # gloo raises by itself
        self._sent_bytes = 0  # beside what the rounds move
        self._model_group, parts = None, 1
        if model_group is not None:
            self._model_group = self._new_group(dist.get_process_group_ranks(model_group))
            parts = dist.get_world_size(self._model_group)
        self.total_ranks = self.world_size * parts
        self.use_levels(Levels.flat(self.world_size))

    def _new_group(self, ranks: list[int]):
        is_nccl = devices.uses_nccl(self.device)
        key = (tuple(ranks), self.timeout_s, is_nccl, self.sm_share)
        group = _take_left(key)
        # A group over some of the ranks is made by its members alone: with tensor parallelism each data-parallel group
        # belongs to another engine call.
        is_partial = len(ranks) != dist.get_world_size()
        if group is None:
            with _not_split_off() if is_partial else nullcontext():
                group = dist.new_group(
                    ranks,
                    timeout=timedelta(seconds=self.timeout_s),
                    backend="nccl" if is_nccl else "gloo",
                    pg_options=self._nccl_options() if is_nccl else None,
                    use_local_synchronization=is_partial,
                )
        self._groups.append((key, group))
        return group

    def _nccl_options(self):
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=self.timeout_s)  # or torch warns that new_group's differs
        if self.sm_share < 1.0:
            count = torch.cuda.get_device_properties(self.device).multi_processor_count
            options.config.max_ctas = max(1, int(self.sm_share * count))
        return options

    def note_round(self, name: str, is_finished: Callable[[], bool]) -> None:
        """Notes that this rank starts a round, for the error that says where the ranks were last seen.

        Args:
            is_finished: tells without waiting whether the round is over; asked from another thread.
        """
        self.whereabouts.note(f"at {name}")
        if self._overdue is not None:
            self._overdue.expect(name, is_finished)

    def use_levels(self, levels: Levels) -> None:
        """Lets the rounds go over these levels from now on; every rank must call it with the same ones."""
        self.levels = levels
        self._rounds: Messages | Collectives
        if not devices.uses_nccl(self.device):
            self._rounds = Messages(self._group, self._global_ranks, self.rank, levels, self._guard)
            return
        row_group, column_group = None, self._group
        if not levels.is_flat:
            row_group, column_group = (
                self._new_group([self._global_ranks[peer] for peer in ranks])
                for ranks in (levels.row(self.rank), levels.column(self.rank))
            )
        self._rounds = Collectives(row_group, column_group, self.rank, levels)

    @property
    def sent_bytes(self) -> int:
        """Returns the payload that this rank sent so far, by the count of a ring or of direct messages, whatever the
        backend adds to it; it received as much."""
        return self._sent_bytes + self._rounds.sent_bytes

    @property
    def is_alive(self) -> bool:
        """Tells whether the group can still be used: not destroyed, here or with all others."""
        return self._group is not None and dist.is_initialized()

    def reduce_scatter_sum(self, arenas: list[Tensor], totals: list[Tensor], encoding: Encoding) -> list[Tensor]:
        """Sums the gradients of all ranks, and returns those of this rank's shard: ``totals``; or, where the backend
        has summed in ``encoding.dtype``, views of the arenas, at the shard's own place and in that dtype.

        Args:
            arenas: uint8, 1-D, one per group, overwritten: the values of all shards in ``encoding.dtype``, by their
                places; where there is one level and ``encoding.bits``, their messages instead, ``message_stride``
                apart.
            totals: fp32, 1-D, one per group, of a shard's size.
        """
        return self._rounds.reduce_scatter_sum(arenas, totals, encoding)

    def all_gather(self, whole: list[Tensor], is_look: bool = False) -> None:
        """Fills every tensor (1-D, one per group, as many equal parts as ranks, by the places of the levels) with what
        each rank has in its own part.

        Args:
            is_look: not of a round. On gloo it never meets messages of a round, so that a look that some rank leaves
                out ends by the timeout.
        """
        self._rounds.all_gather(whole, is_look)

    def all_reduce_sum(self, value: Tensor) -> None:
        """Sums a small tensor over the data-parallel ranks and the parts of the model, in place."""
        for group in filter(None, (self._group, self._model_group)):
            with self._guard("all_reduce_sum"):
                dist.all_reduce(value, group=group)
            ranks = dist.get_world_size(group)
            self._sent_bytes += 2 * value.nbytes * (ranks - 1) // ranks

    def gather_objects(self, value) -> list:
        """Returns what every data-parallel rank passed, small picklable objects in the order of the ranks; waits for
        the device."""
        return self._gather(value, self._group)

    def gather_from_all(self, value) -> list:
        """Returns what every rank passed, those with other parts of the model too, in the order of the global ranks."""
        if self._model_group is None:
            return self.gather_objects(value)
        of_part = self.gather_objects((dist.get_rank(), value))
        return [told for _, told in sorted(chain(*self._gather(of_part, self._model_group)), key=itemgetter(0))]

    def gather_from_parts(self, value) -> list:
        """Returns what every rank passed that holds a part of this rank's model; only its own where it holds all."""
        return [value] if self._model_group is None else self._gather(value, self._model_group)

    def _gather(self, value, group) -> list:
        everyone = [None] * dist.get_world_size(group)
        with self._guard("gather_objects"):
            dist.all_gather_object(everyone, value, group=group)
        return everyone

    def barrier(self) -> None:
        """Returns when every rank has come here; on CUDA it waits for the device."""
        arrived = torch.zeros((), device=self.device)
        with self._guard("barrier"):
            dist.all_reduce(arrived, group=self._group)
            arrived.item()

    @contextmanager
    def bounded(self, work: str, *groups) -> Iterator[None]:
        """Bounds by this communicator's timeout what collectives inside the block wait on DeepSpeed's own groups, and
        on that of all ranks, by the main thread; every rank does the same there.

        Args:
            work: names it in the error.

        Raises:
            CommFailed: another rank has ended, or did not come in time.
        """
        with self._guard.around(work), at_most(self.timeout_s, {dist.group.WORLD, *filter(None, groups)}):
            yield

    def destroy(self, is_broken: bool = False) -> None:
        """Leaves the groups; harmless when called twice or after ``dist.destroy_process_group()``.

        Args:
            is_broken: a collective has failed, so that nobody may use the groups again.
        """
        if self._overdue is not None:
            self._overdue.close()
        groups, self._groups, self._group = self._groups, [], None
        for key, group in reversed(groups if dist.is_initialized() else []):
            if len(key[0]) != dist.get_world_size() and not is_broken:
                _left.setdefault(key, []).append(group)
                continue
            with suppress(ValueError, RuntimeError), warnings.catch_warnings():  # destroyed with all the others
                warnings.simplefilter("ignore")
                dist.destroy_process_group(group)


@contextmanager
def _not_split_off() -> Iterator[None]:
    """Lets groups that are made inside have a communicator of their own. Where the world is bound to a device, as
    DeepSpeed binds it, torch splits it off the world's, and every rank of the world would have to take part."""
    world: Any = dist.group.WORLD
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


# Groups over some of the ranks that communicators have left, for the next one over the same. torch names such a group
# by its ranks; made again after it was destroyed, it would meet the old one's addresses in the store and wait for ever.
_left: dict[tuple, list] = {}


def _take_left(key: tuple):
    """Returns a group that was left, None where there is none that the world still has."""
    while _left.get(key):
        group = _left[key].pop()
        with suppress(ValueError):  # destroyed with all the others
            if dist.get_rank(group) >= 0:
                return group
    return None


def max_over_ranks(value: Tensor, group) -> None:
    """Takes the maximum over DeepSpeed's own ``group`` in place, by the main thread (the overflow check of fp16)."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)


def sum_over_ranks(value: Tensor, group) -> None:
    """Sums over DeepSpeed's own ``group`` in place, by the main thread (a full gradient that the user asked for)."""
    dist.all_reduce(value, group=group)


def ranks_of(group) -> int:
    """Returns the number of ranks of DeepSpeed's own ``group``."""
    return dist.get_world_size(group)
