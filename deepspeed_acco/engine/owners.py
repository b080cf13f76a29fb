# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Ends the former training of a module whose next engine is made: the former one's hooks would act on the new one's
weights and gradients."""

from __future__ import annotations

import weakref

import torch

from .log import logger

_owners: weakref.WeakSet = weakref.WeakSet()  # AccoZeroOptimizers that are built and not destroyed


def add(optimizer) -> None:
    """Enters an optimizer that now trains its parameters."""
    _owners.add(optimizer)


def remove(optimizer) -> None:
    """Takes it out, once it was destroyed."""
    _owners.discard(optimizer)


def any_round_in_flight() -> bool:
    """Tells whether a round of some training has not finished; never waits."""
    return any(not optimizer.driver.is_round_finished() for optimizer in list(_owners))


def end_former_training(module: torch.nn.Module) -> None:
    """Destroys the ACCO optimizers that still train parameters of the module, as ``engine.destroy()`` would; every rank
    comes here, since it makes the next engine."""
    parameters = list(module.parameters())
    for optimizer in list(_owners):
        if optimizer.trains_any(parameters):
            logger().info(
                "ACCO: the engine that trained this module was not destroyed before the next one was made. It is now, "
                "and the module has its true weights"
            )
            optimizer.destroy()
