# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes ``safe_get_full_*`` and ``safe_set_full_*`` (deepspeed/utils/tensor_fragment.py) know of the rounds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..runtime.communicator import ranks_of, sum_over_ranks
from ..runtime.driver import RoundDriver


def link_full_values(optimizer, params: Iterable[Any]) -> None:
    """Replaces what these functions call on each parameter: they wait for the round that writes the optimizer state,
    what is set becomes what training stands on, and gradients are found in A."""
    owner = weakref.ref(optimizer)

    def after(wait: Callable, method: Callable) -> Callable:
        def call(*args, **kwargs):
            driver = getattr(owner(), "driver", None)  # none once destroyed
            if driver is not None:
                wait(driver)
            return method(*args, **kwargs)

        return call

    def of_gradient(method: Callable, param: Tensor) -> Callable:
        return lambda *args: method(owner(), param, *args)

    for param in params:
        param.get_full_hp_param = after(RoundDriver.finish, param.get_full_hp_param)
        param.set_full_hp_param = after(_drain_for_change, param.set_full_hp_param)
        param.get_full_hp_grad = of_gradient(_full_gradient, param)
        param.set_full_hp_grad = of_gradient(_set_full_gradient, param)


def _drain_for_change(driver: RoundDriver) -> None:
    driver.drain(forgets_step=True)


def _own_sum(optimizer, param: Tensor) -> Tensor:
    """Returns the parameter's part of this rank's whole sum, which COMMIT takes."""
    optimizer.windows.require_known_sum()
    return optimizer.gradients.view_of_whole(param)


def _full_gradient(optimizer, param: Tensor) -> Tensor:
    """Returns the window's mean gradient (fp32, with the loss scale); every rank asks."""
    view = _own_sum(optimizer, param)
    optimizer.driver.finish()  # one collective at a time on the device
    mean = view.float() / optimizer.divisor
    with optimizer.driver.bounded("the sum of a full gradient", optimizer.dp_process_group):
        sum_over_ranks(mean, optimizer.dp_process_group)
    return mean


def _set_full_gradient(optimizer, param: Tensor, value: Tensor) -> None:
    """Makes ``value``, the same on every rank, the mean that COMMIT takes (a running ESTIMATE has its own copy)."""
    _own_sum(optimizer, param).copy_(value * (optimizer.divisor / ranks_of(optimizer.dp_process_group)))
