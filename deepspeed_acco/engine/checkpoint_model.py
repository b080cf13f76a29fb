# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks the file with the module against this run: weights, and the learning-rate scheduler."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import checkpoint_content as content
from .checkpoint_content import require, require_tensor
from .checkpoint_files import CheckpointRefused


@dataclass(frozen=True)
class LoadOptions:
    """Holds the arguments of ``engine.load_checkpoint`` that decide what is loaded."""

    load_module_strict: bool = True
    load_optimizer_states: bool = True
    load_lr_scheduler_states: bool = True
    load_module_only: bool = False
    custom_load_fn: Any = None

    @property
    def loads_optimizer(self) -> bool:
        """Tells whether master weights and AdamW state are loaded."""
        return self.load_optimizer_states and not self.load_module_only

    @property
    def loads_scheduler(self) -> bool:
        """Tells whether the state of the learning-rate scheduler is loaded, where the run has one."""
        return self.load_lr_scheduler_states and not self.load_module_only


def needed_of_model(options: LoadOptions) -> Mapping[str, content.Kind]:
    """Returns what the load uses of the file beside the module."""
    if options.load_module_only:
        return {"dp_world_size": content.MODEL["dp_world_size"]}
    return content.MODEL


def check_module(module: nn.Module, saved: Mapping[str, Any], options: LoadOptions, path: str) -> None:
    """Requires the weights of this model, all finite."""
    theirs = saved.get("module")
    if theirs is None and "module" in saved:
        raise CheckpointRefused(
            f"{path} is of a PipelineModule, whose layers have files of their own, and this run has a "
            f"{type(module).__name__}. Load a checkpoint of this model"
        )
    if not isinstance(theirs, Mapping):
        raise CheckpointRefused(f'{path} has no key "module": it is no DeepSpeed checkpoint')
    if options.custom_load_fn is not None:
        return  # only that function knows what fits
    _check_frozen(module, saved.get("frozen_param_fragments"), path)
    check_weights(module, theirs, options, path)


def check_weights(module: nn.Module, theirs: Mapping[str, Any], options: LoadOptions, path: str) -> None:
    """Requires the weights of this module, be it a part of the model, all finite.

    Args:
        theirs: by name, as the file ``path`` has them.
    """
    own = module.state_dict()
    if options.load_module_strict and not _renames_keys(module):
        missing, unexpected = [key for key in own if key not in theirs], [key for key in theirs if key not in own]
        if missing or unexpected:
            raise CheckpointRefused(
                f"{path} is of another model: it lacks {_some(missing)} and has in addition {_some(unexpected)}. Load "
                "a checkpoint of this model, or pass load_module_strict=False"
            )
    for key, tensor in own.items():
        if not isinstance(tensor, Tensor) or key not in theirs:
            continue
        other = theirs[key]
        if not isinstance(other, Tensor):
            raise CheckpointRefused(f"{path} has a {type(other).__name__} as {key}, where this run has a tensor")
        if tensor.shape != other.shape:
            raise CheckpointRefused(
                f"{path} is of another model: {key} has the shape {tuple(other.shape)} there and "
                f"{tuple(tensor.shape)} here. Load a checkpoint of this model"
            )
    # Buffers may hold what is not finite, such as the mask of an attention, and frozen parameters anything.
    for name, param in module.named_parameters(remove_duplicate=False):
        if param.requires_grad and name in own and name in theirs:
            require_tensor(theirs[name], f"{path}: {name}", dtype=param.dtype if options.loads_optimizer else None)


def _check_frozen(module: nn.Module, fragments: Any, path: str) -> None:
    """Requires all frozen parameters where a checkpoint of stage 2 has them in a place of their own."""
    require(
        {"frozen_param_fragments": fragments}, {"frozen_param_fragments": content.MODEL["frozen_param_fragments"]}, path
    )
    if fragments is None:
        return
    for name, param in module.named_parameters():
        if not param.requires_grad and getattr(fragments.get(name), "shape", None) != param.shape:
            raise CheckpointRefused(
                f"{path} has no {name} of this shape in frozen_param_fragments: it is of another model, or of one with "
                "other frozen parameters. Load a checkpoint of this model"
            )


def _renames_keys(module: nn.Module) -> bool:
    """Tells whether loading may accept other keys than state_dict() has."""
    return any(
        part._load_state_dict_pre_hooks or not type(part)._load_from_state_dict.__module__.startswith("torch.")
        for part in module.modules()
    )


def _some(names) -> str:
    listed = ", ".join(names[:3]) or "nothing"
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed


def check_scheduler(scheduler: Any, state: Any, path: str) -> None:
    """Requires a state that the scheduler takes, by letting it take it and its own again."""
    if state is None:
        raise CheckpointRefused(
            f"{path} has no state of a learning-rate scheduler and this run has one. Load it with "
            "load_lr_scheduler_states=False, or remove the scheduler"
        )
    own, reason = scheduler.state_dict(), ""
    if isinstance(own, Mapping):
        require({"lr_scheduler": state}, {"lr_scheduler": content.MAPPING}, path)
        wrong = [key for key in own if key in state and not _stays_number(own[key], state[key])]
        reason = f"{wrong[0]} = {content.shown(state[wrong[0]])}" if wrong else ""
    if not reason:
        try:
            scheduler.load_state_dict(copy.deepcopy(state))
        except Exception as cause:  # whatever a scheduler of the user's may raise
            reason = f"{type(cause).__name__}: {cause}"
        scheduler.load_state_dict(own)
    if reason:
        raise CheckpointRefused(
            f"{path} has a state of another learning-rate scheduler, or an edited one ({reason}). Build the same "
            f"{type(scheduler).__name__}, or load it with load_lr_scheduler_states=False"
        )


def _stays_number(own: Any, theirs: Any) -> bool:
    """Tells whether ``theirs`` has numbers where ``own`` has, and finite ones where they are finite."""
    if isinstance(own, (list, tuple)):
        return isinstance(theirs, (list, tuple)) and all(map(_stays_number, own, theirs))
    if not content.is_number(own):
        return True
    return content.is_number(theirs) and (math.isfinite(theirs) or not math.isfinite(own))
