# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Writes what ``ds_acco compare`` reads: where $DEEPSPEED_ACCO_RECORD names a folder, ``rank{R}.jsonl`` of each rank.

The first line describes the run, every further one an optimizer step (recorder_format.py), of whatever optimizer.
Nothing of training changes, and nothing waits for the device: on CUDA a step is written once it has passed.
"""

from __future__ import annotations

import atexit
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..algorithm.schedules import ESTIMATE, SCHEDULES
from ..algorithm.step_time import WARM_UP_STEPS
from ..algorithm.window import phase_a_micro_batches
from ..runtime.clock import Instant, LaneTimes
from .deepspeed_engine import Engine
from .recorder_format import RECORD_FOLDER, RECORD_RUN, RankHeader, RankStep

INTERFACES, RDMA_DEVICES = Path("/sys/class/net"), Path("/sys/class/infiniband")  # as the kernel shows them

_recorders: list[Recorder] = []  # at most one: of the first engine that steps


def of_step(engine: Engine):
    """Returns the context to run one ``DeepSpeedEngine._take_model_step`` in; empty without $DEEPSPEED_ACCO_RECORD, and
    for every engine of the process but the first that steps."""
    folder = os.environ.get(RECORD_FOLDER)
    if folder and not _recorders:
        _recorders.append(Recorder(engine, Path(folder)))
        _recorders[0].attach(engine)
    if _recorders and _recorders[0].engine() is engine:
        return _recorders[0].step(engine)
    return nullcontext()


def finish() -> None:
    """Ends the recording of this process; the next engine that steps is recorded anew."""
    while _recorders:
        _recorders.pop().close()


class Recorder:
    """Writes one engine's steps.

    Args:
        folder: where ``rank{R}.jsonl`` goes; it is made if absent.

    Attributes:
        engine: a weak reference to the engine.
    """

    def __init__(self, engine: Engine, folder: Path):
        self.engine = weakref.ref(engine)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"rank{engine.global_rank}.jsonl", "w", buffering=1, encoding="utf-8")
        self._seen = _lane_times(engine) or LaneTimes()
        self._seen_bytes = _wire_bytes(engine) or (0, 0)
        self._counter = _interface_counter(engine.device)
        self._seen_on_interface = 0 if self._counter is None else _count(self._counter)
        self._steps = 0
        self._last_end: Instant | None = None
        self._looked: list[bool] = []  # one entry for each look since the last step
        self._pending: list[tuple[RankStep, Instant | None, Instant, Instant]] = []

    def attach(self, engine: Engine) -> None:
        """Writes the first line, hooks the module, so that looks are known, and closes the file at exit."""
        self._write(header_of(engine))
        self._hook(engine.module)
        atexit.register(self.close)

    def _hook(self, module: torch.nn.Module) -> None:
        # Functions and not bound methods: a deepcopy of the module would copy this object and its file.
        looked, owner = self._looked, weakref.ref(module)

        def before_forward(module, args):
            if module is owner() and not module.training:
                looked.append(True)

        def before_state_dict(module, prefix, keep_vars):
            if module is owner():
                looked.append(True)

        module.register_forward_pre_hook(torch.compiler.disable(before_forward))
        module.register_state_dict_pre_hook(before_state_dict)

    @contextmanager
    def step(self, engine: Engine) -> Iterator[None]:
        """Measures what runs inside, the engine's step, and the time since the previous one's end."""
        device = engine.device
        begin = Instant(device)
        yield
        end = Instant(device)
        self._steps += 1
        line = RankStep(
            step=self._steps,
            **self._rounds(engine),
            **self._wire(engine),
            interface_bytes=self._on_interface(),
            samples=_samples(engine),
            peak_bytes=_peak_bytes(device),
            looked=bool(self._looked),
            a=_phase_a(engine),
        )
        self._looked.clear()
        self._pending.append((line, self._last_end, begin, end))
        self._last_end = end
        if self._steps == WARM_UP_STEPS:
            _reset_peak(device)
        while self._pending and self._pending[0][3].is_known():
            self._write_first_pending()

    def _rounds(self, engine: Engine) -> dict[str, Any]:
        """Returns the rounds finished since the previous line: seconds, seconds waited for them, number, and the mean
        seconds of an ESTIMATE."""
        times = _lane_times(engine)
        if times is None:
            return {}
        spent, self._seen = times.since(self._seen), times
        estimates = spent.rounds_of.get(ESTIMATE.name, 0)
        estimate_s = spent.round_s_of[ESTIMATE.name] / estimates if estimates else None
        return {
            "round_s": spent.round_s,
            "exposed_s": spent.exposed_s,
            "rounds": spent.rounds,
            "estimate_s": estimate_s,
        }

    def _wire(self, engine: Engine) -> dict[str, Any]:
        """Returns the payload bytes that this rank moved in those rounds, where the optimizer counts them."""
        now = _wire_bytes(engine)
        if now is None:
            return {}
        before, self._seen_bytes = self._seen_bytes, now
        sent, received = (after - earlier for after, earlier in zip(now, before))
        return {"sent_bytes": sent, "received_bytes": received}

    def _on_interface(self) -> int | None:
        """Returns the bytes that the host sent since the previous line; None where this rank does not count them."""
        if self._counter is None:
            return None
        before, self._seen_on_interface = self._seen_on_interface, _count(self._counter)
        return self._seen_on_interface - before

    def _write_first_pending(self) -> None:
        line, last_end, begin, end = self._pending.pop(0)
        step_s = None if last_end is None else end.seconds_since(last_end)
        self._write(replace(line, inside_s=end.seconds_since(begin), step_s=step_s))

    def _write(self, line: RankHeader | RankStep) -> None:
        print(json.dumps(asdict(line)), file=self._file)

    def close(self) -> None:
        """Writes what has not passed on the device yet, waiting for it, and closes the file."""
        while self._pending:
            self._pending[0][3].wait()
            self._write_first_pending()
        self._file.close()


def _lane_times(engine) -> LaneTimes | None:
    """Returns a copy of ACCO's sums; None with another optimizer."""
    return engine.optimizer.lane_times() if hasattr(engine.optimizer, "lane_times") else None


def _wire_bytes(engine) -> tuple[int, int] | None:
    """Returns (sent, received) since the start; None with an optimizer that does not count."""
    counted = getattr(engine.optimizer, "wire_bytes", None)
    return None if counted is None else tuple(counted)


def _interface_counter(device: torch.device) -> Path | None:
    """Returns the file in which the kernel counts what this host sends on the interface of the collectives; None on
    all ranks but the host's first, and where it cannot be told which interface that is.

    On CUDA that takes NCCL_SOCKET_IFNAME with one whole name, which may stand behind "=", and no RDMA device: NCCL then
    sends past the kernel. Else GLOO_SOCKET_IFNAME.
    """
    if os.environ.get("LOCAL_RANK") != "0" or (device.type == "cuda" and RDMA_DEVICES.exists()):
        return None
    named = os.environ.get("NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME", "")
    counter = INTERFACES / named.removeprefix("=") / "statistics" / "tx_bytes"
    return counter if counter.is_file() else None


def _count(counter: Path) -> int:
    return int(counter.read_text())


def _samples(engine) -> int | None:
    """Returns what this rank computed in an adaptive window that has just ended; None where windows are fixed."""
    settings = getattr(engine.optimizer, "settings", None)
    if settings is None or not settings.is_adaptive:
        return None
    return engine.optimizer.last_micro_batches * engine.train_micro_batch_size_per_gpu()


def header_of(engine) -> RankHeader:
    """Describes the run that the engine trains."""
    settings = getattr(engine.optimizer, "settings", None)
    n = engine.gradient_accumulation_steps()
    parameters = list(engine.module.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    summed_in = getattr(engine.optimizer, "gradient_accumulation_dtype", None)
    return RankHeader(
        rank=engine.global_rank,
        world_size=engine.dp_world_size,
        optimizer=type(engine.basic_optimizer).__name__,
        schedule=settings.schedule if settings else None,
        accumulation=settings.accumulation if settings else None,
        estimate_comm=getattr(settings, "estimate_comm", None),
        commit_comm=getattr(settings, "commit_comm", None),
        stage=engine.zero_optimization_stage(),
        numel=sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable),  # ZeRO-3: the whole
        weight_bytes=trainable[0].element_size(),
        comm_bytes=torch.empty((), dtype=engine.communication_data_type).element_size(),
        accumulation_bytes=torch.empty((), dtype=summed_in).element_size() if summed_in else None,
        n=n,
        a=_phase_a(engine),
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        samples_per_step=engine.train_batch_size(),
        device=engine.device.type,
        torch=torch.__version__,
        deepspeed=_deepspeed_version(),
        run=os.environ.get(RECORD_RUN),
    )


def _phase_a(engine) -> int | None:
    """Returns phase A's micro-batches in a fixed window now ("auto" changes it once); None where there is one phase."""
    settings = getattr(engine.optimizer, "settings", None)
    if settings is None or not SCHEDULES[settings.schedule].has_two_phases:
        return None
    return phase_a_micro_batches(engine.gradient_accumulation_steps(), engine.optimizer.estimate_fraction)


def _deepspeed_version() -> str:
    from deepspeed import __version__

    return __version__


def _peak_bytes(device: torch.device) -> int | None:
    """Returns on CUDA the peak of allocated device memory, else the process's peak of resident memory, in bytes; None
    where the kernel does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed here: the peak then includes building the model
