# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Measures for ``ds_acco kernels`` what the rounds cost per parameter, beside other AdamW implementations and a copy.

Every candidate runs once per turn, in an order that changes from turn to turn; the figures are medians over the turns.
The rounds' operands lie in the pages that training gives them (optim/huge_pages.py), other optimizers' in those that
they get.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ..optim import adamw, build_locks, flat, local_prediction, native, ops
from ..optim import quantization as quantize
from ..optim.adamw import AdamWHyper
from ..optim.huge_pages import use_huge_pages

_HYPER = AdamWHyper(lr=1e-4)
_STATE_BYTES = 12  # master, exp_avg, exp_avg_sq in fp32
_BITS = 4
# Of a parameter at least: three sets of operands for the rounds (52 bytes), two more of weights (4), parameter,
# gradient and state of four optimizers (64), what is kept of one of them (12), and the two ends of the copy (8).
_OPERAND_BYTES = 140
_SHORT_NUMEL = 2**23  # fewer are measured several times in a row on CUDA
_PLAIN_SHARE = 8  # the torch path in 4 bits is measured on so small a part: it takes many times as long


@dataclass(frozen=True)
class Row:
    """Holds one line of the table; bytes_per_param counts what the work must read and write, once each. Where a row
    has no gradient or no weights, the dtypes are those of what it reads and writes."""

    name: str
    grad_dtype: str
    weight_dtype: str
    ns_per_param: float
    bytes_per_param: float
    gb_s: float
    copy_share: float


@dataclass(frozen=True)
class _Candidate:
    name: str
    grad_dtype: torch.dtype | str
    weight_dtype: torch.dtype | str
    bytes_per_param: float
    run: Callable[[], Any]
    numel: int


class _Operands:
    def __init__(self, numel: int, device: torch.device, grad_dtype: torch.dtype, weight_dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)
        values = [torch.randn(numel, device=device, generator=generator) for _ in range(3)]
        step = torch.full((), 10.0, device=device)
        self.shard = ops.AdamWShard(values[0].mul_(0.02), values[1].mul_(1e-3), values[2].square_().mul_(1e-6), step)
        self.grad = torch.randn(numel, device=device, generator=generator).mul_(1e-3).to(grad_dtype)
        self.scale = torch.ones((), device=device)
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        self.out = torch.empty(numel, dtype=weight_dtype, device=device).copy_(self.shard.master)
        self.huge_page_bytes = use_huge_pages((*self.state(), self.grad, self.out))

    def state(self):
        """Returns the master weights and both moments."""
        return self.shard.master, self.shard.exp_avg, self.shard.exp_avg_sq

    def update(self, module, name) -> Callable[[], Any]:
        """Returns a call of the update ``name`` of ``module``."""
        function = getattr(module, name)
        return lambda: function(self.shard, self.grad, _HYPER, self.scale, self.is_finite, self.out)

    def traffic(self, name) -> Callable[[], Any]:
        """Returns a call of the native kernel ``name``, which only moves the bytes of an update."""
        overload = getattr(torch.ops.deepspeed_acco, name)
        return lambda: overload(*self.state(), self.grad, self.out)

    def optimizer(self, make, in_huge_pages: bool = False) -> torch.optim.Optimizer:
        """Returns an optimizer of a copy of the master, in place, with an fp32 gradient as such optimizers want it."""
        param = torch.nn.Parameter(self.shard.master.clone())
        param.grad = self.grad.float()
        optimizer = make([param])
        optimizer.step()  # makes its state
        if in_huge_pages:
            use_huge_pages((param.data, param.grad, *filter(torch.is_tensor, optimizer.state[param].values())))
        return optimizer


def _clone_step_restore(optimizer, out) -> Callable[[], Any]:
    """Returns the estimate without a kernel: keeps everything, takes a step, copies the weights out, puts all back."""
    param = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[param]
    changed = [param.data, *(value for value in state.values() if torch.is_tensor(value))]

    def run():
        kept = [tensor.clone() for tensor in changed]
        optimizer.step()
        out.copy_(param.data)
        for tensor, old in zip(changed, kept):
            tensor.copy_(old)

    return run


def _deepspeed_candidate(device: torch.device):
    """Returns (name, maker, why not) of DeepSpeed's own Adam for that device, which it has to build first."""
    operators = "cpu_adam" if device.type == "cpu" else "fused_adam"
    for lock in build_locks.find_locks():
        if lock.parent.name == operators and build_locks.is_forgotten(lock):
            return "", None, build_locks.describe_lock(lock)
    try:
        if device.type == "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            name, make = "DeepSpeedCPUAdam", DeepSpeedCPUAdam
            DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(8))], lr=_HYPER.lr)
        else:
            from deepspeed.ops.adam import FusedAdam

            name, make = "FusedAdam", FusedAdam
            FusedAdam([torch.nn.Parameter(torch.zeros(8, device=device))], lr=_HYPER.lr)
        return name, lambda params: make(params, lr=_HYPER.lr), ""
    except Exception as failure:  # whatever its compiler can do
        lines = str(failure).strip().splitlines()
        return "", None, f"{type(failure).__name__}: {lines[0] if lines else ''}"


def _quantized(low: _Operands, full: _Operands, is_native: bool) -> Iterator[_Candidate]:
    """Yields the kernels of rounds in 4 bits, and the packing that one of them replaces."""
    bf16, fp32, int4 = torch.bfloat16, torch.float32, f"int{_BITS}"
    module: ModuleType
    if is_native:
        kernels, share, module, pack = "native", 1, ops, ops.pack
    else:
        kernels, share, module, pack = "torch path", _PLAIN_SHARE, quantize, flat.pack
    numel = -(-low.grad.numel() // share)
    gradients, weights, total = full.grad[:numel], low.out[:numel], full.out[:numel]
    sent = [gradients.new_empty(quantize.message_bytes(numel, _BITS), dtype=torch.uint8) for _ in range(4)]
    records = torch.empty_like(sent[0])
    use_huge_pages((*sent, records))
    for message in sent:
        module.quantize(gradients, message, _BITS, 1.0)
    master, exp_avg, exp_avg_sq = (tensor[:numel] for tensor in low.state())
    shard = ops.AdamWShard(master, exp_avg, exp_avg_sq, low.shard.step)
    operands = (shard, low.grad[:numel], _HYPER, low.scale, low.is_finite)
    estimate = partial(module.adamw_estimate_change, *operands, bf16, records, _BITS)
    commit = partial(module.adamw_commit_change, *operands, weights, records, _BITS)
    size = records.numel() / numel
    rows: list[tuple[str, torch.dtype | str, torch.dtype | str, float, Callable[[], Any]]] = [
        (f"estimate to {int4}", bf16, int4, _STATE_BYTES + 2 + size, estimate),
        (f"estimate to {int4} from weights", bf16, int4, _STATE_BYTES + 4 + size, partial(estimate, base=weights)),
        (f"commit to {int4} from weights", bf16, int4, 2 * _STATE_BYTES + 4 + size, commit),
        ("pack", fp32, bf16, 6, partial(pack, gradients, weights, 0.5, clears=False)),
        (f"pack to {int4}", fp32, int4, 4 + size, partial(module.quantize, gradients, records, _BITS, 0.5)),
        (f"sum of 2 in {int4}", int4, fp32, 2 * size + 4, partial(module.dequantize_sum, sent[:2], total, _BITS)),
        (f"sum of 4 in {int4}", int4, fp32, 4 * size + 4, partial(module.dequantize_sum, sent, total, _BITS)),
        (f"add {int4}", int4, bf16, size + 4, partial(module.add_change, sent[0], low.is_finite, weights, _BITS)),
    ]
    for name, source, target, bytes_per_param, run in rows:
        yield _Candidate(f"{name}, {kernels}", source, target, bytes_per_param, run, numel)


def _local(low: _Operands, is_native: bool) -> Iterator[_Candidate]:
    """Yields the kernels of the schedule local: its prediction in bf16, and the roots that it divides by."""
    bf16, fp32 = torch.bfloat16, torch.float32
    kernels, module = ("native", ops) if is_native else ("torch path", local_prediction)
    numel, step = low.grad.numel(), low.shard.step
    exp_avg_sq, roots = low.shard.exp_avg_sq, low.grad.new_empty(local_prediction.block_count(numel), dtype=fp32)
    before, live = low.out.clone(), low.out.clone()
    use_huge_pages((before, live))
    on = local_prediction.Operands(low.out, before, live, low.grad, roots, step, numel)
    make_roots = partial(module.block_roots, exp_avg_sq, step, _HYPER.beta2, _HYPER.eps, roots)
    make_roots()
    predict = partial(module.predict_locally, on, _HYPER, 1.0, low.scale, low.is_finite)
    of_roots = 4 / local_prediction.BLOCK
    yield _Candidate(f"predict, {kernels}", bf16, bf16, 6 * bf16.itemsize + of_roots, predict, numel)
    yield _Candidate(f"roots, {kernels}", fp32, fp32, fp32.itemsize + of_roots, make_roots, numel)


def require_room(numel: int, device: torch.device) -> None:
    """Raises ValueError where so many parameters cannot be measured with all the memory that the device has."""
    if device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(device)
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = memory // _OPERAND_BYTES
    if numel > most:
        raise ValueError(
            f"--numel {numel:,} is not allowed; allowed: up to {most:,} here, since a parameter's operands take "
            f"{_OPERAND_BYTES} bytes"
        )


def candidates(numel: int, device: torch.device) -> tuple[list[_Candidate], list[str]]:
    """Returns what is measured, and remarks on what could not be."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found: list[_Candidate] = []
    remarks: list[str] = []
    is_native = native.kernels_name(device) == "native"
    if not is_native:
        remarks.append(f"no native kernels on {device.type}: {native.kernels_reason(device)}")
    low = _Operands(numel, device, bf16, bf16)
    full = _Operands(numel, device, fp32, fp32)
    if low.huge_page_bytes:
        remarks.append("the rounds' operands lie in 2 MiB pages, as in training; other optimizers make their own")

    def add(name, operands, state_bytes, run):
        grad_dtype, weight_dtype = operands.grad.dtype, operands.out.dtype
        bytes_per_param = state_bytes + grad_dtype.itemsize + weight_dtype.itemsize
        found.append(_Candidate(name, grad_dtype, weight_dtype, bytes_per_param, run, numel))

    for operands in (low, full) if is_native else ():
        add("commit, native", operands, 2 * _STATE_BYTES, operands.update(ops, "adamw_commit"))
        add("estimate, native", operands, _STATE_BYTES, operands.update(ops, "adamw_estimate"))
    if is_native:
        twin = _Operands(numel, device, bf16, bf16)  # the values only change places: not for the arithmetic above
        add("commit, no arithmetic", twin, 2 * _STATE_BYTES, twin.traffic("traffic_commit"))
        add("estimate, no arithmetic", twin, _STATE_BYTES, twin.traffic("traffic_estimate"))
    add("commit, torch path", low, 2 * _STATE_BYTES, low.update(adamw, "adamw_commit"))
    add("estimate, torch path", low, _STATE_BYTES, low.update(adamw, "adamw_estimate"))
    for kernels_are_native in (True, False) if is_native else (False,):
        found.extend(_quantized(low, full, kernels_are_native))
        found.extend(_local(low, kernels_are_native))
    remarks.append(f"the torch path of the rows in {_BITS} bits is measured on 1/{_PLAIN_SHARE} of the parameters")

    # These have no 16-bit copy of the weights: 28 bytes are master, exp_avg, exp_avg_sq twice and the fp32 gradient.
    step_bytes = 2 * _STATE_BYTES + fp32.itemsize
    fused = full.optimizer(lambda params: torch.optim.AdamW(params, lr=_HYPER.lr, fused=True))
    foreach = full.optimizer(lambda params: torch.optim.AdamW(params, lr=_HYPER.lr, foreach=True))
    found.append(_Candidate("torch AdamW, fused", fp32, fp32, step_bytes, fused.step, numel))
    if full.huge_page_bytes:
        moved = full.optimizer(lambda params: torch.optim.AdamW(params, lr=_HYPER.lr, fused=True), in_huge_pages=True)
        found.append(_Candidate("torch AdamW, fused, in 2 MiB pages", fp32, fp32, step_bytes, moved.step, numel))
    found.append(_Candidate("torch AdamW, foreach", fp32, fp32, step_bytes, foreach.step, numel))
    name, make, why_not = _deepspeed_candidate(device)
    if make is None:
        remarks.append(f"DeepSpeed's own Adam is not measured: {why_not}")
    else:
        found.append(_Candidate(name, fp32, fp32, step_bytes, full.optimizer(make).step, numel))
    # Clone and restore read and write the state once more each; the copy out reads the weights again.
    restored = full.optimizer(lambda params: torch.optim.AdamW(params, lr=_HYPER.lr, fused=True))
    clone_bytes = step_bytes + 4 * _STATE_BYTES + fp32.itemsize + bf16.itemsize
    run = _clone_step_restore(restored, low.out)
    found.append(_Candidate("estimate by clone + step + restore", fp32, bf16, clone_bytes, run, numel))
    return found, remarks


class HostClock:
    """Measures one call by the host's clock."""

    waits: frozenset[Callable[[], Any]] = frozenset()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Returns what one call takes."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class DeviceClock:
    """Measures calls by events on a CUDA stream that has other work until the last call is enqueued: no time of the
    host is in the figure.

    Attributes:
        waits: calls of which that is not so: the host waits for the device inside of them.
    """

    _FEWEST_CYCLES, _MOST_CYCLES = 2**21, 2**27  # of that work: a millisecond; a tenth of a second

    def __init__(self, device: torch.device, repetitions: int):
        self._device, self._repetitions = device, repetitions
        self._cycles: dict[Callable[[], Any], int] = {}
        self.waits: set[Callable[[], Any]] = set()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Returns what one of the repeated calls takes."""
        cycles = self._cycles.get(run, self._FEWEST_CYCLES)
        while True:
            begin, end = (torch.Event(device=self._device, enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            begin.record()
            for _ in range(self._repetitions):
                run()
            end.record()
            is_enqueued_in_time = not begin.query()
            end.synchronize()
            if not is_enqueued_in_time and cycles >= self._MOST_CYCLES:
                self.waits.add(run)
            if is_enqueued_in_time or run in self.waits:
                return begin.elapsed_time(end) / 1e3 / self._repetitions
            cycles = self._cycles[run] = 4 * cycles


@torch.no_grad()
def measure(
    numel: int, device: torch.device, *, threads: int | None = None, turns: int = 15, max_blocks: int = 0
) -> dict[str, Any]:
    """Measures every candidate and returns the report as ``--json`` writes it.

    Args:
        threads: for torch's CPU operators and the native ones; None: as it is.
        turns: how often each candidate is measured, after two turns that do not count.
        max_blocks: cap on the thread blocks of the native CUDA kernels; 0: none.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    # Short kernels several times, so that what events resolve is far below the figure.
    repetitions = max(1, _SHORT_NUMEL // numel)
    clock = DeviceClock(device, repetitions) if device.type == "cuda" else HostClock()
    bound = ExitStack()
    bound.enter_context(ops.at_most_blocks(max_blocks))
    try:
        found, remarks = candidates(numel, device)
        source, target = (torch.ones(numel, device=device) for _ in range(2))
        copy = _Candidate("copy", torch.float32, torch.float32, 8, lambda: target.copy_(source), numel)
        order = [copy, *found]
        times: dict[int, list[float]] = {id(candidate): [] for candidate in order}
        shuffled = random.Random(0)
        gc.collect()
        for turn in range(-2, turns):
            print(f"\rturn {turn + 1}/{turns}" if turn >= 0 else "\rwarming up", end="", file=sys.stderr, flush=True)
            for candidate in shuffled.sample(order, len(order)):
                spent = clock.seconds(candidate.run)
                if turn >= 0:
                    times[id(candidate)].append(spent)
        print(file=sys.stderr)
        for candidate in order:
            if candidate.run in clock.waits:
                remarks.append(f"{candidate.name} waits for the device: time of the host is in its figure")
        used_threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        bound.close()

    def speed(candidate):
        spent = statistics.median(times[id(candidate)])
        return spent / candidate.numel * 1e9, candidate.bytes_per_param * candidate.numel / spent / 1e9

    copy_gb_s = speed(copy)[1]
    rows = []
    for candidate in found:
        ns, gb_s = speed(candidate)
        grad, weight = (str(dtype).removeprefix("torch.") for dtype in (candidate.grad_dtype, candidate.weight_dtype))
        rows.append(Row(candidate.name, grad, weight, ns, candidate.bytes_per_param, gb_s, gb_s / copy_gb_s))
    return {
        "device": device_name(device),
        "numel": numel,
        "threads": used_threads,
        "copy_gb_s": copy_gb_s,
        "rows": [asdict(row) for row in rows],
        "remarks": remarks,
    }


def device_name(device: torch.device) -> str:
    """Returns what the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "cpu"


def table(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    head = f"{report['device']}, {report['numel']:,} parameters, {report['threads']} CPU threads, "
    lines = [head + f"copy {report['copy_gb_s']:.1f} GB/s", ""]
    width = max(len(row["name"]) for row in report["rows"])
    lines.append(f"{'':{width}}  {'grad':8}  {'weights':8}  ns/param  bytes/param    GB/s  of copy")
    for row in report["rows"]:
        lines.append(
            f"{row['name']:{width}}  {row['grad_dtype']:8}  {row['weight_dtype']:8}  {row['ns_per_param']:8.3f}  "
            f"{row['bytes_per_param']:11.4g}  {row['gb_s']:6.1f}  {row['copy_share']:7.2f}"
        )
    return "\n".join(lines + [f"({remark})" for remark in report["remarks"]])
