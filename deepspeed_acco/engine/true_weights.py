# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Shows the true weights wherever somebody looks, and guards the weights of a graph until its backward."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..algorithm.schedules import Place, names_of
from ..runtime.driver import RoundDriver
from .bound_parameters import BoundParameters
from .log import logger


def hook_of(method: Callable, of: Any, module: nn.Module) -> Callable:
    """Makes a hook of ``module`` that calls ``method(of, module, *args)``. It is a function and not a bound method:
    ``copy.deepcopy(module)`` (an averaged model, say) then copies neither ``of`` nor its process group, and the copy's
    own calls are none of our business."""
    of, owner = weakref.ref(of), weakref.ref(module)

    def hook(module, *args):
        if module is owner() and of() is not None:
            method(of(), module, *args)

    return hook


class TrueWeights:
    """Shows and hides the true weights of one engine, wherever somebody looks.

    Args:
        bound: the trainable parameters, and where they lie in the buffers.
        is_graph_outstanding: whether a training forward waits for its backward, so that its weights must stay.
    """

    def __init__(
        self,
        driver: RoundDriver,
        bound: BoundParameters,
        is_graph_outstanding: Callable[[], bool],
    ):
        self._driver = driver
        self._bound = bound
        self._is_graph_outstanding = is_graph_outstanding
        self._blocks = 0  # of true_weights() that are entered
        self._has_told = False  # of weights that somebody else wrote

    def hook_state_dicts(self, root: nn.Module) -> list:
        """Hooks ``state_dict()`` of the module and all its parts; returns the handles."""
        handles = []
        for part in root.modules():
            handles.append(part.register_state_dict_pre_hook(hook_of(TrueWeights.before_state_dict, self, part)))
            handles.append(part.register_state_dict_post_hook(hook_of(TrueWeights.after_state_dict, self, part)))
        return handles

    # ---- what the hooks of the module call

    def before_forward(self, is_look: bool) -> None:
        """Shows the true weights to a forward that only looks, and hides them from every other.

        Raises:
            RuntimeError: a training forward inside ``true_weights()``.
        """
        if is_look:
            self._driver.show_true()
            return
        if self._blocks:
            raise RuntimeError(
                "ACCO: a training forward inside true_weights() is not allowed; allowed: eval-mode forwards. Leave the "
                "block first"
            )
        self._driver.hide_true()
        if self._driver.has_met_writing and not self._has_told:
            self._has_told = True
            logger().warning(
                "ACCO: the model's weights were written in an evaluation or after a state_dict() and not restored. The "
                'master weights win, as with ZeRO-1: at the next step, or at once where commit_comm is not "full". '
                "This is said once"
            )

    def after_forward(self, is_look: bool, output: Any) -> None:
        """Guards the graph that the forward made, and gives an outstanding one its weights back after a look."""
        if torch.is_grad_enabled():
            self._guard(output)
        if is_look and self._is_graph_outstanding():
            self._driver.hide_true()  # a training graph waits for its backward

    def _guard(self, output: Any) -> None:
        """Compares the weights' version when the backward comes: autograd does not notice a copy into parameters."""
        driver, version = self._driver, self._driver.weights_version

        def check(grad):
            if driver.weights_version != version:
                raise RuntimeError(
                    "ACCO: the weights changed between this forward and its backward (another training forward after a "
                    "backward, a step or an evaluation came in between), so its gradient would be wrong. Run the "
                    "backward of every forward before the next forward that follows a backward, and evaluate under "
                    "torch.no_grad()"
                )

        has_fields = dataclasses.is_dataclass(output) and not isinstance(output, (dict, type))
        for tensor in tree_leaves(vars(output) if has_fields else output):
            # Not on a leaf, such as a parameter that the module returns: it would keep the hook.
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(check)

    def before_state_dict(self, module, prefix, keep_vars) -> None:
        """Shows the true weights until the next training forward, so that the returned references stay true."""
        if not self._is_graph_outstanding():
            self._driver.show_true()

    def after_state_dict(self, module, state_dict, prefix, local_metadata) -> None:
        """Puts copies of the true weights into the dictionary where the live ones must stay: between a forward and its
        backward."""
        driver = self._driver
        if not self._is_graph_outstanding() or driver.is_showing_true:
            return
        driver.finish()
        place = driver.true_weights_place
        if place is Place.LIVE:
            return
        if place is Place.SHARDS:
            raise RuntimeError(
                f"ACCO: with the schedule {names_of(lambda schedule: schedule.looks_together)} state_dict() cannot be "
                "taken between a forward and its backward, because the true weights must be gathered into the model. "
                "Take it after the backward"
            )
        for name, param in module.named_parameters(recurse=False):
            key = prefix + name
            if key in state_dict and self._bound.has(param):
                state_dict[key] = driver.looks.true_copy(*self._bound.span_of(param)).view(param.shape)

    # ---- what the user calls

    @contextmanager
    def block(self) -> Iterator[None]:
        """Holds the true weights in the parameters inside; see :func:`deepspeed_acco.true_weights`."""
        was_showing = self._driver.is_showing_true
        self._driver.show_true()
        self._blocks += 1
        try:
            yield
        finally:
            self._blocks -= 1
            self._bound.bind_again(tells=False)  # AutoTP gathers parameters into a storage of their own, and leaves it
            if not was_showing and not self._blocks:
                self._driver.hide_true()


@contextmanager
def true_weights(engine) -> Iterator[None]:
    """Holds the true weights, those of the newest COMMIT, in the parameters of ``engine.module`` inside the block
    ``with deepspeed_acco.true_weights(engine):``; training goes on afterwards as if nobody had looked.

    Evaluation, ``state_dict()`` and checkpoints need no such block. With the schedule ``wp`` every rank must enter it.

    Raises:
        ValueError: when the engine does not train with ACCO.
    """
    optimizer = getattr(engine, "optimizer", None)
    looks = getattr(optimizer, "looks", None)
    if not isinstance(looks, TrueWeights):
        raise ValueError(
            f"ACCO: true_weights() got an engine with {type(optimizer).__name__}; allowed: one whose optimizer.type is "
            '"ACCO". With every other optimizer the parameters are the true weights already'
        )
    with looks.block():
        yield
