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


_CUDA, _CPU = "on CUDA", "on a CPU"
_ON_A_HOST, _HOSTS = "on CUDA, several ranks on a host", "on CUDA, several hosts"
_CPU_HOSTS = "on a CPU, several hosts"
_WHEN: dict[str, Callable[[Facts], bool]] = {
    _CUDA: lambda facts: facts.device == "cuda",
    _ON_A_HOST: lambda facts: facts.device == "cuda" and facts.ranks_here > 1,
    _HOSTS: lambda facts: facts.device == "cuda" and facts.ranks > facts.ranks_here,
    _CPU: lambda facts: facts.device == "cpu",
    _CPU_HOSTS: lambda facts: facts.device == "cpu" and facts.ranks > facts.ranks_here,
}


def _is_on(value: str, facts: Facts) -> bool:
    return value.lower() not in ("", "0", "false", "no", "off", "n", "f")


def _is(*words: str) -> Callable[[str, Facts], bool]:
    return lambda value, facts: value.lower() in words


def _has_many_threads(value: str, facts: Facts) -> bool:
    return facts.threads * facts.ranks_here > facts.cores


def _has_few_threads(value: str, facts: Facts) -> bool:
    return 4 * facts.threads * facts.ranks_here <= facts.cores


_ONE_QUEUE = "all streams share one queue of the device: rounds wait behind computation"
_WAITS = "the host waits in every collective: nothing overlaps"
_OVER_HOST = "GPUs of a host send through host memory, several times slower"
_LOOPBACK = "the loopback interface leads to no other host"
_TAKEN = "the ranks have more threads than the host has cores: rounds and computation take them from each other"
_IDLE = "most cores are idle (torchrun sets it to 1 where nobody does)"
_SHARE = "set it to the cores over the ranks of a host"
SETTINGS = (
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", _CUDA, _is("1"), _ONE_QUEUE),
    Setting("CUDA_LAUNCH_BLOCKING", _CUDA, _is_on, "the host waits for every kernel: nothing overlaps"),
    Setting("TORCH_NCCL_BLOCKING_WAIT", _CUDA, _is_on, _WAITS),
    Setting("NCCL_BLOCKING_WAIT", _CUDA, _is_on, _WAITS),
    Setting("NCCL_LAUNCH_MODE", _CUDA, _is("group"), "launches of collectives wait for one another"),
    Setting("NCCL_MAX_CTAS", _CUDA, _is("1", "2", "3"), "so few blocks do not fill a fast link"),
    Setting("NCCL_P2P_DISABLE", _ON_A_HOST, _is_on, _OVER_HOST),
    Setting("NCCL_IB_DISABLE", _HOSTS, _is_on, "NCCL takes TCP and no InfiniBand or RoCE, where hosts have it"),
    Setting("NCCL_SOCKET_IFNAME", _HOSTS, _is("lo", "=lo"), _LOOPBACK, "name the one between the hosts"),
    Setting("GLOO_SOCKET_IFNAME", _CPU_HOSTS, _is("lo", "=lo"), _LOOPBACK, "name the one between the hosts"),
    Setting("OMP_NUM_THREADS", _CPU, _has_many_threads, _TAKEN, _SHARE),
    Setting("OMP_NUM_THREADS", _CPU, _has_few_threads, _IDLE, _SHARE),
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
    """Finds variables that cost overlap."""
    return finding_of(os.environ, Facts.of_this_rank(subject.device.type))
