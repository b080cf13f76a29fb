# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Notices that somebody else wrote the live weights: by a few values of each parameter, or by a sum over all too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_VALUES = 4  # of each parameter


def sampled_places(spans: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """Returns the places in a flat tensor of a few elements of each parameter, spread over it: int64, 1-D.

    Args:
        spans: where each parameter begins, and its elements.
    """
    places = [
        start + numel * step // max(1, _VALUES - 1) - (step == _VALUES - 1)
        for start, numel in spans
        for step in range(_VALUES)
        if numel
    ]
    return torch.tensor(sorted(set(places)), dtype=torch.int64, device=device)


class Fingerprint:
    """Holds some values of the live weights as this package left them.

    Args:
        live: the flat live weights, one tensor per group. places: :func:`sampled_places` of each.
        sums: also holds a sum over the bits of all of them, which takes a pass over them each time.
    """

    def __init__(self, live: list[Tensor], places: list[Tensor], sums: bool = False):
        self._live = live
        self._places = places
        self._sums = sums
        self.take()

    def take(self) -> None:
        """Takes the weights as they stand for this package's own."""
        self._values = self._sample()

    def _sample(self) -> list[Tensor]:
        values = [flat[places].view(torch.uint8) for flat, places in zip(self._live, self._places)]
        return values + [_sum_of_bits(flat) for flat in self._live] if self._sums else values

    def difference(self) -> Tensor:
        """Tells whether the weights are others than when they were taken, bit by bit: bool, 0-dim, on their device."""
        return torch.stack([(now != then).any() for now, then in zip(self._sample(), self._values)]).any()

    def differs(self) -> bool:
        """Tells what :meth:`difference` does; waits for the device."""
        return bool(self.difference())


def _sum_of_bits(flat: Tensor) -> Tensor:
    """Returns the sum, which wraps around, of all bytes in eights, and of the last ones alone: int64, 2 elements."""
    data = flat.view(torch.uint8)
    whole = data.numel() // 8 * 8
    return torch.stack([data[:whole].view(torch.int64).sum(), data[whole:].sum()])
