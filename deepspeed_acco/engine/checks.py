# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Refuses whatever in the configuration ACCO cannot train with, before anything is built."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from ..algorithm.schedules import DEFAULT, SCHEDULES, names_of
from ..algorithm.window import require_room
from ..optimizer import ACCO
from ..settings import (
    ACCO_KEYS,
    ADAMW_KEYS,
    LARGEST_COUNT,
    LARGEST_FLOAT,
    Settings,
    max_window_micro_batches,
    refuse_unknown,
)
from . import trainers
from .deepspeed_engine import Engine

_OPTIMIZER_SECTION = ("type", "params", "legacy_fusion")  # what DeepSpeed reads (runtime/config.py)
_DTYPES = ("fp32", "fp16", "bf16")
_DTYPE_NAMES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
_LARGEST_SCALE_POWER = 127  # of fp32; DeepSpeed computes it in whole numbers, for hours where it is large


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT


# Top-level keys that DeepSpeed computes with unchecked: what each may be.
_VALUES = {
    "train_batch_size": (lambda value: value is None or _is_count(value), "a whole number >= 1"),
    "train_micro_batch_size_per_gpu": (lambda value: value is None or _is_count(value), "a whole number >= 1"),
    "gradient_accumulation_steps": (lambda value: value is None or _is_count(value), "a whole number >= 1"),
    "gradient_clipping": (lambda value: _is_number(value) and value >= 0, "a number >= 0; 0 does not clip"),
    "gradient_predivide_factor": (lambda value: _is_number(value) and value > 0, "a number > 0"),
    "prescale_gradients": (lambda value: value in (True, False), "true, false"),
    "communication_data_type": (
        lambda value: value is None or str(value).lower() in _DTYPES,
        '"fp32", "fp16", "bf16"',
    ),
}
_SECTIONS = {  # that DeepSpeed reads as objects unchecked: what else each may be
    "optimizer": (),
    "scheduler": (),
    "zero_optimization": (True, False),
    "fp16": (),
    "bf16": (None,),
    "bfloat16": (None,),
    "torch_autocast": (),
    "data_types": (),
}


def refuse_if(is_given, key, value, allowed, fix) -> None:
    """Raises ValueError where ``is_given``: the key as the JSON spells it, the value, what is allowed, and the fix."""
    if is_given:
        raise ValueError(f"ACCO: {key} = {value!r} is not allowed; allowed: {allowed}. {fix}")


def check_json(raw) -> None:
    """Raises ValueError for what DeepSpeed refuses by an error of its own, ignores, or acts on, before it has an
    optimizer."""
    section = raw.get("optimizer")
    name = section.get("type") if isinstance(section, dict) else None
    if name == ACCO.__name__:
        _check_optimizer(raw, section)
    for key, others in _SECTIONS.items():
        value = raw.get(key, {})
        is_section = isinstance(value, dict) or any(value is other for other in others)
        refuse_if(not is_section, key, value, "an object of keys and values", "Write {...}")
    for key, (is_allowed, allowed) in _VALUES.items():
        is_auto = raw.get(key) == "auto"
        fix = "HF Trainer and Accelerate fill it; elsewhere choose" if is_auto else "Choose"
        refuse_if(key in raw and not is_allowed(raw[key]), key, raw.get(key), allowed, f"{fix} a value in range")
    scheduler = raw.get("scheduler", {})
    if scheduler.get("type") is not None:
        kind, params = scheduler["type"], scheduler.get("params")
        refuse_if(not isinstance(kind, str), "scheduler.type", kind, "the name of a scheduler", "Write it in quotes")
        fix = "Write {...}, be it empty"
        refuse_if(not isinstance(params, dict), "scheduler.params", params, "an object of keys and values", fix)
    power = raw.get("fp16", {}).get("initial_scale_power")
    is_power = power is None or power == "auto" or isinstance(power, int) and power <= _LARGEST_SCALE_POWER
    allowed = f"a whole number <= {_LARGEST_SCALE_POWER}"
    refuse_if(not is_power, "fp16.initial_scale_power", power, allowed, "Choose a value in range")
    data_types = raw.get("data_types")
    dtype = data_types.get("grad_accum_dtype") if isinstance(data_types, dict) else None
    name = str(dtype).removeprefix("torch.")
    is_known = dtype is None or _DTYPE_NAMES.get(name, name) in _DTYPES
    refuse_if(not is_known, "data_types.grad_accum_dtype", dtype, ", ".join(_DTYPES), "Set one of these")
    amp = raw.get("amp")
    refuse_if(
        isinstance(amp, dict) and amp.get("enabled"), "amp.enabled", True, "false", "Remove amp; use bf16 or fp16"
    )
    sparse = raw.get("sparse_gradients")
    refuse_if(sparse, "sparse_gradients", sparse, "false", "Remove it and build embeddings with sparse=False")
    parallel = raw.get("tensor_parallel")
    size = parallel.get("autotp_size", 0) if isinstance(parallel, dict) else 0
    refuse_if(isinstance(size, int) and size > 1, "tensor_parallel.autotp_size", size, "0 or 1", "Remove it")


def names_acco(raw) -> bool:
    """Tells whether a parsed JSON names the optimizer ACCO, be it in another case.

    Raises:
        ValueError: for another case, which DeepSpeed looks up in torch.optim in vain.
    """
    section = raw.get("optimizer") if isinstance(raw, dict) else None
    name = section.get("type") if isinstance(section, dict) else None
    if not isinstance(name, str) or name.strip().upper() != ACCO.__name__:
        return False
    refuse_if(name != ACCO.__name__, "optimizer.type", name, f'"{ACCO.__name__}"', "Write it so")
    return True


def _check_optimizer(raw, section) -> None:
    ours = ADAMW_KEYS + ACCO_KEYS
    for key, value in section.items():
        deeper = f"Write it one level deeper: {{{json.dumps(key)}: {json.dumps(value, default=str)}}} under params"
        fix = deeper if key in ours else "Remove it"
        refuse_if(key not in _OPTIMIZER_SECTION, f"optimizer.{key}", value, ", ".join(_OPTIMIZER_SECTION), fix)
    for key in (*ours, "params"):
        deeper = "optimizer" if key == "params" else "optimizer.params"
        refuse_if(key in raw, key, raw.get(key), f"this key in {deeper} alone", "Write it there")
    params = section.get("params", {})
    is_section = params is None or isinstance(params, dict)
    refuse_if(not is_section, "optimizer.params", params, "an object of keys and values", "Write {...}")
    refuse_unknown(key for key in params or {} if key not in ours)


def check_engine(engine: Engine, optimizer: ACCO) -> None:
    """Raises ValueError for whatever in the engine's JSON ACCO cannot train with: the key as the JSON spells it, the
    value, what is allowed, and the fix."""
    config = engine._config
    zero = config.zero_config
    raw = getattr(config, "_param_dict", {})

    def section(name):
        value = raw.get(name)
        return value if isinstance(value, dict) else {}

    stage = int(zero.stage)
    refuse_if(stage != 1, "zero_optimization.stage", stage, "1", 'Set "zero_optimization": {"stage": 1}')
    pipeline: Any = engine.module if engine.pipeline_parallelism else None
    stages = 1 if pipeline is None else pipeline.num_pipeline_stages()
    fix = (
        "Use one stage, or the AdamW optimizer: with several the data-parallel traffic, which ACCO hides, is about 1 % "
        "of a step"
    )
    refuse_if(stages > 1, "PipelineModule's num_stages", stages, "1", fix)
    refuse_if(engine.has_moe_layers, "model", "a module with MoE layers", "dense modules", "Use the AdamW optimizer")
    zenflow = getattr(zero, "zenflow", None)
    refuse_if(
        zenflow is not None,
        "zero_optimization.zenflow",
        section("zero_optimization").get("zenflow"),
        "none",
        "Remove it",
    )
    offload = zero.offload_optimizer
    offload_device = getattr(offload.device, "value", offload.device) if offload is not None else "none"
    refuse_if(
        str(offload_device) != "none",
        "zero_optimization.offload_optimizer.device",
        str(offload_device),
        '"none"',
        "Remove offload_optimizer: ACCO keeps its shard beside the model",
    )
    refuse_if(zero.elastic_checkpoint, "zero_optimization.elastic_checkpoint", True, "false", "Remove it")
    check_json(raw)
    for name, key in (
        ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):
        value = section(name).get(key, section("bfloat16").get(key) if name == "bf16" else None)
        refuse_if(value, f"{name}.{key}", value, "false", "ACCO keeps fp32 master weights and states; remove it")
    hybrid = section("hybrid_engine").get("enabled")
    refuse_if(hybrid, "hybrid_engine.enabled", hybrid, "false", "Remove hybrid_engine")
    refuse_if(
        section("compile").get("deepcompile"), "compile.deepcompile", True, "false", "Remove it; torch.compile works"
    )
    autocast = section("torch_autocast")
    refuse_if(
        autocast.get("enabled") and str(autocast.get("dtype")).split(".")[-1] in ("float16", "fp16", "half"),
        "torch_autocast.dtype",
        autocast.get("dtype"),
        '"bfloat16"',
        'Set it, or use "fp16": {"enabled": true}',
    )
    for method in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"):  # old and new Megatrons
        size = getattr(engine.mpu, method)() if hasattr(engine.mpu, method) else 1
        refuse_if(size > 1, f"mpu.{method}()", size, "1", "Use data parallelism alone")
    device = engine.device.type
    refuse_if(device not in ("cpu", "cuda"), "device", device, "cpu, cuda", "Use the AdamW optimizer there")
    check_window(engine.gradient_accumulation_steps(), optimizer.settings)
    if optimizer.settings.is_adaptive:
        fix = 'Set optimizer.params.accumulation to "fixed": train_batch() ends the windows itself'
        allowed = 'any other module with accumulation = "adaptive"'
        refuse_if(engine.pipeline_parallelism, "model", "PipelineModule", allowed, fix)
        fix = 'Set optimizer.params.accumulation to "fixed": HF Trainer and Accelerate end the windows themselves'
        allowed = 'unset with accumulation = "adaptive"'
        refuse_if(trainers.is_running_loop(), trainers.VARIABLE, os.environ.get(trainers.VARIABLE), allowed, fix)
        unmanaged = not getattr(config, "managed_gradient_accumulation", True)
        fix = 'Set it, or set optimizer.params.accumulation to "fixed"'
        refuse_if(unmanaged, "managed_gradient_accumulation", False, 'true with accumulation = "adaptive"', fix)
        fix = 'Use bf16, or set optimizer.params.accumulation to "fixed": fp16\'s overflow check waits for every rank'
        refuse_if(engine.fp16_enabled(), "fp16.enabled", True, 'false with accumulation = "adaptive"', fix)


def check_window(n: int, settings: Settings) -> None:
    """Raises ValueError where a window of n micro-batches has no room for the schedule or the settings."""
    require_room(SCHEDULES[settings.of_window(n).schedule], n)
    if settings.is_adaptive:
        max_window_micro_batches(n, settings.max_window)


def require_one_dtype(flats: list[torch.Tensor]) -> None:
    """Raises ValueError for trainable parameters of several dtypes."""
    dtypes = {flat.dtype for flat in flats}
    refuse_if(
        len(dtypes) > 1,
        "dtypes of the trainable parameters",
        sorted(map(str, dtypes)),
        "one",
        "Convert the trainable parameters to one dtype or freeze the others",
    )


def require_own_batches(settings: Settings, sequence_parallel: float) -> None:
    """Raises ValueError where several ranks compute every micro-batch together, and each would count for itself, or
    predict its own weights for its part."""
    together = "these ranks compute every micro-batch together"
    refuse_if(
        settings.is_adaptive and sequence_parallel > 1,
        "sequence parallelism",
        int(sequence_parallel),
        '1 with accumulation = "adaptive"',
        f'Set optimizer.params.accumulation to "fixed": {together}',
    )
    alike = names_of(lambda row: not row.predicts_locally)
    refuse_if(
        SCHEDULES[settings.schedule].predicts_locally and sequence_parallel > 1,
        "sequence parallelism",
        int(sequence_parallel),
        f'1 with optimizer.params.schedule = "{settings.schedule}"',
        f"Set the schedule to {alike} ({DEFAULT.name} needs gradient_accumulation_steps >= "
        f"{DEFAULT.least_micro_batches}): {together}, so all of them need the same weights",
    )
