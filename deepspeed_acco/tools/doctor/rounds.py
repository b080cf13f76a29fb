# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Measures rounds without a model: how long they take, what part of that is communication, and what is hidden."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import deepspeed.comm
import torch

from ...algorithm.schedules import COMMIT, ESTIMATE, Round
from ...algorithm.wire import COMMIT_COMMS, ESTIMATE_COMMS, Wire
from ...engine.hosts import agree_on_levels
from ...engine.log import describe_bytes
from ...optim.adamw import AdamWHyper, AdamWShard
from ...runtime.buffers import FlatBuffers
from ...runtime.clock import Instant
from ...runtime.communicator import Communicator
from ...runtime.driver import RoundDriver
from ...runtime.lanes import make_lane
from ...runtime.layout import GroupLayout
from ...runtime.levels import Levels
from ...runtime.round_inputs import RoundInputs
from ...runtime.written import Fingerprint, sampled_places
from ..words import number, percent
from .finding import NOT_APPLICABLE, OK, WARN, Finding
from .subject import Subject

_FIRST_NUMEL = 2**19
_MOST_NUMEL = {"cpu": 2**24, "cuda": 2**28}
_ROUND_S = 0.3
_TURNS = 5
_COMPUTE_SHARE = 2  # so many rounds as long is the computation beside one
_LITTLE_HIDDEN = 0.5


class _Rounds:
    """Holds the rounds of ``numel`` parameters in the training's precision, on the lane that training has.

    Attributes:
        exchanged_bytes: what this rank sent in the last exchange.
    """

    def __init__(self, subject: Subject, comm: Communicator, levels: Levels, numel: int):
        self._comm, self._device, self.exchanged_bytes = comm, subject.device, 0
        comm.use_levels(levels)
        layout = GroupLayout(-(-numel // (2 * comm.world_size)) * 2 * comm.world_size, levels, comm.rank)
        live = torch.zeros(layout.padded_numel, dtype=subject.training.dtype, device=subject.device)
        settings = subject.training.settings
        wire = Wire(ESTIMATE_COMMS[settings.estimate_comm], COMMIT_COMMS[settings.commit_comm])
        self._buffers = FlatBuffers([live], [layout], live.dtype, live.dtype, wire)
        self._buffers.grads[0].fill_(1e-3)
        shard = AdamWShard.fresh(self._buffers.live_shards[0].float().clone(), {})
        self.lane = make_lane("auto", subject.device)
        fingerprint = Fingerprint([live], [sampled_places([(0, live.numel())], live.device)])
        self.driver = RoundDriver(self._buffers, [shard], comm, self.lane, fingerprint)
        self._inputs = RoundInputs((AdamWHyper(),), 1.0, 1 / comm.world_size, 0.0, window=0)

    def start(self, this: Round) -> None:
        """Starts a round."""
        self.driver.advance(this, self._inputs, clears=False, blocks=False)

    def round_s(self, this: Round) -> float:
        """Returns how long a round with nothing beside it takes on this rank."""
        self._comm.barrier()
        before = self.lane.times()

        def run() -> None:
            self.start(this)
            self.driver.finish()

        _seconds(self._device, run)
        return self.lane.times().since(before).round_s

    def exchange_s(self) -> float:
        """Returns how long the reduce-scatter and the all-gather of a COMMIT take on this rank."""
        self._comm.barrier()
        return _seconds(self._device, self._exchange)

    def _exchange(self) -> None:
        buffers, sent = self._buffers, self._comm.sent_bytes
        bits = buffers.wire.commit
        self._comm.reduce_scatter_sum(buffers.arenas, buffers.reduced, buffers.encoding(bits))
        self._comm.all_gather(buffers.gathered(bits))
        self.exchanged_bytes = self._comm.sent_bytes - sent


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Returns how long the device takes for the work."""
    begin = Instant(device)
    work()
    end = Instant(device)
    end.wait()
    return end.seconds_since(begin)


@contextmanager
def _rounds(subject: Subject, numel: int, group=None) -> Iterator[tuple[_Rounds, Levels]]:
    """Gives the rounds of all ranks over the levels of their hosts, or those of a group in one level."""
    with ExitStack() as at_end:
        settings = subject.training.settings
        comm = Communicator(group, subject.device, subject.timeout_s, settings.sm_share)
        at_end.callback(comm.destroy)
        asked = settings.ranks_per_host
        levels = agree_on_levels(comm, asked) if group is None else Levels.flat(comm.world_size)
        rounds = _Rounds(subject, comm, levels, numel)
        at_end.callback(rounds.driver.close)
        yield rounds, levels


def _numel(subject: Subject) -> int:
    """Returns how many parameters are measured: where nobody says it, as many as take about a third of a second."""
    if subject.numel is not None:
        return subject.numel
    with _rounds(subject, _FIRST_NUMEL) as (rounds, _):
        rounds.round_s(COMMIT)
        longest = subject.slowest(rounds.round_s(COMMIT))
    fitting = int(_FIRST_NUMEL * _ROUND_S / longest)
    return max(_FIRST_NUMEL, min(fitting, _MOST_NUMEL[subject.device.type]))


def _median(subject: Subject, measure: Callable[[], float]) -> float:
    """Returns the median of some measurements, behind one that is not counted, on the slowest rank."""
    measure()
    return subject.slowest(statistics.median(measure() for _ in range(_TURNS)))


# ---- rounds and links


def check_rounds(subject: Subject) -> Finding:
    """Measures both kinds of rounds, and the same communication alone."""
    if subject.control.world_size == 1:
        return Finding(NOT_APPLICABLE, "One rank sends nothing.")
    numel = _numel(subject)
    with _rounds(subject, numel) as (rounds, levels):
        commit_s = _median(subject, lambda: rounds.round_s(COMMIT))
        estimate_s = _median(subject, lambda: rounds.round_s(ESTIMATE))
        exchange_s = _median(subject, rounds.exchange_s)
        sent = rounds.exchanged_bytes
    figures = {
        "numel": numel,
        "commit_s": commit_s,
        "estimate_s": estimate_s,
        "exchange_s": exchange_s,
        "sent_bytes": sent,
        "bytes_per_s": sent / exchange_s,
        "communication_share": min(1.0, exchange_s / commit_s),
    }
    rows = []
    if not levels.is_flat:
        for name, groups in _groups_of(levels).items():
            rate = figures[f"bytes_per_s_{name}"] = _rate_of(subject, numel, groups)
            rows.append((f"{name} hosts", f"{_rate(rate)} each way for each rank, all at once"))
    told = (
        f"A COMMIT of {number(numel, 1, 1e-6)} million parameters takes {_ms(commit_s)}, an ESTIMATE "
        f"{_ms(estimate_s)}; {percent(figures['communication_share'], 0)} of a COMMIT is communication, in which each "
        f"rank sends {describe_bytes(sent)} at {_rate(figures['bytes_per_s'])}. A billion parameters would take "
        f"{number(commit_s / numel * 1e9, 1)} s."
    )
    return Finding(OK, told, figures=figures, rows=tuple(rows))


def _groups_of(levels: Levels) -> dict[str, list[tuple[int, ...]]]:
    columns = dict.fromkeys(levels.column(rank) for rank in range(levels.world_size))
    return {"inside": list(levels.hosts), "between": list(columns)}


def _rate_of(subject: Subject, numel: int, groups: list[tuple[int, ...]]) -> float:
    """Returns the bytes/s that the slowest rank sends where each of the groups exchanges by itself."""
    made = {ranks: deepspeed.comm.new_group(list(ranks)) for ranks in groups}
    group = next(group for ranks, group in made.items() if subject.control.rank in ranks)
    with _rounds(subject, numel, group) as (rounds, _):
        longest_s = _median(subject, rounds.exchange_s)
        return rounds.exchanged_bytes / longest_s


def _ms(seconds: float) -> str:
    return f"{number(seconds, 1, 1e3)} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{number(bytes_per_s, 2, 1e-9)} GB/s"


# ---- what is hidden


def _computation(device: torch.device, seconds: float) -> Callable[[], None]:
    """Returns matrix products that take about so long; on CUDA they are only enqueued."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    factor = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(factor)

    def compute(count: int) -> None:
        for _ in range(count):
            torch.mm(factor, factor, out=product)

    first = 8
    for _ in range(2):  # the first time is not that of later ones
        taken_s = _seconds(device, lambda: compute(first))
    return functools.partial(compute, max(1, round(first * seconds / taken_s)))


def check_hidden(subject: Subject) -> Finding:
    """Measures a computation C, a round R, and both at once."""
    if subject.control.world_size == 1:
        return Finding(NOT_APPLICABLE, "One rank sends nothing that could be hidden.")
    compute_s, round_s, beside_s, both_s = [], [], [], []
    with _rounds(subject, _numel(subject)) as (rounds, _):
        compute = _computation(subject.device, _COMPUTE_SHARE * _median(subject, lambda: rounds.round_s(COMMIT)))
        for _ in range(_TURNS):  # in turns: what else the machine does meets all of them
            round_s.append(rounds.round_s(COMMIT))
            compute_s.append(_seconds(subject.device, compute))
            subject.control.barrier()
            rounds.start(COMMIT)
            begin = Instant(subject.device)
            compute()
            computed = Instant(subject.device)
            rounds.driver.finish()
            end = Instant(subject.device)
            end.wait()
            beside_s.append(computed.seconds_since(begin))
            both_s.append(end.seconds_since(begin))
    medians = [subject.slowest(statistics.median(times)) for times in (compute_s, round_s, beside_s, both_s)]
    alone, one_round, beside, both = medians
    share, slowing = 1 - (both - alone) / one_round, beside / alone - 1
    figures = dict(zip(("compute_s", "round_s", "compute_beside_round_s", "both_s"), medians, strict=True))
    figures |= {"hidden_share": share, "compute_slowing": slowing}
    told = (
        f"{percent(min(1.0, max(0.0, share)), 0)} of a round of {_ms(one_round)} is hidden behind matrix products of "
        f"{_ms(alone)}, which take {_ms(beside)} beside it ({percent(slowing, 0)} longer)."
    )
    if share >= _LITTLE_HIDDEN:
        return Finding(OK, told, figures=figures)
    advice = (
        "On a CPU a round takes cores from the model: leave some free (OMP_NUM_THREADS)"
        if subject.device.type == "cpu"
        else "Look at the settings above, and measure again with nothing else on the devices"
    )
    return Finding(WARN, told, advice, figures)
