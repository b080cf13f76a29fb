# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Sees the forwards of one engine's module: which train, which only look, and what else must happen before them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .log import logger
from .progress import Progress
from .true_weights import TrueWeights, hook_of


class Forwards:
    """Hooks the engine's module, and more of it once training is seen to go another way than through its forward in
    training mode: through a part of it, or in eval mode. Either is noticed at its first backward.

    Args:
        prepare: called before a training forward, where weights may change.
        says: whether this rank logs.
    """

    def __init__(
        self, root: nn.Module, looks: TrueWeights, progress: Progress, prepare: Callable[[], None], says: bool
    ):
        self._root = root
        self._looks = looks
        self._progress = progress
        self._prepare = prepare
        self._says = says
        self._trains_in_eval_mode = False
        self._is_hooking_parts = False
        before, after = (
            torch.compiler.disable(hook_of(method, self, root)) for method in (Forwards._before, Forwards._after)
        )
        self._handles = [
            # First of all hooks: another one may read the weights, which are installed here.
            root.register_forward_pre_hook(before, prepend=True),
            root.register_forward_hook(after, always_call=True),
            *looks.hook_state_dicts(root),
        ]

    def _is_look(self, module: nn.Module) -> bool:
        return not (module.training or (self._trains_in_eval_mode and torch.is_grad_enabled()))

    def _before(self, module: nn.Module, args) -> None:
        is_look = self._is_look(module)
        self._looks.before_forward(is_look)
        if not is_look and torch.is_grad_enabled():
            self._prepare()

    def _before_part(self, module: nn.Module, args) -> None:
        if not self._progress.position.is_graph_outstanding:  # else it belongs to a forward that was seen
            self._before(module, args)

    def _after(self, module: nn.Module, args, output) -> None:
        self._looks.after_forward(self._is_look(module), output)

    def after_backward(self, was_seen: bool, brought_gradients: bool) -> None:
        """Learns from a backward how training goes.

        Args:
            was_seen: a training forward was seen before it.
        """
        if was_seen or not brought_gradients:
            return
        if not self._root.training and not self._trains_in_eval_mode:
            self._trains_in_eval_mode = True
            self._say(
                "training goes on with the module in eval mode. From now on an eval-mode forward shows the true "
                "weights under torch.no_grad() alone"
            )
        elif self._root.training and not self._is_hooking_parts:
            self._is_hooking_parts = True
            self._say("training goes through parts of the module. From now on forwards of all its parts are watched")
            for part in self._root.modules():
                if part is not self._root:
                    hook = torch.compiler.disable(hook_of(Forwards._before_part, self, part))
                    self._handles.append(part.register_forward_pre_hook(hook, prepend=True))

    def _say(self, text: str) -> None:
        if self._says:
            logger().info(f"ACCO: {text}")

    def release(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
