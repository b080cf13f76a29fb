# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lists all problems of a DeepSpeed JSON, each in the words in which ``deepspeed.initialize`` refuses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine.json_checks import (
    AUTO,
    check_window,
    names_acco,
    problems_of_adaptive,
    problems_of_engine,
    problems_of_hosts,
    problems_of_json,
    problems_of_name,
    problems_of_own_batches,
    problems_of_tensor_parallel,
    problems_of_values,
    refusal,
    section_of,
)
from ...settings import ACCO_KEYS, ADAMW_KEYS, AdamWKeys, Settings
from .reading import batch_of, reading_of
from .trainers import FilledBy, problems_with_trainer, without_filled

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_DEEPEST = 50  # objects and lists in one another
_FIRST = ("accumulation", "schedule")  # the keys with which others go together or not


@dataclass(frozen=True)
class Checked:
    """Holds what was found out about a JSON.

    Attributes:
        problems: in words, those that initialize would meet first at the front.
        settings: ACCO's, of the keys that are right; None: the JSON does not name ACCO.
        n: gradient_accumulation_steps; "auto": a trainer decides; None: it depends on the number of ranks, or on a
            problem.
    """

    problems: list[str] = field(default_factory=list)
    settings: Settings | None = None
    n: int | str | None = None


def checked(config: Mapping[str, Any], filled_by: FilledBy, ranks: int | None) -> Checked:
    """Returns all problems of a JSON.

    Args:
        ranks: data-parallel ones; None: not known.
    """
    if is_too_deep(config):
        return Checked([f"it is nested too deeply; allowed: {_DEEPEST} levels"])
    known = _without_autos(config, filled_by)
    name = [*problems_of_name(config)]
    if name or not names_acco(config):
        of_values = [problem.removeprefix("ACCO: ") for problem in problems_of_values(known)]
        of_batch = [] if of_values else list(problems_of_batch(config, ranks))
        return Checked([*name, *of_values, *of_batch], n=None if of_values or of_batch else n_of(config, ranks))
    problems = [*(problems_with_trainer(config) if filled_by is FilledBy.HF else ()), *problems_of_json(known)]
    has_batch = not any(f"ACCO: {key} = " in problem for key in BATCH_KEYS for problem in problems)
    of_batch = list(problems_of_batch(config, ranks)) if has_batch else []
    n = n_of(config, ranks) if has_batch and not of_batch else None
    params = section_of(section_of(known, "optimizer"), "params")
    of_params, settings = _problems_of_params(params, n if isinstance(n, int) else None)
    problems += [*of_batch, *of_params, *_problems_in_the_engine(known, settings, n, filled_by, ranks)]
    if isinstance(n, int):
        try:
            check_window(n, settings)
        except ValueError as no_room:
            problems.append(str(no_room))
    return Checked(list(dict.fromkeys(problems)), settings, n)


def is_too_deep(config: Mapping[str, Any]) -> bool:
    """Tells whether objects and lists are nested more deeply than any that is read here."""
    left: list[tuple[Any, int]] = [(config, 0)]
    while left:
        value, depth = left.pop()
        if depth > _DEEPEST:
            return True
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += [(part, depth + 1) for part in inside]
    return False


def _without_autos(config: Mapping[str, Any], filled_by: FilledBy) -> dict[str, Any]:
    if filled_by is FilledBy.NOBODY:
        return dict(config)
    if filled_by is FilledBy.HF:
        return without_filled(config)
    left = _without_all_autos(config)
    if names_acco(config):  # some of whose keys may be "auto" for themselves
        params = section_of(config["optimizer"], "params")
        own = {key: value for key, value in params.items() if value != AUTO or key in ACCO_KEYS}
        left["optimizer"] = {**left["optimizer"], **({"params": own} if params else {})}
    return left


def _without_all_autos(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_all_autos(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != AUTO
    }


def _problems_of_params(params: Mapping[str, Any], n: int | None) -> tuple[list[str], Settings]:
    """Returns what is wrong with AdamW's and ACCO's keys, and the settings of those that are right."""
    problems: list[str] = []
    right: dict[str, Any] = {}
    for key in ADAMW_KEYS:
        if key in params:
            try:
                AdamWKeys(**{key: params[key]})
            except ValueError as wrong:
                problems.append(str(wrong))
    for key in (*_FIRST, *(key for key in ACCO_KEYS if key not in _FIRST)):
        if key in params:
            try:
                made = Settings(**right, **{key: params[key]})
                if n is not None:
                    made.of_window(n)
                right[key] = params[key]
            except ValueError as wrong:
                problems.append(str(wrong))
    return problems, Settings(**right)


def _problems_in_the_engine(
    config: Mapping[str, Any], settings: Settings, n: int | str | None, filled_by: FilledBy, ranks: int | None
) -> Iterator[str]:
    read = reading_of(config)
    yield from problems_of_engine(config, read)
    if settings.is_adaptive:
        yield from problems_of_adaptive(config, read, "true" if filled_by is FilledBy.HF else None)
    if ranks is not None:
        yield from problems_of_hosts(settings.ranks_per_host, ranks)
    parts = section_of(config, "tensor_parallel").get("autotp_size")
    if isinstance(parts, int) and (settings.schedule != AUTO or isinstance(n, int)):
        yield from problems_of_tensor_parallel(settings.of_window(n) if isinstance(n, int) else settings, parts)
    together = config.get("sequence_parallel_size")
    if "data_parallel_size" in config and isinstance(together, int) and settings.schedule != AUTO:
        yield from problems_of_own_batches(settings, together)


# ---- batches


def n_of(config: Mapping[str, Any], ranks: int | None) -> int | str | None:
    """Returns gradient_accumulation_steps, "auto", or None where it follows from the number of ranks, which is not
    known. There is no problem with the batch."""
    given = [config.get(key) for key in BATCH_KEYS]
    if ranks is None and AUTO not in given and given[2] is None and None not in given[:2]:
        return None
    return batch_of(config, ranks or 1)[1]


def problems_of_batch(config: Mapping[str, Any], ranks: int | None) -> Iterator[str]:
    """Yields a problem for counts, each of them allowed, of which DeepSpeed cannot make whole micro-batches.

    Args:
        ranks: None: not known; it may be any.
    """
    given = {key: config[key] for key in BATCH_KEYS if config.get(key) is not None}
    if AUTO in given.values():
        return
    whole = given.get("train_batch_size")
    if whole is None:
        if "train_micro_batch_size_per_gpu" not in given:
            yield "there is neither train_batch_size nor train_micro_batch_size_per_gpu. Set one of them"
        return
    micro, n = batch_of(config, ranks or 1)
    product = micro * n * (ranks or 1)
    if whole != product and (ranks is not None or len(given) < 3 or not product or whole % product):
        others = " and ".join(f"{key} = {value}" for key, value in given.items() if key != "train_batch_size")
        allowed = "train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks"
        allowed += f", of {ranks} ranks" if ranks is not None else ""
        yield refusal("train_batch_size", whole, allowed + (f", with {others}" if others else ""), "Change one of them")
