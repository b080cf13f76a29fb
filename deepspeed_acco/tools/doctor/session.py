# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Carries out the checks on one rank, in step with all others, whatever becomes of them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ...engine import log
from ...optim import native
from ...runtime.communicator import Communicator
from ...runtime.failures import CommFailed
from ..machine import describe_machine
from ..words import counted, printable
from . import page
from .command import require_usable
from .costly_settings import Facts, check_settings, finding_of
from .finding import FAIL, NOT_APPLICABLE, Finding, of_error, together
from .installation import check_kernels, check_locks, check_versions
from .rounds import check_hidden, check_rounds
from .subject import Subject, training_of
from .training import check_equality, check_lanes

Check = Callable[[Subject], Finding]
CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "kernels": check_kernels,
    "locks": check_locks,
    "settings": check_settings,
    "equality": check_equality,
    "lanes": check_lanes,
    "rounds": check_rounds,
    "hidden": check_hidden,
}
LIMIT_S = 120.0
_JOIN_S = 300.0  # some rank may build kernels first
_GONE = "Look at the output of the ranks; the first error in time is the cause"


def examine(subject: Subject, checks: Mapping[str, Check] = CHECKS, limit_s: float = LIMIT_S) -> dict[str, Finding]:
    """Carries out the checks, one after the other, and returns by their names what all ranks have found; every rank
    must call it. After ``limit_s`` no other is begun, nor where a rank is gone."""
    begin, rank, why_not = time.monotonic(), subject.control.rank, ""
    findings: dict[str, Finding] = {}
    # Bounds what checks wait for in collectives of DeepSpeed. Findings wait longer: for a rank that waited so.
    bounds = Communicator(None, subject.control.device, subject.timeout_s)
    for name, check in checks.items():
        if why_not:
            findings[name] = Finding(NOT_APPLICABLE, why_not)
            continue
        if rank == 0:
            _say(f"{name} ...")
        try:
            with bounds.bounded(name):
                own = check(subject)
        except Exception as error:  # whatever breaks: the others are still worth making
            _say(f"{name}, rank {rank}: {type(error).__name__}: {error}")
            own = of_error(error)
        try:
            found, times = zip(*subject.control.gather_objects((own, time.monotonic() - begin)), strict=True)
        except CommFailed as error:
            findings[name] = Finding(FAIL, f"Not every rank came to its end: {error}", _GONE)
            why_not = "Not made: a rank is gone."
            continue
        findings[name] = together(found)
        if max(times) > limit_s:
            why_not = f"Not made: {limit_s:.0f} s are over."
    bounds.destroy()
    return findings


def _say(text: str) -> None:
    print(printable(f"doctor: {text}"), file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """Returns 0 where nothing failed, 1 where something did, 2 for a JSON that cannot be used; on every rank."""
    begin, rank = time.monotonic(), int(os.environ["RANK"])
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device(accelerator.current_device_name())
    try:
        require_usable(options)
        training = training_of(options.config, options.precision, device, int(os.environ["WORLD_SIZE"]))
    except (ValueError, OSError) as error:
        _say(str(error))  # every rank does: the launcher ends the others as soon as one has ended
        return 2
    for what, text in finding_of(os.environ, Facts.of_this_rank(device.type)).rows if rank == 0 else ():
        _say(f"{what}: {text}")  # now: with some of them the ranks do not find each other
    log.logger().setLevel(logging.WARNING)
    with _joined(device, options.comm_timeout) as control:
        subject = Subject(training, device, options.numel, options.comm_timeout, control)
        findings = examine(subject)
        is_written = control.rank != 0 or _report(options.json, subject, findings, time.monotonic() - begin)
        with suppress(CommFailed):
            control.barrier()  # the launcher ends rank 0 as soon as another has ended with an error
    return 0 if is_written and page.is_well(findings) else 1


@contextmanager
def _joined(device: torch.device, timeout_s: float) -> Iterator[Communicator]:
    """Gives the channel of the ranks, once all of them have come."""
    deepspeed.init_distributed(timeout=timedelta(seconds=_JOIN_S), verbose=False)
    try:
        native.prepare(device)  # now: it may build for a minute
    except (ValueError, RuntimeError) as error:
        _say(f"kernels: {error}")  # and the check says it again
    control = Communicator(None, torch.device("cpu"), 2 * timeout_s + 10)
    yield control
    control.destroy()
    deepspeed.comm.destroy_process_group()


def _report(file: Path | None, subject: Subject, findings: Mapping[str, Finding], took_s: float) -> bool:
    """Prints the page and writes the JSON; tells whether both could be done."""
    training, ranks, device = subject.training, subject.control.world_size, subject.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPUs"
    header = {
        "ranks": ranks,
        "device": device.type,
        "device_name": name,
        "machine": describe_machine(),
        "precision": training.precision,
        "schedule": training.schedule.name,
        "n": training.n,
    }
    told = f"{counted(ranks, 'rank')} on {name}, {training.precision}, schedule {training.schedule.name}"
    print(page.page_of(f"{told}, n = {training.n}", findings, took_s), flush=True)
    try:
        if file is not None:
            file.write_text(json.dumps(page.json_of(header, findings, took_s), indent=2) + "\n")
    except OSError as error:
        _say(f"--json {file} cannot be written: {error}")
        return False
    return True
