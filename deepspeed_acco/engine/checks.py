# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Refuses whatever in the configuration and the model ACCO cannot train with, before anything is built."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..optimizer import ACCO
from ..settings import Settings
from . import trainers
from .deepspeed_engine import Engine
from .json_checks import (
    Reading,
    check_window,
    problems_of_adaptive,
    problems_of_engine,
    problems_of_json,
    problems_of_own_batches,
    problems_of_tensor_parallel,
    raise_first,
    refusal,
)


def refuse_if(is_given, key, value, allowed, fix) -> None:
    """Raises ValueError where ``is_given``: the key as the JSON spells it, the value, what is allowed, and the fix."""
    if is_given:
        raise ValueError(refusal(key, value, allowed, fix))


def check_engine(engine: Engine, optimizer: ACCO) -> None:
    """Raises ValueError for whatever in the engine's JSON or module ACCO cannot train with: the key as the JSON spells
    it, the value, what is allowed, and the fix."""
    raw, read = getattr(engine._config, "_param_dict", {}), _reading_of(engine)
    raise_first(problems_of_engine(raw, read))
    raise_first(problems_of_json(raw))
    pipeline: Any = engine.module if engine.pipeline_parallelism else None
    stages = 1 if pipeline is None else pipeline.num_pipeline_stages()
    fix = (
        "Use one stage, or the AdamW optimizer: with several the data-parallel traffic, which ACCO hides, is about 1 % "
        "of a step"
    )
    refuse_if(stages > 1, "PipelineModule's num_stages", stages, "1", fix)
    refuse_if(engine.has_moe_layers, "model", "a module with MoE layers", "dense modules", "Use the AdamW optimizer")
    _check_tensor_parallel(engine, optimizer.settings)
    device = engine.device.type
    refuse_if(device not in ("cpu", "cuda"), "device", device, "cpu, cuda", "Use the AdamW optimizer there")
    check_window(engine.gradient_accumulation_steps(), optimizer.settings)
    if optimizer.settings.is_adaptive:
        fix = 'Set optimizer.params.accumulation to "fixed": train_batch() ends the windows itself'
        allowed = 'any other module with accumulation = "adaptive"'
        refuse_if(engine.pipeline_parallelism, "model", "PipelineModule", allowed, fix)
        trainer = os.environ[trainers.VARIABLE] if trainers.is_running_loop() else None
        raise_first(problems_of_adaptive(raw, read, trainer))


def _check_tensor_parallel(engine: Engine, settings: Settings) -> None:
    """Raises ValueError for an ``mpu`` whose parts of a model ZeRO-1 does not know, and for settings that need all of
    it on each rank."""
    names = ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size")  # of old and new Megatrons
    sizes = {f"mpu.{name}()": getattr(engine.mpu, name)() for name in names if hasattr(engine.mpu, name)}
    largest = max(sizes.values(), default=1)
    for method, size in sizes.items():
        # DeepSpeed's ZeRO-1 then takes no norm over the parts (deepspeed/runtime/zero/stage_1_and_2.py).
        alone = hasattr(engine.mpu, "initialize_sequence_parallel")
        refuse_if(size > 1 and alone, method, size, "1 where the mpu has sequence parallelism", "Use one of the two")
        refuse_if(size != largest, method, size, f"{largest}, as its other size", "Use tensor parallelism alone")
    raise_first(problems_of_tensor_parallel(settings.of_window(engine.gradient_accumulation_steps()), largest))


def _reading_of(engine: Engine) -> Reading:
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    device = getattr(offload.device, "value", offload.device) if offload is not None else "none"
    return Reading(
        stage=int(zero.stage),
        offload_device=str(device),
        has_zenflow=getattr(zero, "zenflow", None) is not None,
        has_elastic_checkpoint=zero.elastic_checkpoint,
        has_fp16=engine.fp16_enabled(),
    )


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
    """Raises ValueError for settings with which every rank needs micro-batches of its own, where several share them."""
    raise_first(problems_of_own_batches(settings, sequence_parallel))
