# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the DeepSpeed JSONs of a comparison, and refuses what cannot be trained with, or would not train the same."""

from __future__ import annotations

import copy
import logging
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...algorithm.schedules import BLOCKING, SCHEDULES
from ...settings import ACCO_KEYS, ADAMW_KEYS, AdamWKeys, Settings
from ..typed_json import load
from ..words import shown

REFERENCE = "reference"  # the runs of schedule sync that C and R come from
REFERENCE_KEYS = ("lane", "comm_timeout_s")  # ACCO's keys that it takes over
AUTO = "auto"  # HF Trainer and Accelerate write a value in its place
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_PRECISIONS = {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16",)}
_LARGEST_COUNT = 10**9
_DEEPEST = 50  # objects and lists in one another
_LONGEST = 300  # letters of what DeepSpeed says


# ---- reading


def read_configs(paths: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns the contents and the path of each JSON, by its stem.

    Raises:
        ValueError: no file, no JSON as DeepSpeed reads it, or a name that cannot be one; names the file.
    """
    configs: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for path in paths:
        name = path.stem
        if not path.is_file():
            raise ValueError(f"CONFIG {path} is not a file; give the path of a DeepSpeed JSON")
        if not name.isprintable() or name in (".", ".."):
            raise ValueError(f"CONFIG {path} has the name {shown(name)}; allowed: what can be printed. Rename it")
        if name in configs or name == REFERENCE:
            other = files.get(name, "the reference")
            raise ValueError(f"CONFIG {path} and {other} have the same name, {name!r}. Rename one of them")
        try:
            config = load(path, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
        except ValueError as cause:
            raise ValueError(f"CONFIG {path} is not JSON: {cause}") from cause
        if not isinstance(config, dict):
            raise ValueError(f"CONFIG {path} is not a DeepSpeed JSON: it holds {shown(config)}; allowed: an object")
        configs[name], files[name] = config, str(path)
    return configs, files


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


# ---- what is allowed


def check(file: str, config: Mapping[str, Any], world_size: int, is_filled: bool) -> None:
    """Raises ValueError for what the ranks would refuse when they start, or what cannot be compared: names the file,
    the key, its value, and what is allowed.

    Args:
        is_filled: whether the script may write values in the place of every ``auto``.
    """
    try:
        has_auto = _check_places(config, is_filled)
        optimizer = _section(config, "optimizer")
        params = _section(optimizer, "params", "optimizer.params")
        name = optimizer.get("type")
        is_name = isinstance(name, str) and name.strip() == name != ""
        if "optimizer" in config and (not is_name or name != "ACCO" and str(name).lower() == "acco"):
            raise _refusal("optimizer.type", name, '"ACCO", or the name of another optimizer')
        _check_batch(config, world_size)
        _check_precision_and_clipping(config)
        micro, n = batch_of(config, world_size)
        if name == "ACCO":
            _check_acco(config, params, n)
        if not has_auto:
            stage = _stage_by_deepspeed(config, micro, n)
            if name == "ACCO" and stage != 1:
                raise _refusal("zero_optimization.stage", stage, "1 with the optimizer ACCO")
    except ValueError as cause:
        raise ValueError(f"CONFIG {file}: {cause}") from cause


def _refusal(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} is {shown(value)}; allowed: {allowed}")


def _section(config: Mapping[str, Any], key: str, place: str = "") -> Mapping[str, Any]:
    section = config.get(key, {})
    if not isinstance(section, dict):
        raise _refusal(place or key, section, "an object")
    return section


def _check_places(config: Mapping[str, Any], is_filled: bool) -> bool:
    """Tells whether a value is left to be filled in; raises ValueError where nobody does, or nested too deeply."""
    optimizer = config.get("optimizer")
    is_acco = isinstance(optimizer, dict) and optimizer.get("type") == "ACCO"
    own = {f"optimizer.params.{key}" for key in ACCO_KEYS} if is_acco else set()  # some may be "auto" for themselves
    has_auto = False
    left: list[tuple[str, Any, int]] = [("", config, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > _DEEPEST:
            raise ValueError(f"{place[:60]}... is nested too deeply; allowed: {_DEEPEST} levels")
        if isinstance(value, dict):
            left += [(f"{place}.{key}" if place else key, inside, depth + 1) for key, inside in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}[{index}]", inside, depth + 1) for index, inside in enumerate(value)]
        elif value == AUTO and place not in own:
            if not is_filled:
                raise ValueError(
                    f'{place} is "auto", which HF Trainer and Accelerate fill in, and this script does not; allowed: '
                    "a value. Write it, or give the --script of a trainer"
                )
            has_auto = True
    return has_auto


def _check_batch(config: Mapping[str, Any], world_size: int) -> None:
    """Raises ValueError for batch sizes of which DeepSpeed cannot make whole micro-batches."""
    given = {key: config[key] for key in _BATCH_KEYS if config.get(key) is not None}
    for key, value in given.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_COUNT
        if not is_count and value != AUTO:
            raise _refusal(key, value, f"a whole number from 1 to {_LARGEST_COUNT:,}")
    if AUTO in given.values():
        return
    whole = given.get("train_batch_size")
    if whole is None and "train_micro_batch_size_per_gpu" not in given:
        raise ValueError("there is neither train_batch_size nor train_micro_batch_size_per_gpu. Set one of them")
    micro, n = batch_of(config, world_size)
    if whole is not None and whole != micro * n * world_size:
        others = " and ".join(f"{key} = {value}" for key, value in given.items() if key != "train_batch_size")
        what = "train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks"
        with_others = f", with {others}" if others else ""
        raise _refusal("train_batch_size", whole, f"{what}, of {world_size} ranks{with_others}")


def _check_precision_and_clipping(config: Mapping[str, Any]) -> None:
    for key in (key for keys in _PRECISIONS.values() for key in keys):
        enabled = _section(config, key).get("enabled", False)
        if not isinstance(enabled, bool) and enabled != AUTO:
            raise _refusal(f"{key}.enabled", enabled, "true or false")
    clipping = config.get("gradient_clipping", 0.0)
    is_number = isinstance(clipping, (int, float)) and not isinstance(clipping, bool)
    if clipping != AUTO and not (is_number and clipping >= 0):
        raise _refusal("gradient_clipping", clipping, "a number >= 0; 0 does not clip")


def _check_acco(config: Mapping[str, Any], params: Mapping[str, Any], n: Any) -> None:
    """Raises ValueError for what ACCO refuses: what the engine checks before it has a model, and the keys' values."""
    with _quiet():
        from ...engine import checks

        checks.check_json({key: value for key, value in config.items() if value != AUTO})
    AdamWKeys(**{key: params[key] for key in ADAMW_KEYS if key in params and params[key] != AUTO})
    settings = Settings(**{key: params[key] for key in ACCO_KEYS if key in params})
    if n != AUTO:
        checks.check_window(n, settings)


def _stage_by_deepspeed(config: Mapping[str, Any], micro: int, n: int) -> int:
    """Returns ZeRO's stage; raises ValueError with what DeepSpeed itself has against the JSON."""
    # It would look for ranks, which there are not yet; that the batch is that of so many has been checked.
    alone = {key: value for key, value in config.items() if key not in _BATCH_KEYS}
    alone |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": n}
    with _quiet():
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            return int(DeepSpeedConfig(copy.deepcopy(alone)).zero_optimization_stage)
        except Exception as cause:  # whatever its parts make of it
            said = textwrap.shorten(f"{type(cause).__name__}: {cause}", _LONGEST)
            raise ValueError(f"DeepSpeed refuses it: {said}") from cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what DeepSpeed logs on the way: the runs log it again."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# ---- what they say


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


def _precision_of(config: Mapping[str, Any]) -> str:
    for name, keys in _PRECISIONS.items():
        for key in keys:
            enabled = config.get(key, {}).get("enabled", False)
            if enabled:
                return name if enabled is True else f"{name} {enabled}"
    return "fp32"


def require_alike(configs: Mapping[str, Mapping[str, Any]], world_size: int) -> None:
    """Raises ValueError unless all train the same batch in the same precision with the same clipping."""
    described = {}
    for name, config in configs.items():
        micro, n = batch_of(config, world_size)
        described[name] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": n,
            "precision (bf16, fp16)": _precision_of(config),
            "gradient_clipping": config.get("gradient_clipping", 0.0),
        }
    first, *others = described
    for other in others:
        for key, value in described[first].items():
            if described[other][key] != value:
                raise ValueError(
                    f"{key} is {value!r} in {first} and {described[other][key]!r} in {other}: they would not train "
                    "the same. Set it alike in all CONFIGs"
                )


def measures_reference(config: Mapping[str, Any]) -> bool:
    """Tells whether a JSON's runs measure C and R: its schedule overlaps nothing, and its rounds are in full."""
    optimizer = config.get("optimizer", {})
    params = optimizer.get("params", {})
    row = SCHEDULES.get(str(params.get("schedule", AUTO)))
    is_in_full = params.get("commit_comm", Settings.commit_comm) == Settings.commit_comm
    return optimizer.get("type") == "ACCO" and row is not None and row.blocks and is_in_full


def reference_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of the same training by ACCO's schedule ``sync``, where nothing communicates outside the step.

    Raises:
        ValueError: without an optimizer in the JSON.
    """
    if "optimizer" not in config:
        raise ValueError(
            f"CONFIG {name} has no optimizer, and the reference (ACCO's schedule sync) is derived from the first "
            "CONFIG. Give another one first"
        )
    derived = copy.deepcopy(dict(config))
    params = derived["optimizer"].get("params", {})
    # ACCO's other keys are of no meaning without overlap, or refused there.
    params = {key: params[key] for key in (*ADAMW_KEYS, *REFERENCE_KEYS) if key in params}
    if derived["optimizer"].get("type") != "ACCO":
        derived["zero_optimization"] = {"stage": 1}
    derived["optimizer"] = {"type": "ACCO", "params": {**params, "schedule": BLOCKING.name}}
    return derived
