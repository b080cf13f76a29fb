# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Notices that somebody else wrote the live weights, by a few values of each parameter and without a pass over all."""

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
    """

    def __init__(self, live: list[Tensor], places: list[Tensor]):
        self._live = live
        self._places = places
        self.take()

    def take(self) -> None:
        """Takes the weights as they stand for this package's own."""
        self._values = self._sample()

    def _sample(self) -> list[Tensor]:
        return [flat[places] for flat, places in zip(self._live, self._places)]

    def differs(self) -> bool:
        """Tells whether the weights are others than when they were taken, bit by bit; waits for the device."""
        return any(
            not torch.equal(now.view(torch.uint8), then.view(torch.uint8))
            for now, then in zip(self._sample(), self._values)
        )
