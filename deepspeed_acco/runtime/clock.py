# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads values and times of a device later, without ever waiting for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import devices


class HostValue:
    """Gives the host a small tensor later, without ever waiting for the device.

    On CUDA the value is copied to pinned memory behind the work that makes it, on the current stream.
    """

    def __init__(self, value: torch.Tensor):
        self._passed = None
        self._value = self._on_device = value
        if devices.has_streams(value.device):
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._passed = torch.cuda.current_stream(value.device).record_event()

    def is_known(self) -> bool:
        """Tells whether the host can read the value now."""
        return self._passed is None or self._passed.query()

    def wait(self) -> None:
        """Blocks the host until the value is known."""
        if self._passed is not None:
            self._passed.synchronize()

    def value(self) -> Any:
        """Returns the value in Python's type for the dtype, of 1-D tensors a list; only when :meth:`is_known`."""
        return self._value.tolist()

    def tensor(self) -> torch.Tensor:
        """Returns the value in host memory where the host knows it, so that reading it waits for nothing; else on its
        device."""
        return self._value if self.is_known() else self._on_device


class Instant:
    """Marks now, as the training thread (on CUDA: its stream) sees it; read later, without waiting for the device."""

    def __init__(self, device: torch.device):
        self._host_s = time.perf_counter()
        self._passed = None
        if devices.has_streams(device):
            stream = torch.cuda.current_stream(device)
            self._passed = stream.record_event(torch.cuda.Event(enable_timing=True))

    def is_known(self) -> bool:
        """Tells whether the device has come to it."""
        return self._passed is None or self._passed.query()

    def wait(self) -> None:
        """Blocks the host until the device has come to it."""
        if self._passed is not None:
            self._passed.synchronize()

    def seconds_since(self, earlier: Instant) -> float:
        """Returns the seconds from ``earlier`` to this instant; only when both :meth:`is_known`."""
        if self._passed is None or earlier._passed is None:
            return self._host_s - earlier._host_s
        return earlier._passed.elapsed_time(self._passed) / 1e3


@dataclass
class LaneTimes:
    """Holds sums since the lane was made, in seconds (on CUDA of the rounds whose events have completed)."""

    round_s: float = 0.0  # the rounds' own duration
    exposed_s: float = 0.0  # how long the training thread (on CUDA: its stream) stood waiting for them
    rounds: int = 0
    round_s_of: dict[str, float] = field(default_factory=dict)  # round_s by the kind of the round
    rounds_of: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, round_s: float, exposed_s: float) -> None:
        """Enters one round; the first word of its name is its kind."""
        kind = name.split()[0]
        self.round_s += round_s
        self.exposed_s += exposed_s
        self.rounds += 1
        self.round_s_of[kind] = self.round_s_of.get(kind, 0.0) + round_s
        self.rounds_of[kind] = self.rounds_of.get(kind, 0) + 1

    def copy(self) -> LaneTimes:
        """Returns the sums as they are now."""
        return replace(self, round_s_of=dict(self.round_s_of), rounds_of=dict(self.rounds_of))

    @property
    def hidden_share(self) -> float:
        """Returns the part of the rounds' time that cost training nothing, 0 to 1; 0 before the first round."""
        return max(0.0, 1.0 - self.exposed_s / self.round_s) if self.round_s > 0 else 0.0

    def since(self, earlier: LaneTimes) -> LaneTimes:
        """Returns what was added after ``earlier``, a copy that was made then."""
        return LaneTimes(
            self.round_s - earlier.round_s,
            self.exposed_s - earlier.exposed_s,
            self.rounds - earlier.rounds,
            {kind: spent - earlier.round_s_of.get(kind, 0.0) for kind, spent in self.round_s_of.items()},
            {kind: count - earlier.rounds_of.get(kind, 0) for kind, count in self.rounds_of.items()},
        )
