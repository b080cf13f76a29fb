# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says what a JSON without problems comes to, what in it has no effect, and what only the run tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from ...algorithm.schedules import AUTO as AUTO_SCHEDULE
from ...algorithm.schedules import DEFAULT, DEFAULT_OF_ONE, SCHEDULES, chosen
from ...algorithm.window import phase_a_micro_batches
from ...engine.json_checks import AUTO, check_window, not_in_parts, section_of, without_effect
from ...settings import ACCO_KEYS, Settings
from ..words import listed, shown
from .problems import Checked
from .trainers import ARGUMENTS, FilledBy, autos_of

_ALWAYS = (
    "refused where the run has them: several pipeline stages, MoE layers, trainable parameters of several dtypes, "
    "devices other than CPU and CUDA"
)


def notes_on(config: Mapping[str, Any], found: Checked, filled_by: FilledBy) -> Iterator[str]:
    """Yields what the JSON comes to, a line each."""
    if found.settings is None:
        if not found.problems:
            yield _not_acco(config, filled_by)
        return
    if not found.problems:
        yield f"the schedule is {_schedule(found.settings, found.n)}"
    yield from without_effect(config, found.settings, "cuda")
    if filled_by is FilledBy.HF:
        yield from _in_words_of_hf(config)
    else:
        told = "\n".join(found.problems)
        for place in autos_of(config):
            if place.removeprefix("optimizer.params.") not in ACCO_KEYS and f"{place} = " not in told:
                yield f'{place} = "auto": nobody fills it but HF Trainer (--hf); DeepSpeed takes its default'


def _not_acco(config: Mapping[str, Any], filled_by: FilledBy) -> str:
    name = section_of(config, "optimizer").get("type")
    if name is not None:
        return f"it does not train with ACCO, but with optimizer.type = {shown(name)}; see `ds_acco init --from`"
    if filled_by is FilledBy.HF:
        return "it does not train with ACCO: without an optimizer in the JSON, HF Trainer makes its own"
    return "it names no optimizer: ACCO trains where the script gives deepspeed.initialize a deepspeed_acco.ACCO"


def _schedule(settings: Settings, n: int | str | None) -> str:
    name = settings.schedule
    if not isinstance(n, int):
        least = DEFAULT.least_micro_batches
        of_one = f"{DEFAULT_OF_ONE.name} where gradient_accumulation_steps is 1, {DEFAULT.name} from {least} on"
        return of_one if name == AUTO_SCHEDULE else name
    schedule = chosen(name, n)
    words = f"{schedule}, as gradient_accumulation_steps is {n}" if name == AUTO_SCHEDULE else schedule
    if not SCHEDULES[schedule].has_two_phases:
        return words
    a = phase_a_micro_batches(n, settings.first_estimate_fraction)
    return f"{words}: of {n} micro-batches {a} in phase A, {n - a} in phase B"


def _in_words_of_hf(config: Mapping[str, Any]) -> Iterator[str]:
    autos = set(autos_of(config))
    filled = [f"{key} by {' and '.join(ARGUMENTS[key])}" for key in ARGUMENTS if key in autos]
    if filled:
        yield f'HF Trainer fills "auto": {listed(filled)}'
    fixed = [words for key in ARGUMENTS if not key.endswith(".enabled") for words in _as_arguments(config, key)]
    if fixed:
        given = " ".join(dict.fromkeys(fixed))
        yield f"HF Trainer refuses other values than the JSON's, its own defaults, too; so give {given}"


def _as_arguments(config: Mapping[str, Any], key: str) -> list[str]:
    """Returns how the command line gives the value that the JSON has; none where it has none, or "auto"."""
    *sections, last = key.split(".")
    for section in sections:
        config = section_of(config, section)
    value = config.get(last)
    if value is None or value == AUTO:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"{argument} {part}" for argument, part in zip(ARGUMENTS[key], values)]


def of_the_run(config: Mapping[str, Any], found: Checked, ranks: int | None, filled_by: FilledBy) -> Iterator[str]:
    """Yields what is refused or not, or decided, only when ranks and model are there."""
    settings = found.settings
    if ranks is None and not found.problems:
        yield from _of_ranks(config, found)
    if settings is None:
        return
    if ranks is None and isinstance(settings.ranks_per_host, int) and settings.ranks_per_host > 1:
        yield f"optimizer.params.ranks_per_host = {settings.ranks_per_host} must divide the data-parallel ranks"
    if not isinstance(found.n, int) and not found.problems:
        for n in (1, 2):
            try:
                check_window(n, settings)
            except ValueError as refused:
                yield f"with gradient_accumulation_steps = {n} refused: {refused}"
    if settings.is_adaptive and filled_by is not FilledBy.HF:
        yield 'accumulation = "adaptive" is refused under HF Trainer and Accelerate, and with a PipelineModule'
    schedules = {chosen(settings.schedule, n) for n in ((found.n,) if isinstance(found.n, int) else (1, 2))}
    if settings.is_adaptive or any(SCHEDULES[name].predicts_locally for name in schedules):
        which = "adaptive windows" if settings.is_adaptive else "the schedule local"
        yield f"sequence parallelism is refused with {which}"
    in_whole = {f"{key} {getattr(each, key)}" for each in _possible(settings, found.n) for key in not_in_parts(each)}
    if in_whole:
        yield f"tensor parallelism is refused with {listed(sorted(in_whole))}"
    yield _ALWAYS


def _possible(settings: Settings, n: int | str | None) -> Iterator[Settings]:
    """Yields the settings of windows that they do not refuse."""
    for each in (n,) if isinstance(n, int) else (1, 2):
        with suppress(ValueError):
            yield settings.of_window(each)


def _of_ranks(config: Mapping[str, Any], found: Checked) -> Iterator[str]:
    whole, n = config.get("train_batch_size"), found.n
    micro: Any = config.get("train_micro_batch_size_per_gpu")
    if not isinstance(whole, int) or AUTO in (micro, n):
        return
    if not isinstance(n, int):
        both, least = whole // micro, DEFAULT.least_micro_batches
        is_auto = found.settings is not None and found.settings.schedule == AUTO_SCHEDULE
        up_to = f": {DEFAULT.name} up to {both // least} ranks" if is_auto and both >= least else ""
        yield f"gradient_accumulation_steps is {both} / data-parallel ranks, which must divide it{up_to}"
    elif micro is None:
        yield f"train_batch_size / gradient_accumulation_steps is {whole // n}, which the ranks must divide"
    else:
        yield f"it runs on {whole // (micro * n)} data-parallel ranks and no other number"
