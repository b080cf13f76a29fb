# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a small network under DeepSpeed on modelled streams, in the ways that users train; ranks of a pool run it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)

import deepspeed_acco
from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.runtime import devices
from tests.streams.accesses import watched
from tests.streams.clocks import Device
from tests.streams.faults import FAULTS
from tests.support.training import DTYPES, batch, ds_config, start_engine

WINDOWS = 3
LONGEST = 11  # windows of any scenario


@dataclass(frozen=True)
class Scenario:
    """Says how an engine is trained.

    Attributes:
        drive: trains; gets a :class:`Training`.
        config: arguments of ``ds_config``.
        waits, waits_of_window: how often the host waits in training, by place: in all, and in each window.
    """

    drive: Callable[[Training], None]
    config: dict[str, Any] = field(default_factory=dict)
    is_monitored: bool = False
    groups: int = 1
    waits: dict[str, int] = field(default_factory=dict)
    waits_of_window: dict[str, int] = field(default_factory=dict)

    def waits_in(self, windows: int) -> dict[str, int]:
        """Returns how often the host waits where there are so many windows."""
        return self.waits | {place: count * windows for place, count in self.waits_of_window.items()}


@dataclass(frozen=True)
class Seen:
    """Holds what was seen of a scenario.

    Attributes:
        findings: what was not ordered. waits: how often the host waited in training, by place.
        operators: how often each was called, by name. windows: how many there were of the first engine.
    """

    findings: dict[str, int]
    waits: dict[str, int]
    operators: dict[str, int]
    windows: int


class Training:
    """Gives the functions below engines, their data and a folder."""

    def __init__(self, scenario: Scenario, device: Device, folder: str, ranks_per_host: int):
        config = {"n": 4, "ranks_per_host": ranks_per_host, **scenario.config}
        dtype = DTYPES[config.get("precision", "fp32").partition("+")[0]]
        self.folder = folder
        self.data = [
            [batch(dist.get_rank(), window, micro_batch, dtype) for micro_batch in range(config["n"])]
            for window in range(LONGEST)
        ]
        self.ended_windows = 0
        self._device = device
        self._json = ds_config(**config)
        if scenario.is_monitored:
            self._json["csv_monitor"] = {"enabled": True, "output_path": folder}
        self._groups = scenario.groups
        self._engines: list = []

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Lets the host wait inside without counting it: not in training."""
        before = self._device.waits.copy()
        yield
        self._device.waits = before

    def start(self):
        """Returns a new engine."""
        with self.uncounted():
            self._engines.append(start_engine(self._json, self._groups))
        return self._engines[-1]

    def windows(self, engine, count: int = WINDOWS, first: int = 0, look=None, spoils=()) -> None:
        """Trains windows.

        Args:
            look: called as ``look(engine, window, micro_batch)`` after every backward.
            spoils: windows whose gradients are not finite.
        """
        for window in range(first, first + count):
            for micro_batch, (x, y) in enumerate(self.data[window]):
                engine.backward(engine(x * float("nan") if window in spoils else x, y))
                if look is not None:
                    look(engine, window, micro_batch)
                engine.step()

    def evaluate(self, engine) -> None:
        """Computes a loss of the true weights."""
        engine.eval()
        with torch.no_grad():
            engine(*self.data[0][0])
        engine.train()

    def forget(self) -> None:
        """Drops all engines without destroying them."""
        self._engines.clear()
        for _ in range(2):  # what holds the buffers is garbage once the finalizers have run
            gc.collect()

    def end(self) -> None:
        """Destroys all engines."""
        if self._engines:
            self.ended_windows = self._engines[0].optimizer.position.window
        with self.uncounted():
            while self._engines:
                self._engines.pop().destroy()


@contextmanager
def behind(stream) -> Iterator[None]:
    """Goes on on this stream inside, behind the current one, which waits for it afterwards."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


# ---- ways to train


def plain(training: Training) -> None:
    training.windows(training.start())


def long(training: Training) -> None:
    training.windows(training.start(), LONGEST)


def with_a_skip(training: Training) -> None:
    training.windows(training.start(), spoils=(1,))


def with_looks(training: Training) -> None:
    """Evaluates, reads state_dict() and the true weights at changing moments of the windows."""

    def look(engine, window, micro_batch):
        if micro_batch % 2 == 0:
            training.evaluate(engine)
        if (window + micro_batch) % 3 == 0:
            engine.module.state_dict()
        if (window + micro_batch) % 4 == 0:
            with deepspeed_acco.true_weights(engine):
                [param.detach().clone() for param in engine.module.parameters()]

    training.windows(training.start(), look=look)


def with_looks_at_the_state(training: Training) -> None:
    """Reads a parameter's master weights, moment and whole gradient, and the norm."""

    def look(engine, window, micro_batch):
        param = engine.module.last.weight
        if micro_batch == 1:
            safe_get_full_fp32_param(param)
            safe_get_full_optimizer_state(param, "exp_avg")
        if micro_batch == engine.gradient_accumulation_steps() - 1:
            safe_get_full_grad(param)
            engine.get_global_grad_norm()

    training.windows(training.start(), look=look)


def on_another_stream(training: Training) -> None:
    """Trains on a stream of the user's own, from the second window on."""
    engine = training.start()
    training.windows(engine, 1)
    with behind(torch.cuda.Stream()):
        training.windows(engine, WINDOWS - 1, first=1)


def with_looks_on_another_stream(training: Training) -> None:
    """Looks on a stream of the user's own, which training then waits for."""
    stream = torch.cuda.Stream()

    def look(engine, window, micro_batch):
        with behind(stream):
            if micro_batch == 1:
                safe_get_full_fp32_param(engine.module.last.weight)
            if micro_batch == 2:
                training.evaluate(engine)
                engine.module.state_dict()

    training.windows(training.start(), look=look)


def finished_on_another_stream(training: Training) -> None:
    """Asks for a norm on a stream of the user's own, which training never waits for."""
    stream = torch.cuda.Stream()

    def look(engine, window, micro_batch):
        if micro_batch == 1:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                engine.optimizer.driver.finish()

    training.windows(training.start(), look=look)


def adaptive(training: Training) -> None:
    engine = training.start()
    data = [micro_batch for window in training.data[:6] for micro_batch in window]
    for x, y in deepspeed_acco.train_samples(engine, data[6 * dist.get_rank() :]):
        engine.backward(engine(x, y))
        engine.step()


def saved_and_loaded(training: Training) -> None:
    """Saves in a round, trains on, and loads."""
    engine = training.start()
    training.windows(engine, 2)
    with training.uncounted():
        engine.save_checkpoint(training.folder)
    training.windows(engine, 2, first=2)
    with training.uncounted():
        engine.load_checkpoint(training.folder)
    training.windows(engine, 2, first=2)


def on_changing_streams(training: Training) -> None:
    """Trains every other window on a stream of the user's own."""
    engine, stream = training.start(), torch.cuda.Stream()
    for window in range(WINDOWS + 1):
        with behind(stream) if window % 2 else nullcontext():
            training.windows(engine, 1, first=window)


def saved_and_loaded_on_another_stream(training: Training) -> None:
    engine, stream = training.start(), torch.cuda.Stream()
    training.windows(engine, 2)
    with behind(stream):
        engine.save_checkpoint(training.folder)
    training.windows(engine, 2, first=2)
    with behind(stream):
        engine.load_checkpoint(training.folder)
    training.windows(engine, 2, first=2)


def with_a_state_that_is_set(training: Training) -> None:
    """Writes a parameter's master weights in the midst of rounds."""

    def look(engine, window, micro_batch):
        param = engine.module.last.weight
        if micro_batch == 1:
            safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 0.9)

    training.windows(training.start(), look=look)


def destroyed_on_another_stream(training: Training) -> None:
    """Destroys the engine on a stream that training does not wait for; then its memory is used again."""
    training.windows(training.start(), 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training.end()
    training.forget()
    torch.zeros(1000)


def left_in_a_round(training: Training) -> None:
    """Drops an engine without destroying it; then its memory is used again."""
    training.windows(training.start(), 2)
    with training.uncounted():
        training.forget()
    torch.zeros(1000)


def two_engines(training: Training) -> None:
    one, other = training.start(), training.start()
    for window in range(WINDOWS):
        training.windows(one, 1, first=window)
        training.windows(other, 1, first=window)


_DIFFERS = "runtime/written.py differs: aten::_local_scalar_dense"  # a few values of each parameter, at a look
_SKIPPED = "runtime/outcomes.py wait: Event.synchronize"  # a window's end that waits for its COMMIT
_OVERFLOW = "engine/scaling.py has_overflow: aten::_local_scalar_dense"  # fp16's loss scale
_PACE = "runtime/lanes.py pace: Event.synchronize"
_COUNTS = "runtime/round.py micro_batches: Event.synchronize"
_DATA_OVER = "runtime/round.py ranks_without_data: Event.synchronize"
_INSTANT = "engine/auto_fraction.py enter: Event.synchronize"  # a window's end that is measured
_GATHERED = "runtime/communicator.py _gather: aten::_local_scalar_dense"
_ADAPTIVE = {_PACE: 23, _DATA_OVER: 1}  # of 24 micro-batches


SCENARIOS = {
    "acco": Scenario(plain),
    "local": Scenario(plain, {"schedule": "local"}, waits={_DIFFERS: 1}),
    "wp": Scenario(plain, {"schedule": "wp"}),
    "dpu": Scenario(plain, {"schedule": "dpu"}),
    "sync": Scenario(plain, {"schedule": "sync"}, waits_of_window={_SKIPPED: 1}),
    "acco, two groups, clipped": Scenario(plain, {"clip": 0.5}, groups=2),
    "acco bf16": Scenario(plain, {"precision": "bf16"}),
    "acco bf16, sums in fp32": Scenario(plain, {"precision": "bf16+fp32"}),
    "local bf16": Scenario(plain, {"schedule": "local", "precision": "bf16"}, waits={_DIFFERS: 1}),
    "acco with a skip": Scenario(with_a_skip),
    "acco fp16 with a skip": Scenario(with_a_skip, {"precision": "fp16static"}, waits_of_window={_OVERFLOW: 1}),
    "acco int4": Scenario(plain, {"estimate_comm": "int4"}),
    "acco int8 bf16": Scenario(plain, {"estimate_comm": "int8", "precision": "bf16"}),
    "acco with a warm-up": Scenario(plain, {"overlap_warmup_steps": 2}, waits={_SKIPPED: 2}),
    "acco, the fraction measured": Scenario(long, {"estimate_fraction": "auto"}, waits={_INSTANT: 10, _GATHERED: 2}),
    "acco, monitored": Scenario(plain, is_monitored=True),
    "acco, looks": Scenario(with_looks, waits={_DIFFERS: 6}),
    "wp, looks": Scenario(with_looks, {"schedule": "wp"}, waits={_DIFFERS: 12}),
    "local, looks": Scenario(with_looks, {"schedule": "local"}, waits={_DIFFERS: 13}),
    "acco, looks at the state": Scenario(with_looks_at_the_state),
    "acco on another stream": Scenario(on_another_stream),
    "acco, looks on another stream": Scenario(with_looks_on_another_stream),
    "acco, finished on another stream": Scenario(finished_on_another_stream),
    "acco adaptive": Scenario(adaptive, {"accumulation": "adaptive"}, waits=_ADAPTIVE, waits_of_window={_COUNTS: 2}),
    "dpu adaptive": Scenario(
        adaptive,
        {"accumulation": "adaptive", "schedule": "dpu"},
        waits=_ADAPTIVE,
        waits_of_window={_COUNTS: 1},
    ),
    "acco, saved and loaded": Scenario(saved_and_loaded, waits={_DIFFERS: 2}),
    "local, saved and loaded": Scenario(saved_and_loaded, {"schedule": "local"}, waits={_DIFFERS: 3}),
    "wp, saved and loaded": Scenario(saved_and_loaded, {"schedule": "wp"}, waits={_DIFFERS: 2}),
    "acco, destroyed on another stream": Scenario(destroyed_on_another_stream),
    "acco, left in a round": Scenario(left_in_a_round),
    "two engines": Scenario(two_engines),
    "acco int4, commits in int8": Scenario(plain, {"estimate_comm": "int4", "commit_comm": "int8"}),
    "acco, commits in int8, looks": Scenario(
        with_looks, {"commit_comm": "int8", "precision": "bf16"}, waits={_DIFFERS: 6}
    ),
    "local, commits in int8, looks": Scenario(
        with_looks, {"commit_comm": "int8", "schedule": "local"}, waits={_DIFFERS: 13}
    ),
    "wp, commits in int8, looks": Scenario(with_looks, {"commit_comm": "int8", "schedule": "wp"}, waits={_DIFFERS: 12}),
    "acco, commits in int8, saved and loaded": Scenario(saved_and_loaded, {"commit_comm": "int8"}, waits={_DIFFERS: 2}),
}
# Whose waits nobody has counted: every schedule in ways of which the ones above take some.
MORE_SCENARIOS = {
    f"{schedule} {precision}, {drive.__name__}": Scenario(drive, {"schedule": schedule, "precision": precision})
    for schedule in SCHEDULES
    for precision in ("fp32", "bf16+fp32")
    for drive in (
        with_looks,
        with_looks_on_another_stream,
        finished_on_another_stream,
        on_changing_streams,
        saved_and_loaded_on_another_stream,
        with_a_state_that_is_set,
        destroyed_on_another_stream,
    )
}


@contextmanager
def modelled(device: Device) -> Iterator[Any]:
    """Lets this package take the CPU for the device inside the block, and gloo for NCCL."""
    new_group = dist.new_group

    def group_of_gloo(ranks=None, timeout=None, backend=None, pg_options=None, **arguments):
        return new_group(ranks, timeout, "gloo", None, **arguments)

    with (
        mock.patch.multiple(devices, has_streams=lambda device: True, uses_nccl=lambda device: True),
        mock.patch.object(dist, "new_group", group_of_gloo),
        mock.patch.object(dist, "ProcessGroupNCCL", create=True),
        watched(device) as operators,
    ):
        yield operators


def run(name: str, folder: str, answers: str, fault: str | None = None, ranks_per_host: int = 1, seed: int = 1) -> Seen:
    """Runs one scenario on this rank, with one of the faults if it is named."""
    device, scenario = Device(answers, seed + dist.get_rank()), (SCENARIOS | MORE_SCENARIOS)[name]
    training = Training(scenario, device, folder, ranks_per_host)
    with FAULTS[fault].seed() if fault else nullcontext(), modelled(device) as operators:
        try:
            scenario.drive(training)
        finally:
            training.end()
    return Seen(device.findings, dict(device.waits), dict(operators.calls), training.ended_windows)
