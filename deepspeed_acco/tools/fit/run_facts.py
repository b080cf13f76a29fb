# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Brings together what is known of a run: from options, from its DeepSpeed JSON, and from its log."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engine.json_checks import AUTO, names_acco, section_of, truth_of
from ..check.reading import batch_of, read_config, reading_of
from ..plan.command import DTYPE_BYTES
from ..plan.model import Model
from .log import Fact, Log

_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
# What no log and no JSON may leave open, and the option that says it.
_NEEDED = {
    "stage": "the ZeRO stage (--config, or --stage)",
    "params": "the trainable parameters (--params)",
    "ranks": "the data-parallel ranks (--ranks)",
    "n": "gradient_accumulation_steps (--config, or --n)",
    "micro_batch": "the micro-batch (--config, or --micro-batch-size)",
}
_ASSUMED = {
    "hosts": Fact(1, "assumed, --hosts says it"),
    "backend": Fact("nccl", "assumed, --backend says it"),
    "dtype": Fact("bf16", "assumed, --dtype says it"),
}


@dataclass(frozen=True)
class Run:
    """Describes the run that a log is of.

    Attributes:
        stage: of :data:`~deepspeed_acco.tools.plan.model.STAGES`.
        n: micro-batches of a step.
        micro_batch: samples of a rank's micro-batch; None where nothing needs it and nothing says it.
        overlaps: whether ``overlap_comm`` is on.
        offloads: whether the optimizer is offloaded.
        facts: what is known, by name, with its source.
    """

    stage: str
    n: int
    micro_batch: int | None
    ranks: int
    hosts: int
    model: Model
    backend: str
    overlaps: bool
    offloads: bool
    facts: Mapping[str, Fact]

    @property
    def stage_number(self) -> int:
        """Returns 0 to 3."""
        return int(self.stage[len("zero")])


def run_of(options: argparse.Namespace, log: Log) -> Run:
    """Returns what is known of the run: an option counts before the JSON, and that before the log.

    Raises:
        ValueError: something is missing, in contradiction, or says that there is nothing to find out.
    """
    given = read_config(options.config) if options.config else None
    facts = dict(_ASSUMED) | log.facts
    if "device" in log.facts:
        device = log.facts["device"]
        if device.value not in _BACKENDS:
            raise ValueError(f"the run of LOG is on {device.value!r}; allowed: {', '.join(_BACKENDS)}")
        facts["backend"] = Fact(_BACKENDS[device.value], device.source)
    options_facts = _facts_of_options(options)
    ranks = (options_facts.get("ranks") or facts.get("ranks") or Fact(None, "")).value
    for config, source in ((log.config, "the JSON in the log"), (given, "--config")):
        if config is not None:
            facts |= _facts_of_config(config, source, ranks)
    facts |= options_facts
    _note_n(facts, log)
    missing = [words for name, words in _NEEDED.items() if name not in facts and _is_needed(name, log)]
    if missing:
        raise ValueError(f"neither the log nor a JSON says {', nor '.join(missing)}. Give it")
    return _checked(facts)


def _is_needed(name: str, log: Log) -> bool:
    return name != "micro_batch" or bool(log.samples_per_s)


def _note_n(facts: dict[str, Fact], log: Log) -> None:
    """Notes n as the log counts it.

    Raises:
        ValueError: something else says another n.
    """
    if not log.steps:
        return
    ((seen, _),) = Counter(len(step.micro_batches) for step in log.steps).most_common(1)
    said = facts.get("n")
    if said is not None and said.value != seen:
        raise ValueError(
            f"n is {said.value} by {said.source}, but the steps of the log have {seen} micro-batches. Give what "
            "belongs to this log"
        )
    facts["n"] = Fact(seen, "lines of a step")


def _facts_of_options(options: argparse.Namespace) -> dict[str, Fact]:
    named = {"micro_batch": "micro_batch_size"}
    names = ("stage", "params", "ranks", "hosts", "n", "micro_batch", "dtype", "backend")
    found = {}
    for name in names:
        option = named.get(name, name)
        if getattr(options, option) is not None:
            found[name] = Fact(getattr(options, option), f"--{option.replace('_', '-')}")
    return found


def _facts_of_config(config: Mapping[str, Any], source: str, ranks: int | None) -> dict[str, Fact]:
    """Returns what a DeepSpeed JSON says; nothing of values that a trainer fills in.

    Raises:
        ValueError: it trains with ACCO already, or is none of DeepSpeed's.
    """
    if names_acco(config):
        raise ValueError(f'{source} has "type": "ACCO"; a log of plain ZeRO is needed. Or compare: `ds_acco compare`')
    parts = section_of(config, "tensor_parallel").get("autotp_size")
    if isinstance(parts, int) and parts > 1:
        raise ValueError(
            f"{source} has tensor_parallel.autotp_size = {parts}; allowed: data parallelism alone. This "
            "predicts nothing else; measure: `ds_acco compare`"
        )
    zero, reading = section_of(config, "zero_optimization"), reading_of(config)
    if reading.stage not in range(4):
        raise ValueError(f"{source}: zero_optimization.stage is {reading.stage!r}; allowed: 0, 1, 2, 3")
    found: dict[str, Any] = {"stage": reading.stage}
    micro, n = batch_of(config, ranks or 1) if _counts(config, ranks) else (None, None)
    found |= {"n": n, "micro_batch": micro}
    precisions = {name: truth_of(section_of(config, name).get("enabled")) for name in ("bf16", "bfloat16", "fp16")}
    if AUTO not in (section_of(config, name).get("enabled") for name in precisions):
        on = next((name for name, is_on in precisions.items() if is_on), "fp32")
        found["dtype"] = _DTYPE_NAMES.get(on, on)
    found["comm_dtype"] = config.get("communication_data_type")
    found["accumulation_dtype"] = section_of(config, "data_types").get("grad_accum_dtype")
    overlap = zero.get("overlap_comm")
    found["overlaps"] = reading.stage == 3 if overlap in (None, AUTO) else truth_of(overlap)
    found["reduces_to_each"] = truth_of(zero.get("use_multi_rank_bucket_allreduce", True)) is False
    found["offloads"] = reading.offload_device != "none"
    return {name: Fact(value, source) for name, value in found.items() if value not in (None, AUTO)}


def _counts(config: Mapping[str, Any], ranks: int | None) -> bool:
    """Tells whether the batch sizes of a JSON are such that n and the micro-batch follow from them.

    Raises:
        ValueError: one of them is no count.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = {name: config[name] for name in names if config.get(name) not in (None, AUTO)}
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} of the JSON is {value!r}; allowed: whole numbers >= 1")
    return len(values) > 0 and (ranks is not None or "train_batch_size" not in values or len(values) == len(names))


def _checked(facts: dict[str, Fact]) -> Run:
    values = {name: fact.value for name, fact in facts.items()}
    ranks, hosts, stage = values["ranks"], values["hosts"], values["stage"]
    if ranks == 1:
        raise ValueError(
            f"the run has one rank ({facts['ranks'].source}): it communicates nothing, so there is nothing to hide"
        )
    if ranks % hosts:
        raise ValueError(f"{ranks} ranks do not fill {hosts} hosts equally; give the right --hosts")
    facts.setdefault("overlaps", Fact(stage == 3, "DeepSpeed's default"))
    dtype = DTYPE_BYTES[values["dtype"]]
    others = [_bytes_of(values.get(name), dtype) for name in ("comm_dtype", "accumulation_dtype")]
    reduces_to_each = stage in (1, 2) and values.get("reduces_to_each", False)
    return Run(
        stage=f"zero{stage}{'-reduce' if reduces_to_each else ''}",
        n=values["n"],
        micro_batch=values.get("micro_batch"),
        ranks=ranks,
        hosts=hosts,
        model=Model(values["params"], dtype, *others),
        backend=values["backend"],
        overlaps=bool(facts["overlaps"].value),
        offloads=values.get("offloads", False),
        facts=facts,
    )


def _bytes_of(dtype: Any, otherwise: int) -> int:
    name = _DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    return DTYPE_BYTES.get(name, otherwise) if isinstance(name, str) else otherwise
