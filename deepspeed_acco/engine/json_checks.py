# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Finds whatever in a parsed DeepSpeed JSON ACCO cannot train with, and what in it has no effect.

``deepspeed.initialize`` raises the first problem, ``ds_acco check`` lists them all; the latter must answer at once, so
nothing here imports torch or DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..algorithm.schedules import DEFAULT, SCHEDULES, names_of
from ..algorithm.window import require_room
from ..settings import (
    ACCO_KEYS,
    ADAMW_KEYS,
    LARGEST_COUNT,
    LARGEST_FLOAT,
    Settings,
    max_window_micro_batches,
    refuse_unknown,
)

OPTIMIZER_TYPE = "ACCO"
AUTO = "auto"  # HF Trainer and Accelerate write a value in its place
PRECISIONS = {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16",)}
_OPTIMIZER_SECTION = ("type", "params", "legacy_fusion")  # what DeepSpeed reads (runtime/config.py)
_DTYPES = ("fp32", "fp16", "bf16")
_DTYPE_NAMES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
_LARGEST_SCALE_POWER = 127  # of fp32; DeepSpeed computes it in whole numbers, for hours where it is large
_TRUE, _FALSE = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no")  # pydantic's words

NO_EFFECT = {  # keys of zero_optimization
    "overlap_comm": "ACCO overlaps by its rounds",
    "reduce_scatter": "ACCO always reduce-scatters",
    "contiguous_gradients": "gradients always lie in one flat buffer",
    "reduce_bucket_size": "ACCO has no buckets",
    "allgather_bucket_size": "ACCO has no buckets",
    "use_multi_rank_bucket_allreduce": "ACCO has no buckets",
    "round_robin_gradients": "only the order of the shards follows it",
    "zero_hpz_partition_size": "ZeRO++ is of stage 3",
    "zero_quantized_weights": "ZeRO++ is of stage 3; see optimizer.params.estimate_comm",
    "zero_quantized_nontrainable_weights": "ZeRO++ is of stage 3",
    "zero_quantized_gradients": "ZeRO++ is of stage 3; see optimizer.params.estimate_comm",
}


def refusal(key: str, value: Any, allowed: str, fix: str) -> str:
    """Returns a problem in words: the key as the JSON spells it, the value, what is allowed, and the fix."""
    return f"ACCO: {key} = {value!r} is not allowed; allowed: {allowed}. {fix}"


def raise_first(problems: Iterable[str]) -> None:
    """Raises ValueError for the first problem; those behind it are not looked for."""
    for problem in problems:
        raise ValueError(problem)


def section_of(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a section of the JSON, an empty one where it is none."""
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def truth_of(value: Any) -> bool | None:
    """Returns what DeepSpeed makes of a value that should be true or false; None where it refuses it."""
    if isinstance(value, str):
        word = value.lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


# ---- what is looked at before DeepSpeed reads the JSON


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


def problems_of_name(raw: Any) -> Iterator[str]:
    """Yields a problem for the name ACCO in another case, which DeepSpeed looks up in torch.optim in vain."""
    section = raw.get("optimizer") if isinstance(raw, dict) else None
    name = section.get("type") if isinstance(section, dict) else None
    if isinstance(name, str) and name.strip().upper() == OPTIMIZER_TYPE != name:
        yield refusal("optimizer.type", name, f'"{OPTIMIZER_TYPE}"', "Write it so")


def names_acco(raw: Any) -> bool:
    """Tells whether a parsed JSON names the optimizer ACCO."""
    return isinstance(raw, dict) and section_of(raw, "optimizer").get("type") == OPTIMIZER_TYPE


def problems_of_json(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yields what DeepSpeed refuses by an error of its own, ignores, or acts on, before it has an optimizer."""
    if names_acco(raw):
        yield from _problems_of_optimizer(raw, raw["optimizer"])
    yield from problems_of_values(raw)
    amp = section_of(raw, "amp")
    if amp.get("enabled"):
        yield refusal("amp.enabled", True, "false", "Remove amp; use bf16 or fp16")
    sparse = raw.get("sparse_gradients")
    if sparse:
        yield refusal("sparse_gradients", sparse, "false", "Remove it and build embeddings with sparse=False")


def problems_of_values(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yields the values that DeepSpeed cannot train with, whatever the optimizer, and says so late or not at all."""
    for key, others in _SECTIONS.items():
        value = raw.get(key, {})
        if not isinstance(value, dict) and not any(value is other for other in others):
            yield refusal(key, value, "an object of keys and values", "Write {...}")
    for key, (is_allowed, allowed) in _VALUES.items():
        if key in raw and not is_allowed(raw[key]):
            fix = "HF Trainer and Accelerate fill it; elsewhere choose" if raw[key] == AUTO else "Choose"
            yield refusal(key, raw[key], allowed, f"{fix} a value in range")
    yield from _problems_of_precision(raw)
    yield from _problems_of_scheduler(section_of(raw, "scheduler"))
    power = section_of(raw, "fp16").get("initial_scale_power")
    if not (power is None or power == AUTO or isinstance(power, int) and power <= _LARGEST_SCALE_POWER):
        allowed = f"a whole number <= {_LARGEST_SCALE_POWER}"
        yield refusal("fp16.initial_scale_power", power, allowed, "Choose a value in range")
    dtype = section_of(raw, "data_types").get("grad_accum_dtype")
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and _DTYPE_NAMES.get(name, name) not in _DTYPES:
        yield refusal("data_types.grad_accum_dtype", dtype, ", ".join(_DTYPES), "Set one of these")


def _problems_of_precision(raw: Mapping[str, Any]) -> Iterator[str]:
    enabled = []
    for name in (name for names in PRECISIONS.values() for name in names):
        value = section_of(raw, name).get("enabled", False)
        if truth_of(value):
            enabled.append(name)
        elif truth_of(value) is None and value != AUTO:
            yield refusal(f"{name}.enabled", value, "true or false", "Write one of them")
    if "fp16" in enabled and len(enabled) > 1:
        yield refusal("fp16.enabled", True, f"false with {enabled[0]}.enabled = true", "Choose one of them")


def _problems_of_scheduler(scheduler: Mapping[str, Any]) -> Iterator[str]:
    kind, params = scheduler.get("type"), scheduler.get("params")
    if kind is None:
        return
    if not isinstance(kind, str):
        yield refusal("scheduler.type", kind, "the name of a scheduler", "Write it in quotes")
    if not isinstance(params, dict):
        yield refusal("scheduler.params", params, "an object of keys and values", "Write {...}, be it empty")
        return
    for key, value in params.items():
        if value == AUTO:
            fix = "HF Trainer and Accelerate fill it; elsewhere write one"
            yield refusal(f"scheduler.params.{key}", value, "a value", fix)


def _problems_of_optimizer(raw: Mapping[str, Any], section: Mapping[str, Any]) -> Iterator[str]:
    ours = ADAMW_KEYS + ACCO_KEYS
    for key, value in section.items():
        if key not in _OPTIMIZER_SECTION:
            deeper = f"Write it one level deeper: {{{json.dumps(key)}: {json.dumps(value, default=str)}}} under params"
            fix = deeper if key in ours else "Remove it"
            yield refusal(f"optimizer.{key}", value, ", ".join(_OPTIMIZER_SECTION), fix)
    for key in (*ours, "params"):
        if key in raw:
            place = "optimizer" if key == "params" else "optimizer.params"
            yield refusal(key, raw[key], f"this key in {place} alone", "Write it there")
    params = section.get("params", {})
    if params is not None and not isinstance(params, dict):
        yield refusal("optimizer.params", params, "an object of keys and values", "Write {...}")
    for key in params if isinstance(params, dict) else ():
        if key not in ours:
            try:
                refuse_unknown([key])
            except ValueError as unknown:
                yield str(unknown)


# ---- what is looked at when DeepSpeed has read it


@dataclass(frozen=True)
class Reading:
    """Holds what DeepSpeed makes of keys for which it takes several spellings.

    Attributes:
        offload_device: of the optimizer; ``none`` where it is not offloaded.
    """

    stage: Any
    offload_device: str = "none"
    has_zenflow: bool = False
    has_elastic_checkpoint: bool = False
    has_fp16: bool = False


def problems_of_engine(raw: Mapping[str, Any], read: Reading) -> Iterator[str]:
    """Yields what of DeepSpeed's features ACCO does not train with."""
    if read.stage != 1:
        yield refusal("zero_optimization.stage", read.stage, "1", 'Set "zero_optimization": {"stage": 1}')
    if read.has_zenflow:
        yield refusal(
            "zero_optimization.zenflow", section_of(raw, "zero_optimization").get("zenflow"), "none", "Remove it"
        )
    if read.offload_device != "none":
        fix = "Remove offload_optimizer: ACCO keeps its shard beside the model"
        yield refusal("zero_optimization.offload_optimizer.device", read.offload_device, '"none"', fix)
    if read.has_elastic_checkpoint:
        yield refusal("zero_optimization.elastic_checkpoint", True, "false", "Remove it")
    for name, key in (
        ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):
        old = section_of(raw, "bfloat16").get(key) if name == "bf16" else None
        value = section_of(raw, name).get(key, old)
        if value:
            yield refusal(f"{name}.{key}", value, "false", "ACCO keeps fp32 master weights and states; remove it")
    hybrid = section_of(raw, "hybrid_engine").get("enabled")
    if hybrid:
        yield refusal("hybrid_engine.enabled", hybrid, "false", "Remove hybrid_engine")
    if section_of(raw, "compile").get("deepcompile"):
        yield refusal("compile.deepcompile", True, "false", "Remove it; torch.compile works")
    autocast = section_of(raw, "torch_autocast")
    if autocast.get("enabled") and str(autocast.get("dtype")).split(".")[-1] in ("float16", "fp16", "half"):
        fix = 'Set it, or use "fp16": {"enabled": true}'
        yield refusal("torch_autocast.dtype", autocast["dtype"], '"bfloat16"', fix)


def problems_of_adaptive(raw: Mapping[str, Any], read: Reading, trainer: str | None) -> Iterator[str]:
    """Yields what adaptive windows do not go together with.

    Args:
        trainer: ACCELERATE_USE_DEEPSPEED where HF Trainer or Accelerate runs the loop; None elsewhere.
    """
    if trainer is not None:
        fix = 'Set optimizer.params.accumulation to "fixed": HF Trainer and Accelerate end the windows themselves'
        yield refusal("ACCELERATE_USE_DEEPSPEED", trainer, 'unset with accumulation = "adaptive"', fix)
    if not raw.get("managed_gradient_accumulation", True):
        fix = 'Set it, or set optimizer.params.accumulation to "fixed"'
        yield refusal("managed_gradient_accumulation", False, 'true with accumulation = "adaptive"', fix)
    if read.has_fp16:
        fix = 'Use bf16, or set optimizer.params.accumulation to "fixed": fp16\'s overflow check waits for every rank'
        yield refusal("fp16.enabled", True, 'false with accumulation = "adaptive"', fix)


def check_window(n: int, settings: Settings) -> None:
    """Raises ValueError where a window of n micro-batches has no room for the schedule or the settings."""
    require_room(SCHEDULES[settings.of_window(n).schedule], n)
    if settings.is_adaptive:
        max_window_micro_batches(n, settings.max_window)


def problems_of_own_batches(settings: Settings, sequence_parallel: float) -> Iterator[str]:
    """Yields a problem where several ranks compute every micro-batch together, and each would count for itself, or
    predict its own weights for its part."""
    if sequence_parallel <= 1:
        return
    together = "these ranks compute every micro-batch together"
    if settings.is_adaptive:
        yield refusal(
            "sequence parallelism",
            int(sequence_parallel),
            '1 with accumulation = "adaptive"',
            f'Set optimizer.params.accumulation to "fixed": {together}',
        )
    if SCHEDULES[settings.schedule].predicts_locally:
        alike = names_of(lambda row: not row.predicts_locally)
        yield refusal(
            "sequence parallelism",
            int(sequence_parallel),
            f'1 with optimizer.params.schedule = "{settings.schedule}"',
            f"Set the schedule to {alike} ({DEFAULT.name} needs gradient_accumulation_steps >= "
            f"{DEFAULT.least_micro_batches}): {together}, so all of them need the same weights",
        )


# What makes the ranks with the parts of one model compute with different copies of what they have alike: blocks and
# local predictions also depend on the elements beside it, which differ.
_NOT_IN_PARTS = (
    ("accumulation", lambda settings: settings.is_adaptive, '"fixed"'),
    ("estimate_comm", lambda settings: bool(settings.wire.estimate), '"full"'),
    ("commit_comm", lambda settings: bool(settings.wire.commit), '"full"'),
    (
        "schedule",
        lambda settings: SCHEDULES[settings.schedule].predicts_locally,
        f"{names_of(lambda row: not row.predicts_locally)} ({DEFAULT.name} needs gradient_accumulation_steps >= "
        f"{DEFAULT.least_micro_batches})",
    ),
)


def not_in_parts(settings: Settings) -> dict[str, str]:
    """Returns the keys that do not go together with tensor parallelism, and what is allowed of each."""
    return {key: allowed for key, is_given, allowed in _NOT_IN_PARTS if is_given(settings)}


def problems_of_tensor_parallel(settings: Settings, size: int) -> Iterator[str]:
    """Yields what does not go together with tensor parallelism over ``size`` ranks."""
    for key, allowed in not_in_parts(settings).items() if size > 1 else ():
        yield refusal(
            f"optimizer.params.{key}",
            getattr(settings, key),
            f"{allowed} with tensor parallelism over {size} ranks",
            "Set it so: these ranks compute every micro-batch together and need the same copy of what none of them has "
            "a part of",
        )


def problems_of_hosts(ranks_per_host: int | str, ranks: int) -> Iterator[str]:
    """Yields a problem for a ``ranks_per_host`` that does not divide the data-parallel ranks."""
    if isinstance(ranks_per_host, int) and ranks % ranks_per_host:
        yield (
            f"ACCO: optimizer.params.ranks_per_host = {ranks_per_host} is not allowed with {ranks} data-parallel "
            'ranks; allowed: a number that divides them, or "auto". With hosts of different size set 1'
        )


# ---- what is accepted


def without_effect(raw: Mapping[str, Any], settings: Settings, device_type: str) -> Iterator[str]:
    """Yields a line for each section with keys that change nothing, with the reasons."""
    given = [key for key in NO_EFFECT if key in section_of(raw, "zero_optimization")]
    if given:
        reasons = "; ".join(f"{key} ({NO_EFFECT[key]})" for key in given)
        yield f"accepted without effect in zero_optimization: {reasons}"
    idle = settings.without_effect(device_type)
    if idle:
        reasons = "; ".join(f"{key} ({reason})" for key, reason in idle.items())
        yield f"accepted without effect in optimizer.params: {reasons}"
    bf16 = section_of(raw, "bf16") or section_of(raw, "bfloat16")
    if bf16.get("enabled") and not bf16.get("check_grad_overflow", True):
        yield (
            "accepted without effect: bf16.check_grad_overflow = false; a step with a non-finite gradient is "
            "always skipped, and engine.skipped_steps counts it"
        )
