# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says what the values in a checkpoint must be, one table for each dictionary, and refuses those that are not.

DeepSpeed finds out about them one by one while it loads, when a part of the engine is overwritten already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from packaging.version import InvalidVersion, Version
from torch import Tensor

from .checkpoint_files import CheckpointRefused

_LARGEST_WHOLE = 2**63
_SHOWN, _SHOWN_ELEMENTS = 60, 4  # letters of a value, elements of a list
_OLDEST = Version("0.3.17")  # of DeepSpeed's layout of stage 1


def _number(value: Any) -> Any:
    """Returns the number that a tensor of one element holds, and everything else as it is."""
    is_one = isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
    return value.item() if is_one else value


def is_number(value: Any) -> bool:
    """Tells whether it is a number that a 64-bit one can be, finite or not."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST_WHOLE
    return isinstance(value, float)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _is_amount(value: Any) -> bool:
    value = _number(value)
    return is_number(value) and math.isfinite(value) and value >= 0


def _is_step(value: Any) -> bool:
    return _is_amount(value) and _number(value) == int(_number(value))


def _is_iteration(value: Any) -> bool:
    return _is_whole(value) or (is_number(value) and value == -1)  # none yet


def _are_shapes(value: Any) -> bool:
    """Tells whether it is a list, by parameter groups, of the shapes of parameters by name."""
    return isinstance(value, list) and all(
        isinstance(group, Mapping)
        and all(isinstance(shape, tuple) and all(map(_is_whole, shape)) for shape in group.values())
        for group in value
    )


def _is_one_parameter(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and _is_whole(value[0])  # ZeRO has one flat one a group


def _are_betas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_amount(b) and _number(b) < 1 for b in value)


def _is_version(value: Any) -> bool:
    try:
        return isinstance(value, str) and Version(value) >= _OLDEST
    except InvalidVersion:
        return False


def _are_places(value: Any) -> bool:
    """Tells whether it is a list, by parameter groups, of the places of parameters by name."""
    return isinstance(value, list) and all(
        isinstance(group, Mapping)
        and all(
            isinstance(place, fragment_address) and all(_is_whole(vars(place).get(key)) for key in ("start", "numel"))
            for place in group.values()
        )
        for group in value
    )


@dataclass(frozen=True)
class Kind:
    """Says what a value must be, in words and as a condition.

    Attributes:
        is_optional: whether older versions or other optimizers leave the key out.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    is_optional: bool = False

    def or_none(self) -> Kind:
        """Returns the kind of what may also be None or missing."""
        return Kind(f"{self.allowed}, or None", lambda value: value is None or self.accepts(value), True)

    def or_missing(self) -> Kind:
        """Returns the kind of what may be missing."""
        return Kind(self.allowed, self.accepts, True)


def list_of(kind: Kind) -> Kind:
    """Returns the kind of a list whose elements are of one kind."""
    return Kind(f"a list, each {kind.allowed}", lambda value: isinstance(value, list) and all(map(kind.accepts, value)))


WHOLE = Kind("a whole number >= 0", _is_whole)
AMOUNT = Kind("a finite number >= 0", _is_amount)
POSITIVE = Kind("a finite number > 0", lambda value: _is_amount(value) and _number(value) > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, int) and value in (0, 1))
TEXT = Kind("a word", lambda value: isinstance(value, str) and value != "")
MAPPING = Kind("a dictionary", lambda value: isinstance(value, Mapping))
TENSOR = Kind("a tensor", lambda value: isinstance(value, Tensor))

MODEL = {  # beside the module; what load_module_only needs is the first alone
    "dp_world_size": WHOLE,
    "mp_world_size": WHOLE,
    "global_steps": WHOLE,
    "skipped_steps": WHOLE,
    "global_samples": WHOLE.or_missing(),
    "param_shapes": Kind("shapes of parameters", _are_shapes).or_none(),  # None without ZeRO
    "frozen_param_fragments": MAPPING.or_none(),  # where gradients are partitioned: stages 2 and 3
    "data_sampler": MAPPING.or_none(),
    "random_ltd": MAPPING.or_none(),
}
# Of a shard, and of optimizer_state.pt in a universal checkpoint.
GLOBAL = {
    "ds_version": Kind(f"a version of DeepSpeed >= {_OLDEST}", _is_version),
    "clip_grad": AMOUNT.or_missing(),
    "dynamic_loss_scale": FLAG.or_missing(),
    "overflow": FLAG.or_missing(),
}
SHARD = GLOBAL | {
    "zero_stage": Kind("1 or 2", lambda value: _is_whole(value) and value in (1, 2), True),
    "single_partition_of_fp32_groups": list_of(TENSOR),
    "group_paddings": list_of(WHOLE).or_missing(),
    "partition_count": list_of(WHOLE),
    "param_alignment_paddings": list_of(list_of(WHOLE)).or_missing(),
    "param_slice_mappings": Kind("places of parameters", _are_places, True),
}
BASE = {"state": MAPPING, "param_groups": list_of(MAPPING)}
GROUP = {
    "lr": AMOUNT,
    "betas": Kind("two numbers >= 0 and < 1", _are_betas),
    "eps": AMOUNT,
    "weight_decay": AMOUNT,
    "initial_lr": AMOUNT.or_missing(),  # of torch's schedulers
    **dict.fromkeys(("amsgrad", "maximize", "bias_correction", "decoupled_weight_decay"), FLAG.or_missing()),
}
SHARD_GROUP = GROUP | {"params": Kind("a list of one number", _is_one_parameter)}
STEP = {"step": Kind("a whole number >= 0, or a tensor of one", _is_step)}
SCALERS = {
    LossScaler: {"cur_scale": POSITIVE, "dynamic": Kind("false", lambda value: value is False)},
    DynamicLossScaler: {
        "cur_scale": POSITIVE,
        "dynamic": Kind("true", lambda value: value is True),
        "cur_iter": WHOLE,
        "last_overflow_iter": Kind("a whole number >= -1", _is_iteration),
        "scale_factor": POSITIVE,
        "scale_window": Kind("a whole number > 0", lambda value: _is_whole(value) and value > 0),
        "min_scale": AMOUNT,
        "delayed_shift": WHOLE,
        "cur_hysteresis": WHOLE,
        "consecutive_hysteresis": FLAG,
        "raise_error_at_min_scale": FLAG,
        "dtype": Kind("a dtype", lambda value: isinstance(value, torch.dtype)),
    },
}
# Of ACCO's own key (checkpoint_state.py); what is optional is younger than the rest of version 1.
ACCO = {
    "version": Kind("a whole number > 0", lambda value: _is_whole(value) and value > 0),
    "schedule": TEXT,
    "window": WHOLE,
    # Of a step that was skipped it is infinite or no number.
    "grad_norm": Kind("a number >= 0", lambda value: is_number(value) and not value < 0),
    "weights": list_of(TENSOR),
    "predictions": list_of(TENSOR),
    "before": list_of(TENSOR).or_missing(),  # of the schedule local
    "commit_comm": TEXT.or_missing(),
    "changes": list_of(TENSOR).or_missing(),  # with commit_comm
    "forgets_step": Kind("true or false", lambda value: isinstance(value, bool)).or_missing(),
    "run": TEXT.or_missing(),
    "rank": WHOLE.or_missing(),
    "global_steps": WHOLE.or_missing(),
    "scheduler_ahead": WHOLE.or_missing(),
    "unscheduled_samples": WHOLE.or_missing(),
    "estimate_fraction": Kind(
        "a number between 0 and 1", lambda value: isinstance(value, float) and 0 < value < 1
    ).or_none(),
}


def require(values: Mapping[str, Any], expected: Mapping[str, Kind], where: str) -> None:
    """Raises CheckpointRefused for the first value that is missing or of another kind.

    Args:
        where: what holds the values: begins the sentence.
    """
    for key, kind in expected.items():
        if key not in values:
            if not kind.is_optional:
                raise CheckpointRefused(f"{where} has no {key}; needed: {kind.allowed}. Load another checkpoint")
        elif not kind.accepts(values[key]):
            raise CheckpointRefused(
                f"{where} has {key} = {shown(values[key])}; allowed: {kind.allowed}. Load another checkpoint"
            )


def require_scaler(state: Mapping[str, Any], where: str, is_needed: bool) -> None:
    """Raises CheckpointRefused where the loss scaler is none that can go on, or is needed (fp16) and missing."""
    kinds = tuple(SCALERS)
    if "loss_scaler" not in state and not is_needed:
        return  # DeepSpeed's bf16 optimizer has none
    require(state, {"loss_scaler": Kind("a loss scaler", lambda value: type(value) in kinds)}, where)
    scaler = state["loss_scaler"]
    require(vars(scaler), SCALERS[type(scaler)], f"{where}: loss_scaler")


def require_tensor(
    tensor: Any,
    where: str,
    numel: int | None = None,
    dtype: torch.dtype | None = None,
    lowest: float = -math.inf,
    is_flat: bool = False,
) -> None:
    """Raises CheckpointRefused unless it is a plain tensor whose values are all finite.

    Args:
        where: its name in its file: begins the sentence.
        numel: None: any number of elements. dtype: None: any.
        lowest: no value may be below. is_flat: it must have one dimension.
    """
    is_plain = isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided
    if not is_plain or tensor.is_quantized or tensor.is_complex():
        raise CheckpointRefused(f"{where} is {shown(tensor)}; needed: a plain tensor. Load another checkpoint")
    if numel is not None and tensor.numel() != numel:
        raise CheckpointRefused(
            f"{where} has {tensor.numel()} elements where this run has {numel}. Load a checkpoint of this model"
        )
    if is_flat and tensor.dim() != 1:
        raise CheckpointRefused(f"{where} has {tensor.dim()} dimensions; allowed: 1. Load another checkpoint")
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointRefused(
            f"{where} is in {_name(tensor.dtype)} where this run has {_name(dtype)}. Set the same precision, or pass "
            "load_module_only=True"
        )
    if not tensor.numel():
        return
    smallest, largest = (extreme.item() for extreme in torch.aminmax(tensor.detach()))  # NaN where there is one
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise CheckpointRefused(
            f"{where} has values that are not finite: the run had diverged, or the file was edited. Load an earlier "
            "checkpoint"
        )
    if smallest < lowest:
        raise CheckpointRefused(
            f"{where} has the value {smallest:g}; allowed: >= {lowest:g}. The file was edited: load another checkpoint"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(value: Any) -> str:
    """Returns the value as a message shows it: short, and without running code of a class."""
    is_short = isinstance(value, (list, tuple)) and len(value) < _SHOWN_ELEMENTS and all(map(_is_simple, value))
    text = repr(value) if is_short or _is_simple(value) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, bytes))
