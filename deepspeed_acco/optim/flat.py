# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Walks through flat tensors in pieces: packing, clearing and summing them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# On a CPU a piece stays in the cache, and below torch's own grain size no operator splits it over threads, so that the
# result does not depend on how many threads the caller has (worker and main thread must agree bit by bit).
_CPU_PIECE_NUMEL = 2**15
_DEVICE_PIECE_NUMEL = 2**24


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
def pack(grads: Tensor, packed: Tensor, scale: float, *, clears: bool) -> None:
    """Writes ``grads * scale`` to ``packed`` in its dtype; then zeroes ``grads`` if ``clears``. Both 1-D."""
    for start, length in pieces(grads.numel(), piece_numel(grads.device)):
        source, target = grads[start : start + length], packed[start : start + length]
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)
        if clears:
            source.zero_()
