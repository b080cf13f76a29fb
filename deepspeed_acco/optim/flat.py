# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Walks through flat tensors in shards and pieces: packs, moves, clears and sums them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# On a CPU a piece stays in the cache, and below torch's own grain size no operator splits it over threads, so that the
# result does not depend on how many threads the caller has (worker and main thread must agree bit by bit).
_CPU_PIECE_NUMEL = 2**15
_DEVICE_PIECE_NUMEL = 2**24


@dataclass(frozen=True, eq=False)
class Shards:
    """Says in which order one flat tensor has the equal shards of another.

    Attributes:
        places: shard r of the first tensor is shard ``places[r]`` of the second.
        table: the same for kernels, int64, 1-D, on the device of the tensors.
    """

    places: tuple[int, ...]
    table: Tensor

    @classmethod
    def of(cls, places: Sequence[int], device: torch.device) -> Shards:
        """Makes the table; ``places`` has each of 0, 1, ... once."""
        assert sorted(places) == list(range(len(places))), places
        return cls(tuple(places), torch.tensor(places, dtype=torch.int64, device=device))

    def inverse(self) -> Shards:
        """Returns where the first tensor has the shards of the second."""
        shards = sorted(range(len(self.places)), key=self.places.__getitem__)
        return Shards.of(shards, self.table.device)


def pairs_of_shards(one: Tensor, other: Tensor, shards: Shards | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the parts of two flat tensors that belong together: both of them where there are no shards."""
    if shards is None:
        yield one, other
        return
    numel = one.numel() // len(shards.places)
    for shard, place in enumerate(shards.places):
        yield one.narrow(0, shard * numel, numel), other.narrow(0, place * numel, numel)


def pieces(numel: int, piece_numel: int) -> Iterator[tuple[int, int]]:
    """Yields ``(start, length)`` of consecutive pieces of at most ``piece_numel`` elements that cover ``numel``."""
    if piece_numel < 1:
        raise ValueError(f"a piece needs at least one element, got {piece_numel}")
    for start in range(0, numel, piece_numel):
        yield start, min(piece_numel, numel - start)


def piece_numel(device: torch.device) -> int:
    """Returns how many elements one operator call handles at a time on that device."""
    return _CPU_PIECE_NUMEL if device.type == "cpu" else _DEVICE_PIECE_NUMEL


@torch.no_grad()
def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Returns the sum of all elements' squares, float64, 0-dim; the order of additions does not depend on threads."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        for start, length in pieces(tensor.numel(), piece_numel(tensor.device)):
            total += torch.linalg.vector_norm(tensor[start : start + length], dtype=torch.float64).square()
    return total


@torch.no_grad()
def pack(grads: Tensor, packed: Tensor, scale: float, *, clears: bool, shards: Shards | None = None) -> None:
    """Writes ``grads * scale`` to ``packed`` in its dtype and the order of ``shards``; then zeroes ``grads`` if
    ``clears``. Both 1-D."""
    for part, target in _pairs_of_pieces(grads, packed, shards):
        if scale == 1.0:
            target.copy_(part)
        else:
            torch.mul(part, scale, out=target)
        if clears:
            part.zero_()


@torch.no_grad()
def copy_shards(source: Tensor, target: Tensor, shards: Shards | None = None) -> None:
    """Copies all shards of ``source`` to their places in ``target``. Both 1-D, of one dtype."""
    for part, place in pairs_of_shards(source, target, shards):
        place.copy_(part)


@torch.no_grad()
def swap_shards(one: Tensor, other: Tensor, shards: Shards | None = None) -> None:
    """Swaps all shards of ``one`` with those at their places in ``other``. Both 1-D, of one dtype."""
    for part, place in _pairs_of_pieces(one, other, shards):
        kept = part.clone()
        part.copy_(place)
        place.copy_(kept)


def _pairs_of_pieces(one: Tensor, other: Tensor, shards: Shards | None) -> Iterator[tuple[Tensor, Tensor]]:
    for part, place in pairs_of_shards(one, other, shards):
        for start, length in pieces(part.numel(), piece_numel(part.device)):
            yield part[start : start + length], place[start : start + length]
