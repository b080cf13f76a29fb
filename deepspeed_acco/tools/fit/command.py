# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco fit``: from the log of somebody's ZeRO run to a yes or no, with seconds and accelerator-hours."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from .. import units
from ..plan.command import DTYPE_BYTES, LATENCY_S
from ..plan.model import BACKENDS, Cluster
from ..subcommand import add_parser, complain
from ..words import printable
from .estimate import Estimate, estimates, observe
from .log import read_log
from .page import Page
from .run_facts import run_of
from .verdict import decide

_STAGES = 3  # the largest


def add_command(commands) -> None:
    """Adds the subcommand to what ``add_subparsers`` returned."""
    parser = add_parser(
        commands,
        "fit",
        help="says from the log of your own ZeRO run whether ACCO pays for it",
        description="Reads what DeepSpeed printed in a run of yours, with wall_clock_breakdown, and says whether ACCO "
        "would have been faster: yes, no, or too close to call, with seconds a step and accelerator-hours. Nothing is "
        "installed into the training.",
        example="ds_acco fit train.log --config ds_config.json --params 7B --steps 100000\n"
        "ds_acco fit train.log --params 1.3B --hours 300 --hosts 8",
    )
    parser.add_argument("log", metavar="LOG", type=Path, help="what rank 0 printed; 20 steps are enough")
    add = parser.add_argument_group("the run, as far as its log does not say it").add_argument
    add("--config", type=Path, metavar="CONFIG", help="its DeepSpeed JSON")
    add("--params", type=units.count, metavar="N", help="trainable parameters, for example 7B or 7e9")
    add("--ranks", type=units.count, metavar="N", help="data-parallel ranks")
    add("--hosts", type=units.count, metavar="N", help="they share the ranks equally (default: 1)")
    add("--stage", type=int, choices=range(_STAGES + 1), help="of ZeRO; 0: plain data parallelism")
    add("--n", type=units.count, metavar="N", help="gradient_accumulation_steps")
    add("--micro-batch-size", type=units.count, metavar="N", help="samples of a rank's micro-batch")
    add("--dtype", choices=DTYPE_BYTES, help="of the weights (default: bf16)")
    add("--backend", choices=BACKENDS, help="default: nccl")
    add(
        "--bandwidth",
        type=units.bandwidth,
        metavar="RATE",
        help="of one host in one direction, in place of what the log says of it; needed where it says nothing",
    )
    add("--device-memory", type=units.size, metavar="SIZE", help="of one rank, for model states, for example 80GB")
    add = parser.add_argument_group("the training that is to come").add_mutually_exclusive_group().add_argument
    add("--steps", type=units.count, metavar="N", help="of the whole training: for accelerator-hours")
    add("--hours", type=units.positive, metavar="H", help="instead: what it would take as the log has it")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the page; returns the exit status: 0 whatever the answer is, 2 for what cannot be read."""
    try:
        page = _page(options)
    except ValueError as error:
        complain(f"fit: {str(error).removeprefix('plan: ')}")
        return 2
    print(printable(page.text()))
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(page.report(), indent=2) + "\n")
        except OSError as error:
            complain(f"fit: --json {options.json} cannot be written: {error}")
            return 2
    return 0


def _page(options: argparse.Namespace) -> Page:
    log = read_log(options.log)
    about = run_of(options, log)
    seen = observe(log, about)
    network = None
    if options.bandwidth is not None:
        network = Cluster(about.ranks, options.bandwidth, LATENCY_S[about.backend], about.backend, about.hosts)
    ways, in_vain = estimates(about, seen, network)
    if options.device_memory is not None:
        ways = [_with_memory(way, options.device_memory) for way in ways]
    steps = options.steps or (options.hours and options.hours * 3600 / seen.step_s)
    return Page(options.log.name, log, about, seen, ways, in_vain, decide(about, seen, ways), steps)


def _with_memory(way: Estimate, memory_bytes: float) -> Estimate:
    cluster = replace(way.inputs.cluster, memory_bytes=memory_bytes)
    return replace(way, inputs=replace(way.inputs, cluster=cluster))
