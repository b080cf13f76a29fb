# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lists the environment variables that cost overlap or speed, and finds those that do here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .finding import OK, WARN, Finding
from .subject import Subject


@dataclass(frozen=True)
class Facts:
    """Holds what decides whether a setting matters: device (``cpu`` or ``cuda``), ranks of the run and of this host,
    cores of this host, threads of this rank."""

    device: str
    ranks: int
    ranks_here: int
    cores: int
    threads: int

    @classmethod
    def of_this_rank(cls, device: str) -> Facts:
        """Reads them from what the launcher has told this rank."""
        told = os.environ.get
        ranks = told("WORLD_SIZE", "1")
        here = told("LOCAL_WORLD_SIZE") or told("LOCAL_SIZE") or ranks  # of torchrun, of DeepSpeed's launcher
        return cls(device, int(ranks), int(here), os.cpu_count() or 1, torch.get_num_threads())


@dataclass(frozen=True)
class Setting:
    """Describes a variable, by when it matters, the values that cost something (the empty one where it is unset), what
    they cost, and what to do."""

    name: str
    when: str
    costs_with: Callable[[str, Facts], bool]
    cost: str
    advice: str = "unset it"


_WHEN: dict[str, Callable[[Facts], bool]] = {
    "on CUDA": lambda facts: facts.device == "cuda",
    "on CUDA, several ranks on a host": lambda facts: facts.device == "cuda" and facts.ranks_here > 1,
    "on CUDA, several hosts": lambda facts: facts.device == "cuda" and facts.ranks > facts.ranks_here,
    "on a CPU": lambda facts: facts.device == "cpu",
    "on a CPU, several hosts": lambda facts: facts.device == "cpu" and facts.ranks > facts.ranks_here,
}


def _is_on(value: str, facts: Facts) -> bool:
    return value.lower() not in ("", "0", "false", "no", "off", "n", "f")


def _is_few(value: str, facts: Facts) -> bool:
    return value.isdecimal() and 1 <= int(value) <= 3


def _is_loopback(value: str, facts: Facts) -> bool:
    return value.lstrip("=") == "lo"


_WAITS = "the host waits in every collective: nothing overlaps"
_NOT_ELSEWHERE = "the loopback interface leads to no other host"
_SHARE = "set it to the cores over the ranks of a host"
SETTINGS = (
    Setting(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "on CUDA",
        lambda value, facts: value == "1",
        "all streams share one queue of the device: rounds wait behind computation",
    ),
    Setting("CUDA_LAUNCH_BLOCKING", "on CUDA", _is_on, "the host waits for every kernel: nothing overlaps"),
    Setting("TORCH_NCCL_BLOCKING_WAIT", "on CUDA", _is_on, _WAITS),
    Setting("NCCL_BLOCKING_WAIT", "on CUDA", _is_on, _WAITS),
    Setting(
        "NCCL_LAUNCH_MODE",
        "on CUDA",
        lambda value, facts: value.upper() == "GROUP",
        "launches of collectives wait for one another",
    ),
    Setting("NCCL_MAX_CTAS", "on CUDA", _is_few, "so few blocks do not fill a fast link"),
    Setting(
        "NCCL_P2P_DISABLE",
        "on CUDA, several ranks on a host",
        _is_on,
        "GPUs of a host send through host memory, several times slower",
    ),
    Setting(
        "NCCL_IB_DISABLE",
        "on CUDA, several hosts",
        _is_on,
        "NCCL takes TCP sockets, no InfiniBand or RoCE",
        "unset it, unless the hosts have neither",
    ),
    Setting("NCCL_SOCKET_IFNAME", "on CUDA, several hosts", _is_loopback, _NOT_ELSEWHERE, "name another"),
    Setting("GLOO_SOCKET_IFNAME", "on a CPU, several hosts", _is_loopback, _NOT_ELSEWHERE, "name another"),
    Setting(
        "OMP_NUM_THREADS",
        "on a CPU",
        lambda value, facts: facts.threads * facts.ranks_here > facts.cores,
        "the ranks have more threads than the host has cores, and rounds and computation take them from each other",
        _SHARE,
    ),
    Setting(
        "OMP_NUM_THREADS",
        "on a CPU",
        lambda value, facts: 4 * facts.threads * facts.ranks_here <= facts.cores,
        "most cores are idle (torchrun sets it to 1 where nobody does)",
        _SHARE,
    ),
)


def finding_of(environment: Mapping[str, str], facts: Facts) -> Finding:
    """Returns the finding for these variables, with a row for each that costs something."""
    costly = [
        setting
        for setting in SETTINGS
        if _WHEN[setting.when](facts) and setting.costs_with(environment.get(setting.name, "").strip(), facts)
    ]
    if not costly:
        return Finding(OK, "No environment variable costs overlap here.")
    rows = tuple(
        (
            f"{setting.name}={environment.get(setting.name, '(unset)')}",
            f"{setting.when}: {setting.cost}. What to do: {setting.advice}.",
        )
        for setting in costly
    )
    return Finding(WARN, "Environment variables cost overlap or speed here.", figures={"settings": rows}, rows=rows)


def check_settings(subject: Subject) -> Finding:
    """Looks for variables that cost overlap."""
    return finding_of(os.environ, Facts.of_this_rank(subject.device.type))
