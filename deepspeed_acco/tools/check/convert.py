# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes a JSON that trains with ACCO of somebody's ZeRO JSON, and says what changed and why.

What ACCO refuses is left out where training gives the same without it, or where the line says what it gives; anything
else is a reason not to convert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine.json_checks import AUTO, NO_EFFECT, OPTIMIZER_TYPE, names_acco, section_of, truth_of
from ...settings import ADAMW_KEYS
from ..words import listed, shown
from .problems import checked, is_too_deep
from .reading import reading_of
from .trainers import FilledBy, autos_of

# Whose arithmetic is AdamW's, by the names in lower case that DeepSpeed reads (runtime/engine.py).
_ADAMS = ("adam", "adamw", "fusedadam")
_ADAM_DECAY, _TORCH_ADAM_DECAY = 0.0, {True: 0.01, False: 0.0}  # defaults of FusedAdam; of torch's AdamW and Adam
_W_MODE = "adam_w_mode"
# Of the optimizer's params: how it is computed, not what.
_HOW = ("torch_adam", "fused", "foreach", "capturable", "set_grad_none", "fp32_optimizer_states")
# Of the optimizer's params: the value with which nothing differs from ACCO.
_AS_ACCO = {"bias_correction": True, "amsgrad": False, "maximize": False, "differentiable": False}

_OF_STAGE = {
    0: "stage 0 keeps all of AdamW's state on every rank; ACCO shards it, as ZeRO-1",
    2: "ACCO shards as ZeRO-1: each rank holds the gradients of all parameters, up to 2 bytes more for each in 16 "
    "bits, 4 in fp32. The stages have the same updates",
    3: "ACCO shards as ZeRO-1: each rank holds all weights and all gradients, 4 bytes for each parameter in 16 bits, 8 "
    "in fp32; the model must fit so, without zero.Init. The stages have the same updates",
}
_OF_STAGE_3 = (
    *("sub_group_size", "offload_param", "cpu_offload_param", "prefetch_bucket_size", "param_persistence_threshold"),
    *("model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
    *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential", "leaf_module"),
    *("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
)
_MEMORY = (
    "memory: in 16 bits ACCO takes 2 bytes for each parameter more than ZeRO-1 on every rank, with local 4; `ds_acco "
    "plan` counts all of it"
)
_OFFLOADED = ("offload_optimizer", "cpu_offload", "cpu_offload_use_pin_memory")
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


@dataclass
class Conversion:
    """Holds what became of a JSON.

    Attributes:
        config: the new one.
        changes: a line each, with the reason.
        refused: reasons why it cannot be converted; then ``config`` is of no use.
    """

    config: dict[str, Any]
    changes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def converted(given: Mapping[str, Any], is_for_hf: bool) -> Conversion:
    """Returns the JSON with the optimizer ACCO.

    Args:
        is_for_hf: HF Trainer fills "auto"; a JSON with an "auto" says so itself.
    """
    if is_too_deep(given):
        return Conversion({}, refused=["it is nested too deeply"])
    if names_acco(given):
        return Conversion({}, refused=["it names ACCO already: see `ds_acco check`"])
    made = Conversion(copy.deepcopy(dict(given)))
    filled_by = FilledBy.HF if is_for_hf or any(True for _ in autos_of(given)) else FilledBy.NOBODY
    of_values = checked(given, filled_by, None).problems
    if of_values:
        made.refused += of_values
        return made
    _convert_optimizer(made, filled_by)
    _convert_zero(made)
    _leave_out_features(made)
    if not made.refused:
        found = checked(made.config, filled_by, None)
        made.refused += found.problems
        made.changes.append(_MEMORY)
        if found.n == 1 or found.n == AUTO:
            made.changes.append(_of_one_micro_batch(found.n))
    return made


def _of_one_micro_batch(n: int | str | None) -> str:
    where = "gradient_accumulation_steps is 1" if n == 1 else "the Trainer's gradient_accumulation_steps is 1"
    return (
        f"schedule: where {where}, each rank predicts its next weights alone (local). With 2 micro-batches of half the "
        "size it would be acco, which is nearer to ZeRO-1"
    )


# ---- the optimizer


def _convert_optimizer(made: Conversion, filled_by: FilledBy) -> None:
    section = section_of(made.config, "optimizer")
    kind = section.get("type")
    if kind is None:
        _write_optimizer_for_trainer(made, filled_by)
        return
    params = section_of(section, "params")
    made.refused += _refused_of_optimizer(str(kind), params)
    if made.refused:
        return
    kept = {key: params[key] for key in ADAMW_KEYS if key in params}
    made.changes.append(f"optimizer.type: {shown(kind)} became {OPTIMIZER_TYPE!r}, with AdamW's arithmetic")
    if "weight_decay" not in kept:
        kept["weight_decay"] = decay = _default_decay(str(kind), params)
        reason = f"the default of {kind} there, and not ACCO's 0.01"
        made.changes.append(f"optimizer.params.weight_decay: {decay:g} is written, {reason}")
    left_out = [key for key in params if key not in kept]
    if left_out:
        made.changes.append(f"optimizer.params: left out {listed(left_out)}, which change nothing of the arithmetic")
    made.config["optimizer"] = {"type": OPTIMIZER_TYPE, "params": kept}


def _write_optimizer_for_trainer(made: Conversion, filled_by: FilledBy) -> None:
    if filled_by is not FilledBy.HF:
        made.refused.append(
            "it names no optimizer, so that the script makes one with values that are not here. Give --hf where HF "
            "Trainer does; else write the optimizer into the JSON first, or give deepspeed_acco.ACCO(...) to "
            "deepspeed.initialize"
        )
        return
    made.config["optimizer"] = {"type": OPTIMIZER_TYPE, "params": dict.fromkeys(ADAMW_KEYS, AUTO)}
    made.changes.append(
        'optimizer: added; HF Trainer fills each "auto" by its arguments, and its --optim is no more asked. The '
        "Trainer's own AdamW decays no biases and norms; an optimizer of the JSON decays all parameters alike"
    )


def _default_decay(kind: str, params: Mapping[str, Any]) -> float:
    if not params.get("torch_adam"):
        return _ADAM_DECAY
    return _TORCH_ADAM_DECAY[kind.lower() == "adamw" or bool(params.get(_W_MODE, True))]


def _refused_of_optimizer(kind: str, params: Mapping[str, Any]) -> Iterator[str]:
    if kind.lower() not in _ADAMS:
        yield f"optimizer.type = {shown(kind)}: ACCO has AdamW's arithmetic; allowed: Adam, AdamW, FusedAdam"
        return
    is_coupled = kind.lower() != "adamw" and not params.get(_W_MODE, True)
    if is_coupled and params.get("weight_decay", 0.0) != 0.0:
        yield (
            f"optimizer.params.{_W_MODE} = false: it adds weight_decay to the gradient, and ACCO decays the weights. "
            "Set weight_decay to 0, or choose it anew with AdamW"
        )
    for key, value in params.items():
        if key in _AS_ACCO:
            if value != _AS_ACCO[key]:
                yield f"optimizer.params.{key} = {shown(value)}: ACCO trains with {_AS_ACCO[key]} alone"
        elif key == "max_grad_norm":
            yield f"optimizer.params.{key}: DeepSpeed refuses it, too. Write gradient_clipping"
        elif key not in (*ADAMW_KEYS, *_HOW, _W_MODE):
            yield f"optimizer.params.{key} = {shown(value)}: ACCO has no such key, and what it does is not known"


# ---- sharding


def _convert_zero(made: Conversion) -> None:
    given = section_of(made.config, "zero_optimization")
    read = reading_of(made.config)
    if read.has_zenflow:
        made.refused.append("zero_optimization.zenflow: its updates are other ones than AdamW's. Remove it")
    if read.stage not in range(4):
        made.refused.append(f"zero_optimization.stage = {shown(read.stage)}: allowed: 0, 1, 2, 3")
        return
    zero: dict[str, Any] = {"stage": 1}
    if read.stage != 1:
        made.changes.append(f"zero_optimization.stage: {read.stage} became 1; {_OF_STAGE[read.stage]}")
    left_out: dict[str, list[str]] = {}
    for key, value in given.items():
        reason = _reason_to_leave_out(key, value, read.stage)
        if reason:
            left_out.setdefault(reason, []).append(key)
        elif key != "stage":
            zero[key] = value
    made.changes += [f"zero_optimization: left out {listed(keys)}: {reason}" for reason, keys in left_out.items()]
    made.config["zero_optimization"] = zero


def _reason_to_leave_out(key: str, value: Any, stage: int) -> str:
    """Returns why a key of zero_optimization is left out; empty where it stays."""
    if key in _OFFLOADED:
        return (
            "ACCO keeps master weights and moments beside the model, 12 bytes for each parameter over the ranks; the "
            "updates do not depend on it"
        )
    if key in _QUANTIZED:
        is_in_use = stage == 3 and truth_of(value)
        exact = "weights and gradients now travel exactly, so that losses differ a little"
        return exact if is_in_use else "without effect"
    if key == "elastic_checkpoint":
        return "it changes only how checkpoints are written"
    if key.startswith("stage3_") or key in _OF_STAGE_3:
        return "of stage 3"
    return "" if key not in NO_EFFECT else "without effect, as rounds have no buckets and overlap themselves"


# ---- the rest


def _leave_out_features(made: Conversion) -> None:
    config = made.config
    for key, why in (
        ("amp", "use bf16 or fp16, which train in another precision"),
        ("sparse_gradients", "build embeddings with sparse=False"),
    ):
        value = config.get(key)
        if value is not None and (value.get("enabled") if isinstance(value, dict) else value):
            made.refused.append(f"{key}: ACCO does not train with it; {why}")
        elif key in config:
            del config[key]
            made.changes.append(f"{key}: left out: it was off, and newer DeepSpeeds refuse the key")
    if section_of(config, "compile").get("deepcompile"):
        del config["compile"]["deepcompile"]
        made.changes.append(
            "compile.deepcompile: left out: it rewrites ZeRO's own communication; engine.compile() works"
        )
