# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco plan``: reads a model, a cluster and a step that the user describes or has measured, and prints what
model.py predicts and advice.py advises. Everything printed is labelled as prediction."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...algorithm.schedules import DEFAULT
from ...algorithm.window import phase_a_micro_batches
from .. import units
from ..compare.results import read_results
from ..subcommand import INTERRUPTED, add_parser, complain
from . import calibrate as calibration
from . import model as plan
from .advice import COARSEST, COARSEST_OF_BOTH, Advice, advise, best_stage, seconds, stops_paying
from .model import Cluster, Model, Work

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Seconds of AdamW per parameter: 28 bytes at 2.8 TB/s (an H100's memory); the measured CPU kernel, rounded up.
UPDATE_S = {"nccl": 1e-11, "gloo": 1e-9}
# NCCL's own figure for a step of a ring on a network (src/graph/tuning.cc: 9.6 us); an assumption for TCP.
LATENCY_S = {"nccl": 10e-6, "gloo": 50e-6}
_MEASURED_BY_RESULTS = (
    *("params", "model", "micro_batch_ms", "micro_batch_size", "n", "round_ms", "backend"),
    *("dtype", "comm_dtype", "accumulation_dtype"),
)
_SWEEP_UP_TO = 4096
# Of the table over hosts: how many, ranks of each, Gbit/s of each.
_SWEPT_HOSTS, _SWEPT_IN_HOST, _SWEPT_GBIT = (2, 4, 8), (1, 2, 4, 8), (1, 10, 25, 100)
_OVER_HOSTS = (DEFAULT.name, COARSEST.name, COARSEST_OF_BOTH.name)


@dataclass(frozen=True)
class Inputs:
    """Holds what a plan is made of; ``micro_batch_size`` is in samples, 1 where it is not known. ``measured_ranks``:
    those that were measured, where the plan is for another number of them."""

    model: Model
    cluster: Cluster
    work: Work
    micro_batch_size: int = 1
    measured_ranks: int | None = None


def from_measurement(
    header: Mapping[str, Any],
    compute_s: float,
    round_s: float,
    *,
    latency_s: float = 0.0,
    hosts: int | None = None,
    two_levels: bool = True,
    inside_bandwidth: float | None = None,
    update_s_per_parameter: float | None = None,
) -> Inputs:
    """Returns a plan's inputs from a short measured run: the network is the one that makes a round as long as measured.

    Args:
        header: the first line of a rank's record: ``world_size``, ``numel``, ``weight_bytes``, ``comm_bytes``, ``n``,
            ``micro_batch`` (samples) and ``device``; ``a``, if there and not None, becomes ``estimate_fraction``, and
            without ``accumulation_bytes`` gradients are taken to be summed in the weights' dtype.
        compute_s: C, the computation of one whole step.
        round_s: R, one round with nothing beside it.
        latency_s: the part of R that does not depend on the bytes, per message; 0: all of R scales with its bytes.
        hosts, two_levels, inside_bandwidth: of the :class:`Cluster` that was measured.
        update_s_per_parameter: None: that of the device (module constants).

    Raises:
        ValueError: for a header without one of these keys, and for what :func:`plan.calibrated` refuses.
    """
    keys = ("world_size", "numel", "weight_bytes", "comm_bytes", "n", "micro_batch", "device")
    missing = [key for key in keys if key not in header]
    if missing:
        raise ValueError(
            f"plan: the record's header has no {', '.join(missing)}. Record the run again with this version"
        )
    if header["device"] not in ("cpu", "cuda"):
        raise ValueError(f"plan: device = {header['device']!r} is not allowed; allowed: cpu, cuda")
    backend = "nccl" if header["device"] == "cuda" else "gloo"
    update_s = UPDATE_S[backend] if update_s_per_parameter is None else update_s_per_parameter
    n, a = header["n"], header.get("a")
    weight_bytes = header["weight_bytes"]
    summed_bytes = header.get("accumulation_bytes") or weight_bytes
    model = Model(header["numel"], weight_bytes, header["comm_bytes"], summed_bytes)
    work = Work(compute_s / n, n, update_s, None if a is None else a / n)
    anywhere = Cluster(
        header["world_size"],
        1.0,
        latency_s,
        backend,
        hosts,
        two_levels=two_levels,
        inside_bandwidth=inside_bandwidth,
    )
    return Inputs(model, plan.calibrated(model, anywhere, work, round_s), work, header["micro_batch"])


def from_results(path: str | Path, **options) -> Inputs:
    """Returns a plan's inputs from ``results.json`` of ``ds_acco compare``; ``options`` as in :func:`from_measurement`.

    Raises:
        ValueError: when the file is not one, or nothing was measured in it.
    """
    try:
        results = read_results(Path(path))
    except ValueError as cause:
        raise ValueError(f"plan: --results {cause}") from cause
    times, n, ranks, samples = results.reference.times, results.n, results.world_size, results.samples_per_step
    if times is None or not n or not ranks or samples is None:
        failed = f": {results.reference.failed}" if results.reference.failed else ""
        raise ValueError(f"plan: --results {path} has no measured C and R{failed}. Run `ds_acco compare` again")
    header = asdict(results.model) | {"world_size": ranks, "n": n, "device": results.device}
    if not samples or samples % (n * ranks):
        raise ValueError(
            f"plan: --results {path}: samples_per_step is {samples}; allowed: multiples of {n * ranks}, n x world_size"
        )
    header["micro_batch"] = samples // (n * ranks)
    known = {key: value for key, value in header.items() if value is not None}
    try:
        return from_measurement(known, *times, **options)
    except ValueError as cause:
        raise ValueError(f"plan: --results {path}: {str(cause).removeprefix('plan: ')}") from cause


def count_parameters(name: str) -> int:
    """Counts the trainable parameters of a transformers model, built on the meta device, so without its weights.

    Args:
        name: a name on the hub, a folder with a config.json, or such a file.

    Raises:
        ValueError: when there is no such config, or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as cause:
        raise ValueError(f"plan: --model needs transformers ({cause}). Install it, or give --params") from cause
    try:
        if Path(name).is_file():
            config = transformers.AutoConfig.for_model(**json.loads(Path(name).read_text()))
        else:
            config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            try:
                model = transformers.AutoModelForCausalLM.from_config(config)
            except ValueError:  # not a causal language model
                model = transformers.AutoModel.from_config(config)
    except Exception as cause:  # whatever transformers makes of what it says
        raise ValueError(
            f"plan: --model {name!r} gives no model: {textwrap.shorten(str(cause), 200)}. Allowed: a name on the hub, "
            "a folder with config.json, such a file with its model_type; or give --params"
        ) from cause
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- arguments


def add_command(commands) -> None:
    """Adds ``plan`` to the subcommands of ``ds_acco`` (the object of ``add_subparsers``)."""
    parser = add_parser(
        commands,
        "plan",
        help="predicts time and memory of a step under each ZeRO stage and ACCO schedule, and says what to set",
        description="Predicts time and memory of a step under each ZeRO stage and ACCO schedule. The terms and their "
        "sources are in docs/explanation/plan-formulas.md.",
        usage="%(prog)s (--params N | --model CONFIG | --results FILE | --calibrate CONFIG) [options] "
        "[-- ARGUMENTS OF THE SCRIPT]",
        example="ds_acco plan --params 7B --ranks 64 --hosts 8 --bandwidth 100gbit --micro-batch-ms 300 --n 24\n"
        "ds_acco plan --results runs/compare/results.json --sweep-ranks\n"
        "ds_acco plan --calibrate ds_configs/acco.json --num_accelerators 2",
    )
    add = parser.add_argument_group("model").add_argument
    add("--params", type=units.count, metavar="N", help="trainable parameters, for example 7B or 7e9")
    add("--model", metavar="CONFIG", help="instead: a transformers config (name, folder or .json), built and counted")
    add("--results", metavar="FILE", help="instead of all of it: results.json of ds_acco compare")
    add("--dtype", choices=DTYPE_BYTES, help="of the weights (default: bf16)")
    add("--comm-dtype", choices=DTYPE_BYTES, help="of the gradients sent (default: that of the weights)")
    add("--accumulation-dtype", choices=DTYPE_BYTES, help="of the gradients summed (default: that of the weights)")
    add = parser.add_argument_group("cluster").add_argument
    add("--ranks", type=units.count, metavar="N", help="data-parallel ranks; with measured figures: for so many")
    add("--hosts", type=units.count, metavar="N", help="they share the ranks equally (default: one rank in each)")
    add(
        "--bandwidth",
        type=units.bandwidth,
        metavar="RATE",
        help="of one host in one direction: 300mbit, 100gbit, 12.5GB/s",
    )
    add(
        "--latency",
        type=units.duration,
        metavar="TIME",
        help="of one message (default: 10us with nccl, 50us with gloo)",
    )
    add(
        "--efficiency",
        type=units.positive,
        metavar="SHARE",
        help="part of the bandwidth that carries payload (default: 0.9 nccl, 0.956 gloo)",
    )
    add(
        "--inside-bandwidth",
        type=units.bandwidth,
        metavar="RATE",
        help="of one rank inside its host, payload (default: 100GB/s nccl, 2GB/s gloo)",
    )
    add("--flat", action="store_true", help='as with "ranks_per_host": 1, all of ACCO\'s ranks in one level')
    add("--round-ms", type=units.time_in("ms"), metavar="MS", help="a measured round; the network makes it so long")
    add("--backend", choices=plan.BACKENDS, help="default: nccl")
    add(
        "--device-memory",
        type=units.size,
        metavar="SIZE",
        help="of one rank, for model states, for example 80GB: stages that do not fit are not compared",
    )
    add = parser.add_argument_group("step").add_argument
    add("--micro-batch-ms", type=units.time_in("ms"), metavar="MS", help="forward and backward of one micro-batch")
    add("--micro-batch-size", type=units.count, metavar="N", help="its samples: lets the advice cut it")
    add("--n", type=units.count, metavar="N", help="gradient_accumulation_steps")
    add(
        "--estimate-fraction",
        type=units.positive,
        metavar="SHARE",
        help="ACCO's key (default: 0.5 for acco, the best one where rounds are quantized)",
    )
    add(
        "--update-ns",
        type=units.time_in("ns"),
        metavar="NS",
        help="AdamW per parameter in ns (default: 0.01 with nccl, 1 with gloo)",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--also",
        choices=plan.modes(),
        nargs="+",
        default=(),
        metavar="MODE",
        help="rows that the table has not by itself, for example sync-commit8 local-commit8",
    )
    add(
        "--sweep-ranks",
        type=units.count,
        nargs="*",
        metavar="N",
        help=f"also a table over ranks (default: to {_SWEEP_UP_TO})",
    )
    add("--sweep-hosts", action="store_true", help="also a table over hosts, ranks of a host, and bandwidths")
    add("--json", metavar="FILE", help="also write the figures there")
    calibration.add_arguments(parser)
    parser.set_defaults(run=run, takes_script_arguments=True)


def _require_options(options: argparse.Namespace, names: list[str], reason: str) -> None:
    for name in names:
        if getattr(options, name) is None:
            raise ValueError(f"plan: --{name.replace('_', '-')} is missing; {reason}")


def inputs_of(options: argparse.Namespace) -> Inputs:
    """Returns what the parsed arguments describe; ``--calibrate`` measures it first.

    Raises:
        ValueError: for arguments that are missing, contradict one another, or that model.py refuses.
        MeasurementFailed: the measured run failed.
    """
    if options.calibrate is None:
        calibration.refuse_without(options)
    if options.results is not None or options.calibrate is not None:
        inputs = _inputs_of_results(options)
    else:
        inputs = _inputs_of_arguments(options)
    if options.estimate_fraction is not None:
        inputs = replace(inputs, work=replace(inputs.work, estimate_fraction=options.estimate_fraction))
    if options.device_memory is not None:
        inputs = replace(inputs, cluster=replace(inputs.cluster, memory_bytes=options.device_memory))
    return inputs


def _update_s(options: argparse.Namespace) -> float | None:
    return None if options.update_ns is None else options.update_ns * 1e-9


def _inputs_of_results(options: argparse.Namespace) -> Inputs:
    measured = "--results" if options.calibrate is None else "--calibrate"
    for name in ("results", *_MEASURED_BY_RESULTS) if measured == "--calibrate" else _MEASURED_BY_RESULTS:
        if getattr(options, name) is not None:
            raise ValueError(
                f"plan: --{name.replace('_', '-')} cannot be given with {measured}, which has it. Remove one"
            )
    path, hosts = options.results, options.hosts
    if options.calibrate is not None:
        path, hosts = calibration.measure(options)
    inputs = from_results(
        path,
        latency_s=options.latency or 0.0,
        hosts=hosts,
        two_levels=not options.flat,
        inside_bandwidth=options.inside_bandwidth,
        update_s_per_parameter=_update_s(options),
    )
    if options.ranks is not None:
        inputs = replace(inputs, cluster=inputs.cluster.with_ranks(options.ranks), measured_ranks=inputs.cluster.ranks)
    return inputs


def _inputs_of_arguments(options: argparse.Namespace) -> Inputs:
    if (options.params is None) == (options.model is None):
        raise ValueError("plan: give one of --params, --model, --results and --calibrate")
    _require_options(options, ["ranks", "micro_batch_ms", "n"], "or give --results or --calibrate for a measured run")
    if options.round_ms is None:
        _require_options(options, ["bandwidth"], "or give a measured --round-ms")
    backend = options.backend or "nccl"
    dtype = options.dtype or "bf16"
    model = Model(
        options.params or count_parameters(options.model),
        DTYPE_BYTES[dtype],
        DTYPE_BYTES[options.comm_dtype or dtype],
        DTYPE_BYTES[options.accumulation_dtype or dtype],
    )
    update_s = _update_s(options)
    work = Work(options.micro_batch_ms * 1e-3, options.n, UPDATE_S[backend] if update_s is None else update_s)
    measured = options.round_ms is not None
    latency = options.latency if options.latency is not None else (0.0 if measured else LATENCY_S[backend])
    cluster = Cluster(
        options.ranks,
        options.bandwidth or 1.0,
        latency,
        backend,
        options.hosts,
        efficiency=options.efficiency,
        two_levels=not options.flat,
        inside_bandwidth=options.inside_bandwidth,
    )
    if measured:
        cluster = plan.calibrated(model, cluster, work, options.round_ms * 1e-3)
    return Inputs(model, cluster, work, options.micro_batch_size or 1)


# ---- what is printed


def _describe(inputs: Inputs, is_measured: bool) -> str:
    model, cluster, work = inputs.model, inputs.cluster, inputs.work
    rate = f"{cluster.payload_rate * 8 / 1e9:.3g} Gbit/s of payload"
    hosts = ""
    if cluster.host_count != cluster.ranks:
        hosts = f" on {cluster.host_count} hosts"
    if cluster.has_inside:
        levels = "ACCO's rounds in two levels" if cluster.has_two_levels else "ACCO's rounds flat"
        hosts += f" ({levels}, {cluster.inside_rate / 1e9:.3g} GB/s a rank inside)"
    source = "network from a measured round" if is_measured else "from formulas alone"
    if inputs.measured_ranks is not None:
        source += f" of {inputs.measured_ranks} ranks"
    return (
        f"PREDICTION, not a measurement ({source}; "
        "terms and sources: docs/explanation/plan-formulas.md)\n"
        f"{model.numel:,} parameters of {model.weight_bytes} bytes, {cluster.ranks} ranks{hosts}, {cluster.backend}, "
        f"{rate}, {seconds(cluster.latency_s) if cluster.latency_s else 'no'} latency, "
        f"{work.n} micro-batches of {seconds(work.micro_batch_s)}"
    )


def columns(rows: list[list[str]]) -> str:
    """Puts rows of cells under one another, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def table(inputs: Inputs, also: Collection[str] = ()) -> str:
    """Puts the predictions into a table, one line for each stage and mode, with notes; ``also`` as in
    :func:`plan.predict_all`."""
    baseline = best_stage(inputs.model, inputs.cluster, inputs.work)
    has_inside = inputs.cluster.has_inside
    heads = ["", "s/step", "samples/s", "exposed s", "sent GB", "GiB/rank"]
    rows = [[*heads[:-1], "link GB", heads[-1]] if has_inside else heads]
    predicted = plan.predict_all(inputs.model, inputs.cluster, inputs.work, also)
    for row in predicted:
        relative = f"{baseline.step_s / row.step_s:.2f}" if baseline else "-"
        fits = "" if row.memory_bytes <= inputs.cluster.memory_bytes else " too much"
        figures = [f"{row.step_s:.4g}", relative, f"{row.exposed_s:.3g}", f"{row.wire_bytes / 1e9:.4g}"]
        figures += [f"{row.link_bytes / 1e9:.4g}"] if has_inside else []
        rows.append([row.name, *figures, f"{row.memory_bytes / 2**30:.3g}{fits}"])
    notes = [
        f"samples/s: 1 is {baseline.name}, the fastest stage that fits" if baseline else "no stage fits",
        "exposed: communication and update that nothing hides. GiB/rank: model states, without activations",
        *(["sent: by a rank, also inside its host. link: by all ranks of a host to other hosts"] if has_inside else []),
        "zero1, zero2: with overlap_comm; -reduce: with use_multi_rank_bucket_allreduce false",
    ]
    if inputs.work.n > 1:
        notes.append(_splits(inputs, [row.name for row in predicted]))
    return columns(rows) + "\n" + "\n".join(notes)


def _splits(inputs: Inputs, rows: list[str]) -> str:
    """Lists the ``estimate_fraction`` of the rows that have one."""
    model, cluster, work = inputs.model, inputs.cluster, inputs.work
    splitting = [name for name, mode in plan.modes().items() if name in rows and mode.schedule.has_two_phases]
    splits = {name: plan.split_of(name, model, cluster, work) for name in splitting}
    fractions = [f"{name} {_short(plan.fraction_of(a, work.n), work.n)}" for name, a in splits.items()]
    given = "as given" if work.estimate_fraction is not None else "acco's default, else the best one"
    return f"estimate_fraction: {', '.join(fractions)} ({given})"


def words(advice: Advice) -> str:
    """Puts the advice into words: what to set, then why."""
    mode = plan.modes().get(advice.name or "")
    if advice.name is None:
        setting = "Nothing fits."
    elif mode is None:
        setting = f"Use DeepSpeed's {advice.name}; ACCO does not pay here."
    else:
        keys: dict[str, Any] = {"schedule": mode.schedule.name}
        if mode.wire.estimate:
            keys["estimate_comm"] = mode.estimate_comm
        if mode.wire.commit:
            keys["commit_comm"] = mode.commit_comm
        if advice.estimate_fraction is not None:
            keys["estimate_fraction"] = _short(advice.estimate_fraction, advice.n)
        setting = (
            f'Use ACCO: {json.dumps(keys)}, "gradient_accumulation_steps": {advice.n}; '
            f"{advice.speedup:.2f}x the speed of {advice.baseline}."
        )
    wrap = textwrap.TextWrapper(width=116, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([setting, *(wrap.fill(sentence) for sentence in advice.sentences)])


def _short(fraction: float, n: int) -> float:
    """Returns the fraction with as few digits, three at least, as leave phase A as long."""
    a = phase_a_micro_batches(n, fraction)
    shorter = (float(f"{fraction:.{digits}g}") for digits in range(3, 18))
    return next(value for value in shorter if value < 1 and phase_a_micro_batches(n, value) == a)


def _swept(n: int) -> list[str]:
    """Returns the modes that the table over ranks shows: those of the other table, without what is between a full
    ESTIMATE and the coarsest."""
    return [
        name
        for name, mode in plan.modes().items()
        if mode.is_listed
        and mode.has_room(n)
        and (not mode.wire.estimate or mode.estimate_comm == COARSEST.estimate_comm)
    ]


def sweep(inputs: Inputs, ranks: list[int]) -> list[dict[str, Any]]:
    """Predicts the step at other numbers of ranks with the same micro-batches on each: the batch grows with them."""
    rows = []
    in_host = inputs.cluster.ranks_per_host
    if not ranks:
        powers = (in_host * 2**power for power in range(1, _SWEEP_UP_TO.bit_length()))
        ranks = [number for number in powers if number <= max(_SWEEP_UP_TO, inputs.cluster.ranks)]
    names = _swept(inputs.work.n)
    for number in ranks:
        cluster = inputs.cluster.with_ranks(number)
        row: dict[str, Any] = {"ranks": number} | _compared(inputs.model, cluster, inputs.work, names)
        row["acco_memory_bytes"] = plan.memory_bytes(DEFAULT.name, inputs.model, number)
        rows.append(row)
    return rows


def _compared(model: Model, cluster: Cluster, work: Work, names: Iterable[str]) -> dict[str, Any]:
    """Returns R, R/C, the fastest stage that fits, and the steps of these modes."""
    commit, stage = plan.round_s(model, cluster, work), best_stage(model, cluster, work)
    row: dict[str, Any] = {"round_s": commit, "ratio": commit / work.compute_s}
    row |= {"stage": stage and stage.name, "stage_s": stage and stage.step_s}
    return row | {name: plan.predict(name, model, cluster, work).step_s for name in names}


def sweep_table(rows: list[dict[str, Any]], has_latency: bool) -> str:
    """Puts what :func:`sweep` returned into a table."""
    names = [name for name in plan.modes() if name in rows[0]]
    lines = [["ranks", "R s", "R/C", "best stage", "s/step", *names, "ACCO GiB/rank"]]
    for row in rows:
        stage = [row["stage"], f"{row['stage_s']:.4g}"] if row["stage"] else ["none fits", "-"]
        figures = [f"{row[name]:.4g}" for name in names]
        memory = f"{row['acco_memory_bytes'] / 2**30:.3g}"
        lines.append([str(row["ranks"]), f"{row['round_s']:.4g}", f"{row['ratio']:.3g}", *stage, *figures, memory])
    said = "PREDICTION over ranks: the same micro-batches on each, so the batch grows with them"
    if not has_latency:
        said += "; WITHOUT latency, give --latency"
    return said + "\n" + columns(lines)


def sweep_hosts(inputs: Inputs, efficiency: float | None = None) -> list[dict[str, Any]]:
    """Predicts the step over hosts, ranks of a host and bandwidths, with the same micro-batches on each rank. The
    network is that of formulas, with ``efficiency``, also where one was measured.

    Raises:
        ValueError: for n = 1, with which the schedules of the table have no room for their phases.
    """
    if inputs.work.n == 1:
        raise ValueError("plan: --sweep-hosts compares schedules of two phases, and n = 1 has no second. Give n >= 2")
    rows = []
    for hosts, in_host, gbit in itertools.product(_SWEPT_HOSTS, _SWEPT_IN_HOST, _SWEPT_GBIT):
        shape = replace(inputs.cluster, ranks=hosts * in_host, hosts=hosts)
        cluster = replace(shape, bandwidth=gbit * 1e9 / 8, efficiency=efficiency)
        row: dict[str, Any] = {"hosts": hosts, "ranks_per_host": in_host, "gbit": gbit}
        rows.append(row | _compared(inputs.model, cluster, inputs.work, _OVER_HOSTS))
    return rows


def sweep_hosts_table(rows: list[dict[str, Any]]) -> str:
    """Puts what :func:`sweep_hosts` returned into a table, one line for each number of hosts and of ranks in them."""
    heads = [[f"{gbit}gbit R/C", *(name.rsplit("-", 1)[-1] for name in _OVER_HOSTS)] for gbit in _SWEPT_GBIT]
    lines = [["hosts x ranks", *itertools.chain(*heads)]]
    for (hosts, in_host), of_line in itertools.groupby(rows, lambda row: (row["hosts"], row["ranks_per_host"])):
        line = [f"{hosts} x {in_host}"]
        for row in of_line:
            speeds = [f"{row['stage_s'] / row[name]:.2f}" if row["stage"] else "-" for name in _OVER_HOSTS]
            line += [f"{row['ratio']:.2g}", *speeds]
        lines.append(line)
    return (
        "PREDICTION over hosts, ranks of a host and bandwidths, from formulas alone: the same micro-batches on each "
        f"rank\nSpeed of {', '.join(_OVER_HOSTS[:-1])} and {_OVER_HOSTS[-1]} over that of the fastest stage that fits\n"
        + columns(lines)
    )


def _bandwidth_alone(options: argparse.Namespace, inputs: Inputs) -> str:
    """Says how far a round computed from the bandwidth is off the measured one."""
    latency = LATENCY_S[inputs.cluster.backend] if options.latency is None else options.latency
    nominal = replace(inputs.cluster, bandwidth=options.bandwidth, latency_s=latency, efficiency=options.efficiency)
    computed = plan.round_s(inputs.model, nominal, inputs.work)
    measured = plan.round_s(inputs.model, inputs.cluster, inputs.work)
    return (
        f"From the bandwidth alone a round would take {seconds(computed)}, {100 * (computed / measured - 1):+.0f} % "
        "against the measured one."
    )


def _finite(value: Any) -> Any:
    """Replaces infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


Rows = list[dict[str, Any]] | None


def _report(
    inputs: Inputs, also: Collection[str], advice: Advice, over_ranks: Rows, over_hosts: Rows
) -> dict[str, Any]:
    model, cluster, work = inputs.model, inputs.cluster, inputs.work
    return {
        "prediction": True,
        "model": asdict(model),
        "cluster": _finite(asdict(cluster)),
        "work": asdict(work),
        "compute_s": work.compute_s,
        "round_s": plan.round_s(model, cluster, work),
        "rows": [asdict(row) for row in plan.predict_all(model, cluster, work, also)],
        "stops_paying": None if work.n == 1 else _finite(stops_paying(model, cluster, work)),
        "advice": asdict(advice),
        "sweep": over_ranks,
        "sweep_hosts": over_hosts,
    }


def run(options: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status: 2 for arguments that cannot be used, 1 when the measured run failed,
    130 when it was interrupted."""
    try:
        inputs = inputs_of(options)
        advice = advise(inputs.model, inputs.cluster, inputs.work, inputs.micro_batch_size)
        over_ranks = None if options.sweep_ranks is None else sweep(inputs, options.sweep_ranks)
        over_hosts = sweep_hosts(inputs, options.efficiency) if options.sweep_hosts else None
    except ValueError as error:
        complain(error)
        return 2
    except calibration.MeasurementFailed as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        complain("plan: interrupted; nothing was measured")
        return INTERRUPTED
    is_measured = any(given is not None for given in (options.results, options.calibrate, options.round_ms))
    print(_describe(inputs, is_measured), table(inputs, options.also), words(advice), sep="\n\n")
    if is_measured and options.bandwidth is not None:
        print(_bandwidth_alone(options, inputs))
    if over_ranks is not None:
        print("\n" + sweep_table(over_ranks, inputs.cluster.latency_s > 0))
    if over_hosts is not None:
        print("\n" + sweep_hosts_table(over_hosts))
    if options.json is not None:
        report = _report(inputs, options.also, advice, over_ranks, over_hosts)
        try:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            complain(f"plan: --json {options.json} cannot be written: {error}")
            return 2
    return 0
