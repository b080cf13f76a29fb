# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Knows where each trainable parameter lies in the flat buffers, and keeps it there."""

from __future__ import annotations

from torch import Tensor

from ..runtime.written import sampled_places
from .log import logger


class BoundParameters:
    """Holds the trainable parameters as views of the flat live weights.

    Args:
        groups: the parameters, one list per flat group. live: the flat live weights.
    """

    def __init__(self, groups: list[list[Tensor]], live: list[Tensor]):
        self._groups = groups
        # Padding and order inside a flat group are DeepSpeed's and changed between versions, so addresses are asked.
        self._spans = {
            id(param): (group, (param.data_ptr() - flat.data_ptr()) // flat.element_size(), param.numel())
            for group, (params, flat) in enumerate(zip(groups, live))
            for param in params
        }
        self._weights = self.views_in(live)
        self._has_told = False

    def span_of(self, param: Tensor) -> tuple[int, int, int]:
        """Returns the parameter's group, its first element in the flat group, and its elements."""
        return self._spans[id(param)]

    def has(self, param: Tensor) -> bool:
        """Tells whether it is one of the trainable parameters."""
        return id(param) in self._spans

    def views_in(self, flats: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns every parameter with the part of ``flats`` that lies as it does in the live weights, in its shape."""
        return [
            (param, flats[group].narrow(0, start, numel).view(param.shape))
            for params in self._groups
            for param in params
            for group, start, numel in [self.span_of(param)]
        ]

    def sampled_places(self) -> list[Tensor]:
        """Returns for every group the places at which somebody else's writing is noticed."""
        return [
            sampled_places([self.span_of(param)[1:] for param in params], params[0].device) for params in self._groups
        ]

    def bind_again(self, *, tells: bool = True) -> None:
        """Makes every parameter a view of the live weights again, whose storage somebody replaced (``param.data =
        tensor``, ``module.double().float()``), as ZeRO-1 does at every step. What it held is gone, as there: the
        master weights win.

        Args:
            tells: that it had to, once.
        """
        for param, weights in self._weights:
            if param.data_ptr() != weights.data_ptr() or param.dtype != weights.dtype:
                param.data = weights
                if tells and not self._has_told:
                    self._has_told = True
                    logger().info(
                        "ACCO: the storage of a parameter was replaced. It is bound again at the next step, and what "
                        "it held is overwritten by the step, as with ZeRO-1. This is said once"
                    )

    def release(self) -> None:
        """Lets the views go."""
        self._weights.clear()
