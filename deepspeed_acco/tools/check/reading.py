# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a DeepSpeed JSON without DeepSpeed, as DeepSpeed reads it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine.json_checks import AUTO, Reading, section_of, truth_of
from ..typed_json import load
from ..words import shown

_LARGEST_WHOLE = 1e10  # of numbers with a point or an exponent that hjson takes for whole ones


def read_config(path: Path, *, by_deepspeed: bool = True) -> dict[str, Any]:
    """Returns the contents of a DeepSpeed JSON.

    Args:
        by_deepspeed: which reads Hjson, so also comments, and a number like 2.0 as a whole one; HF Trainer does not.

    Raises:
        ValueError: no file, or no JSON; names the file.
    """
    if not path.is_file():
        raise ValueError(f"CONFIG {path} is not a file; give the path of a DeepSpeed JSON")
    parse_float = _as_hjson if by_deepspeed else _finite
    try:
        config = load(path, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=parse_float)
    except ValueError as cause:
        config = _read_hjson(path) if by_deepspeed and isinstance(cause, json.JSONDecodeError) else None
        if config is None:
            raise ValueError(f"CONFIG {path} is not JSON: {cause}") from cause
    if not isinstance(config, dict):
        raise ValueError(f"CONFIG {path} is not a DeepSpeed JSON: it holds {shown(config)}; allowed: an object")
    return config


def _read_hjson(path: Path) -> dict[str, Any] | None:
    """Returns None where it holds no object, or nothing is there to read it."""
    try:
        import hjson  # comes with DeepSpeed
    except ImportError:
        return None
    try:
        content = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (hjson.HjsonDecodeError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    ((key, count),) = Counter(key for key, _ in pairs).most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(f"the key {shown(key)} stands {count} times in one object. Remove all but one")
    return dict(pairs)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:60]} is too large for a number")
    return value


def _as_hjson(digits: str) -> int | float:
    value = _finite(digits)
    return int(value) if value.is_integer() and abs(value) < _LARGEST_WHOLE else value


def reading_of(config: Mapping[str, Any]) -> Reading:
    """Returns what DeepSpeed makes of the keys that it reads in several spellings. In its sections it takes a value
    "auto" for a missing one; a stage that it does not know stays as it was given."""
    zero = _given(section_of(config, "zero_optimization"))
    offload = _given(section_of(zero, "offload_optimizer"))
    device = offload.get("device", "none")
    if truth_of(zero.get("cpu_offload")):  # its older name
        device = "cpu"
    return Reading(
        stage=int(config["zero_optimization"] is True) if _is_switch(config) else _stage_of(zero.get("stage", 0)),
        offload_device=str(device),
        has_zenflow=zero.get("zenflow") is not None,
        has_elastic_checkpoint=bool(truth_of(zero.get("elastic_checkpoint", False))),
        has_fp16=bool(truth_of(section_of(config, "fp16").get("enabled", False))),
    )


def _is_switch(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("zero_optimization"), bool)


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value != AUTO}


def _stage_of(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal() and len(value) == 1:
        return int(value)
    return int(value) if isinstance(value, (bool, int, float)) and value in range(4) else value


def batch_of(config: Mapping[str, Any], world_size: int) -> tuple[Any, Any]:
    """Returns (micro-batch, n) of a DeepSpeed JSON, by DeepSpeed's rules; "auto" stays."""
    whole = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    n = config.get("gradient_accumulation_steps")
    if AUTO in (whole, micro, n):
        return micro, n
    if micro is None and whole is not None:
        micro = whole // (world_size * (n or 1))
    if n is None:
        n = whole // (world_size * micro) if whole is not None and micro else 1
    return micro, n
