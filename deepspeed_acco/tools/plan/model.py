# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Predicts what a step costs under each ZeRO stage and ACCO schedule: seconds, bytes on the wire, bytes of memory.

All of it is made of formulas; only :func:`calibrated` puts a measured round in. docs/explanation/plan-formulas.md
derives the terms and says what they leave out; here each function names its source. N = H k: ranks, k on each of H
hosts; V: bytes of what a collective moves as a whole; L: latency of a message; D: payload bytes/s of a host, I: of a
rank inside its host; C, R: computation of a step and one round. DeepSpeed's files are those of 0.19.8, below
``deepspeed/runtime``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache

from ...algorithm.schedules import COMMIT, SCHEDULES, Round, Schedule
from ...algorithm.step_time import Figures, best_split
from ...algorithm.window import phase_a_micro_batches, require_room
from ...algorithm.wire import COMMIT_COMMS, ESTIMATE_COMMS, Wire

BACKENDS = ("nccl", "gloo")
STAGES = ("zero0", "zero1", "zero1-reduce", "zero2", "zero2-reduce", "zero3")

# gloo: of an Ethernet frame's 1514 bytes TCP with time stamps leaves 1448 (MTU 1500). NCCL: an assumption.
_EFFICIENCY = {"nccl": 0.9, "gloo": 1448 / 1514}
# Bytes/s at which a rank sends inside its host. NCCL: between PCIe and NVLink. gloo: TCP over loopback. Assumptions.
_INSIDE_BANDWIDTH = {"nccl": 1e11, "gloo": 2e9}
_TREE_SHARE = 0.92  # of D that a tree uses: NCCL, src/graph/tuning.cc
_STEP_INSIDE_HOST = 3.4 / 9.6  # of L: NCCL, src/graph/tuning.cc, NVLink over network
_PIECE_BYTES = 4 * 2**20  # of a rank's messages on gloo that travel at a time (half of runtime/messages.py's room)
_REDUCE_ON_HOST_S = 50e-6  # to synchronize with the device and to launch one reduce of a partition; an assumption
_NORM_BYTES = 16
_PIECES, _SMALLEST_PIECE = 8, 2**20  # of a shard on NCCL with a quantized COMMIT (runtime/collectives.py)
_SCALE_BYTES = 2 / 256  # bf16, one for each block of a quantized round (optim/quantization.py)
_ROOT_BYTES = 4 / 256  # fp32, one for each block, which local gathers (optim/local_prediction.py)
_REDUCE_BUCKET = 500_000_000  # parameters: DeepSpeed, zero/config.py, reduce_bucket_size
_GATHER_BUCKET = 50_000_000  # likewise, stage3_prefetch_bucket_size
_COMMIT_TRAFFIC, _ESTIMATE_TRAFFIC = 28, 16  # bytes of memory per parameter that AdamW reads and writes
_DEFAULT_FRACTION = 0.5  # of the key estimate_fraction
# Of counts and of quantities: whatever the formulas make of these is a finite number.
_MOST, _LEAST, _LARGEST = 10**18, 1e-60, 1e60
_COUNT, _POSITIVE = "a whole number from 1 to 1e18", "from 1e-60 to 1e60"


_ALL_IN_FULL = Wire()
_FULL = "full"  # of the keys estimate_comm and commit_comm
COARSEST_ESTIMATE = min((bits.gradient, name) for name, bits in ESTIMATE_COMMS.items() if bits)[1]
COARSEST_COMMIT = min((bits.gradient, name) for name, bits in COMMIT_COMMS.items() if bits)[1]


@dataclass(frozen=True)
class Mode:
    """Names one way to run ACCO: a schedule, and what its rounds send: keys of ``ESTIMATE_COMMS``, ``COMMIT_COMMS``."""

    schedule: Schedule
    estimate_comm: str = _FULL
    commit_comm: str = _FULL

    @property
    def wire(self) -> Wire:
        """Returns in how many bits its rounds send."""
        estimate = ESTIMATE_COMMS[self.estimate_comm] if self.schedule.has_two_phases else None
        return Wire(estimate, COMMIT_COMMS[self.commit_comm])

    @property
    def is_quantized(self) -> bool:
        """Tells whether any round is sent in fewer bits than its dtype has."""
        return any(self.wire.rounds())

    @property
    def is_listed(self) -> bool:
        """Tells whether tables have it unasked. With a quantized COMMIT that is the one with the coarsest ESTIMATE."""
        if not self.wire.commit:
            return True
        return self.schedule.has_two_phases and self.estimate_comm == COARSEST_ESTIMATE

    @property
    def name(self) -> str:
        """Returns the schedule's name, then the ``estimate_comm`` of a quantized ESTIMATE, then ``commit`` with the
        bits of a quantized COMMIT's gradients: ``acco-int4-commit8``."""
        parts = [self.schedule.name]
        parts += [self.estimate_comm] if self.wire.estimate else []
        parts += [f"commit{self.wire.commit.gradient}"] if self.wire.commit else []
        return "-".join(parts)

    def has_room(self, n: int) -> bool:
        """Tells whether a window of ``n`` micro-batches has one for each phase."""
        return n >= self.schedule.least_micro_batches


def modes() -> dict[str, Mode]:
    """Returns ACCO's modes by name, in the order of the tables: every schedule with every COMMIT, those with two phases
    also with every ESTIMATE."""
    return _modes_of(tuple(SCHEDULES.values()))


@cache
def _modes_of(schedules: tuple[Schedule, ...]) -> dict[str, Mode]:
    found = [
        Mode(schedule, estimate_comm, commit_comm)
        for schedule in schedules
        for commit_comm in COMMIT_COMMS
        for estimate_comm, bits in ESTIMATE_COMMS.items()
        if schedule.has_two_phases or not bits
    ]
    return {mode.name: mode for mode in found}


def names() -> tuple[str, ...]:
    """Returns what can be predicted: DeepSpeed's stages, then ACCO's modes."""
    return (*STAGES, *modes())


def _require(condition: bool, what: str, given, allowed: str) -> None:
    if not condition:
        raise ValueError(f"plan: {what} = {given!r} is not allowed; allowed: {allowed}")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _LEAST <= value <= _LARGEST


@dataclass(frozen=True)
class Model:
    """Describes a model: trainable parameters, and bytes of a weight, a communicated and an accumulated gradient."""

    numel: int
    weight_bytes: int = 2
    comm_bytes: int = 2
    accumulation_bytes: int = 2

    def __post_init__(self):
        _require(_is_count(self.numel), "numel", self.numel, _COUNT)
        for name in ("weight_bytes", "comm_bytes", "accumulation_bytes"):
            _require(getattr(self, name) in (2, 4), name, getattr(self, name), "2 or 4")


@dataclass(frozen=True)
class Cluster:
    """Describes the ranks and what joins them.

    Attributes:
        ranks: data-parallel ranks, N.
        bandwidth: bytes/s of one host in one direction; of one rank where every host has one.
        latency_s: seconds of one message between hosts.
        backend: ``nccl`` or ``gloo``.
        hosts: they share the ranks equally; None: one rank in each.
        overlaps_stock: whether DeepSpeed's ``overlap_comm`` hides anything; None: on nccl, not on gloo.
        efficiency: part of the bandwidth that carries payload, in (0, 1]; None: the backend's.
        two_levels: whether ACCO's rounds move inside the hosts and between them in turn, where several hosts have
            several ranks; False: as with ``"ranks_per_host": 1``, as if each rank had a host of its own.
        inside_bandwidth: payload bytes/s at which a rank sends to the others of its host, of several; None: the
            backend's.
        memory_bytes: what a rank has for model states; only the advice looks at it.
    """

    ranks: int
    bandwidth: float
    latency_s: float = 0.0
    backend: str = "nccl"
    hosts: int | None = None
    overlaps_stock: bool | None = None
    efficiency: float | None = None
    memory_bytes: float = math.inf
    two_levels: bool = True
    inside_bandwidth: float | None = None

    def __post_init__(self):
        _require(_is_count(self.ranks), "ranks", self.ranks, _COUNT)
        _require(_is_positive(self.bandwidth), "bandwidth", self.bandwidth, f"bytes/s {_POSITIVE}")
        _require(0 <= self.latency_s <= _LARGEST, "latency_s", self.latency_s, "seconds from 0 to 1e60")
        _require(self.backend in BACKENDS, "backend", self.backend, " or ".join(BACKENDS))
        if self.hosts is not None:
            fits = _is_count(self.hosts) and self.ranks % self.hosts == 0
            _require(fits, "hosts", self.hosts, f"a whole number that divides the {self.ranks} ranks")
        if self.efficiency is not None:
            fits = _is_positive(self.efficiency) and self.efficiency <= 1
            _require(fits, "efficiency", self.efficiency, "a number > 0 and <= 1")
        fits = self.memory_bytes == math.inf or _is_positive(self.memory_bytes)
        _require(fits, "memory_bytes", self.memory_bytes, f"bytes {_POSITIVE}")
        if self.inside_bandwidth is not None:
            fits = _is_positive(self.inside_bandwidth)
            _require(fits, "inside_bandwidth", self.inside_bandwidth, f"bytes/s {_POSITIVE}")

    def with_ranks(self, ranks: int) -> Cluster:
        """Returns a cluster of the same hosts, more or fewer of them.

        Raises:
            ValueError: unless the ranks fill hosts, two at least where a host has several.
        """
        in_host = self.ranks_per_host
        if in_host == 1:
            return replace(self, ranks=ranks, hosts=None)
        fits = _is_count(ranks) and ranks % in_host == 0 and (ranks > in_host) == (self.host_count > 1)
        allowed = f"multiples of the {in_host} ranks of a host, from {2 * in_host} on"
        _require(fits, "ranks", ranks, allowed if self.host_count > 1 else f"{in_host}, which one host has")
        return replace(self, ranks=ranks, hosts=ranks // in_host)

    @property
    def host_count(self) -> int:
        """Returns the hosts: one for each rank where nothing else was said."""
        return self.hosts or self.ranks

    @property
    def ranks_per_host(self) -> int:
        """Returns k."""
        return self.ranks // self.host_count

    @property
    def has_inside(self) -> bool:
        """Tells whether there are several hosts and several ranks in each: then two kinds of links are in use."""
        return 1 < self.host_count < self.ranks

    @property
    def has_two_levels(self) -> bool:
        """Tells whether ACCO's rounds take two levels here."""
        return self.two_levels and self.has_inside

    @property
    def payload_rate(self) -> float:
        """Returns D, payload bytes/s."""
        return self.bandwidth * (self.efficiency or _EFFICIENCY[self.backend])

    @property
    def inside_rate(self) -> float:
        """Returns I, payload bytes/s that a rank sends inside its host."""
        return self.inside_bandwidth or _INSIDE_BANDWIDTH[self.backend]

    @property
    def inside_of_host(self) -> Cluster:
        """Returns the ranks of one host, what joins them being the network."""
        latency_s = _STEP_INSIDE_HOST * self.latency_s
        return Cluster(self.ranks_per_host, self.inside_rate, latency_s, self.backend, hosts=1, efficiency=1.0)

    @property
    def between_hosts(self) -> Cluster:
        """Returns the hosts as if each of them were one rank."""
        return replace(self, ranks=self.host_count, hosts=None)

    @property
    def hides_stock(self) -> bool:
        """Tells whether ``overlap_comm`` hides anything: on CPU streams are no-ops (accelerator/cpu_accelerator.py)."""
        return self.backend == "nccl" if self.overlaps_stock is None else self.overlaps_stock


@dataclass(frozen=True)
class Work:
    """Describes one step of one rank.

    Attributes:
        micro_batch_s: m, seconds of one forward and backward with nothing beside it.
        n: micro-batches of a step (``gradient_accumulation_steps``).
        update_s_per_parameter: seconds of AdamW per parameter that a rank updates.
        estimate_fraction: ACCO's key. None: one half, the best one where any round is quantized.
        backward_share: the backward's part of m: two matrix products for each of the forward (arXiv 2104.04473).
    """

    micro_batch_s: float
    n: int
    update_s_per_parameter: float = 1e-11
    estimate_fraction: float | None = None
    backward_share: float = 2 / 3

    def __post_init__(self):
        _require(_is_positive(self.micro_batch_s), "micro_batch_s", self.micro_batch_s, f"seconds {_POSITIVE}")
        _require(_is_count(self.n), "n", self.n, _COUNT)
        fits = 0 <= self.update_s_per_parameter <= _LARGEST
        _require(fits, "update_s_per_parameter", self.update_s_per_parameter, "seconds from 0 to 1e60")
        for name in ("estimate_fraction", "backward_share"):
            value = getattr(self, name)
            _require(value is None or 0 < value < 1, name, value, "a number > 0 and < 1")

    @property
    def compute_s(self) -> float:
        """Returns C, the computation of a step in seconds."""
        return self.n * self.micro_batch_s


@dataclass(frozen=True)
class Cost:
    """Holds what collectives cost.

    Attributes:
        wire_bytes: bytes that a rank sends, inside its host or out of it; it receives as many.
        link_bytes: bytes that the ranks of one host together send to other hosts; 0 with one host.
        seconds: until all of it is done.
    """

    wire_bytes: float
    link_bytes: float
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.wire_bytes + other.wire_bytes, self.link_bytes + other.link_bytes, self.seconds + other.seconds
        )

    def times(self, count: int) -> Cost:
        """Returns the cost of ``count`` such collectives, one after the other."""
        return Cost(count * self.wire_bytes, count * self.link_bytes, count * self.seconds)


NOTHING = Cost(0.0, 0.0, 0.0)


def _ring_latency(cluster: Cluster) -> float:
    """Returns the latency of N - 1 steps round the ring, L between hosts and less inside (NCCL, tuning.cc)."""
    hosts = cluster.host_count
    if hosts == 1:
        return (cluster.ranks - 1) * cluster.latency_s
    return (hosts - 1 + (cluster.ranks - hosts) * _STEP_INSIDE_HOST) * cluster.latency_s


def _ring(cluster: Cluster, moved_bytes: float, latency_s: float) -> Cost:
    """Returns the cost of each rank passing ``moved_bytes`` on to the next. Ranks of a host are neighbors, so that its
    link carries what one rank sends; the slower kind of link counts."""
    rate = min(cluster.payload_rate, cluster.inside_rate) if cluster.has_inside else cluster.payload_rate
    return Cost(moved_bytes, moved_bytes if cluster.host_count > 1 else 0.0, moved_bytes / rate + latency_s)


def _steps(count: int) -> int:
    """Returns ceil(log2 count)."""
    return (count - 1).bit_length()


def _one_way(cluster: Cluster, whole_bytes: float, calls: int) -> Cost:
    """Returns the cost of a reduce-scatter or an all-gather: (N-1)/N V on a ring (Thakur et al., 2005), on each host's
    link, too, or on NCCL's tree where that is cheaper (PAT, arXiv 2506.20252: by itself only with one rank a host)."""
    moved = whole_bytes * (cluster.ranks - 1) / cluster.ranks
    ring = _ring(cluster, moved, calls * _ring_latency(cluster))
    if cluster.backend == "nccl" and cluster.host_count == cluster.ranks:
        tree = moved / (_TREE_SHARE * cluster.payload_rate) + calls * _steps(cluster.ranks) * cluster.latency_s
        return replace(ring, seconds=min(ring.seconds, tree))
    return ring


def all_gather(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """Returns the cost for tensors of together ``whole_bytes`` bytes (all ranks' parts) in ``calls`` collectives."""
    return _one_way(cluster, whole_bytes, calls)


def all_reduce(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """Returns the cost likewise: a reduce-scatter, then an all-gather on a ring (Thakur et al., 2005), or NCCL's
    double binary tree where that is cheaper."""
    moved = 2 * whole_bytes * (cluster.ranks - 1) / cluster.ranks
    ring = _ring(cluster, moved, 2 * calls * _ring_latency(cluster))
    if cluster.backend == "nccl" and cluster.ranks > 1:
        tree = _tree(cluster, whole_bytes, calls)
        return min(ring, tree, key=lambda cost: cost.seconds)
    return ring


def _tree(cluster: Cluster, whole_bytes: float, calls: int) -> Cost:
    """Returns the cost of NCCL's double binary tree (src/graph/trees.cc, tuning.cc): a chain inside each host and two
    trees of the hosts, each for half of V, up and down again. Of their 2 (H-1) edges' loads a host has 2 (H-1)/H V on
    the average, and exactly that with two hosts; that the inner hosts of more than two have up to 2 V is left out."""
    hosts, in_host = cluster.host_count, cluster.ranks_per_host
    moved = 2 * whole_bytes * (cluster.ranks - 1) / cluster.ranks
    latency = (in_host - 1) * (_STEP_INSIDE_HOST if hosts > 1 else 1.0) + _steps(hosts)
    if hosts == 1:
        link_bytes, seconds = 0.0, 2 * whole_bytes / cluster.payload_rate
    else:
        link_bytes = 2 * whole_bytes * (hosts - 1) / hosts
        seconds = link_bytes / cluster.payload_rate
    if cluster.has_inside:
        seconds = max(seconds, 2 * whole_bytes * (in_host - 1) / in_host / cluster.inside_rate)
    return Cost(moved, link_bytes, seconds / _TREE_SHARE + 2 * calls * latency * cluster.latency_s)


def reduce_scatter(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """Returns the cost of the backend's own; gloo's moves as much as an all-reduce (docs/reference/results.md)."""
    if cluster.backend == "gloo":
        return all_reduce(cluster, whole_bytes, calls)
    return _one_way(cluster, whole_bytes, calls)


def reduce_to_each(cluster: Cluster, whole_bytes: float, runs: int | None = None) -> Cost:
    """Returns the cost of one reduce for each rank, of its part: NCCL's is a chain that ends at the root (tuning.cc has
    no tree for it), gloo's a reduce-scatter whose results all go to the root (gloo/reduce.cc).

    Args:
        runs: on NCCL the stretches in which the roots ascend, the last ranks' first. In a stretch a chain begins where
            the one before has passed, two steps behind it; from stretch to stretch it waits. None: every one waits.
    """
    ranks, part = cluster.ranks, whole_bytes / cluster.ranks
    if ranks == 1:
        return NOTHING
    if cluster.backend == "gloo":
        scatter = _one_way(cluster, part, 1).times(ranks)
        outside = ranks - cluster.ranks_per_host  # ranks whose parts reach a root through its host's link
        to_root = part / ranks / cluster.payload_rate * (outside or ranks - 1) + _ring_latency(cluster)
        gather = Cost(part * (ranks - 1) / ranks, part * cluster.ranks_per_host * outside / ranks, ranks * to_root)
        return scatter + gather
    waiting = ranks if runs is None else min(ranks, runs)
    chain_s = ranks / (ranks - 1) * _ring_latency(cluster)
    following_s = 2 * (ranks / waiting - 1) * cluster.latency_s
    latency = waiting * chain_s + following_s + ranks * _REDUCE_ON_HOST_S
    ring = _ring(cluster, whole_bytes, latency)  # of N chains each link is in N - 1, and waits in one
    return Cost(part * (ranks - 1), ring.link_bytes * (ranks - 1) / ranks, ring.seconds)


def acco_reduce_scatter(cluster: Cluster, whole_bytes: float) -> Cost:
    """Returns the cost of the one that ACCO uses: on gloo its own exchange (runtime/messages.py)."""
    return exchange(cluster, whole_bytes) if cluster.backend == "gloo" else reduce_scatter(cluster, whole_bytes)


def exchange(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """Returns the cost of each rank sending every other one its part directly, in ``calls`` pieces: with k ranks in a
    host its link carries k (N-k)/N V, where a ring has (N-1)/N V."""
    ranks, in_host = cluster.ranks, cluster.ranks_per_host
    moved = whole_bytes * (ranks - 1) / ranks
    on_link = in_host * (ranks - in_host) / ranks * whole_bytes
    slowest = on_link if cluster.host_count > 1 else moved
    return Cost(moved, on_link, slowest / cluster.payload_rate + calls * (ranks - 1) * cluster.latency_s)


# ---- rounds and steps


def _coded_bytes(bits: int) -> float:
    """Returns the bytes of a value in blocks of codes of so many bits (optim/quantization.py)."""
    return bits / 8 + _SCALE_BYTES


def round_communication(model: Model, cluster: Cluster, this: Round = COMMIT, wire: Wire = _ALL_IN_FULL) -> Cost:
    """Returns what a round of ACCO moves: reduce-scatter, all-reduce of the norm, all-gather (runtime/round.py), with
    gloo as in runtime/messages.py, with NCCL as in runtime/collectives.py.

    Args:
        this: one that is predicted locally gathers the roots of exp_avg_sq with the weights.
        wire: in a quantized round gradients and changes of weights travel in blocks of codes; gradients directly, since
            sums of codes cannot be passed round a ring. With two levels gradients become codes between the hosts, where
            the COMMIT is quantized also inside; the codes of the changes are passed on inside.
    """
    bits = wire.of(this)
    gradients, weights = model.comm_bytes * model.numel, model.weight_bytes * model.numel
    sent = _coded_bytes(bits.gradient) * model.numel if bits else gradients
    gathered = _coded_bytes(bits.change) * model.numel if bits else weights
    gathered += _ROOT_BYTES * model.numel * this.predicts_locally
    inner_bits = wire.inner_gradient if bits else 0
    calls = _pieces(model, cluster) if inner_bits else 1
    norm = all_reduce(cluster, _NORM_BYTES)
    if not cluster.has_two_levels:
        scatter = exchange(cluster, sent, calls) if bits else acco_reduce_scatter(cluster, sent)
        return scatter + norm + all_gather(cluster, gathered)
    inside, between = cluster.inside_of_host, cluster.between_hosts
    if inner_bits:
        inner = exchange(inside, _coded_bytes(inner_bits) * model.numel, calls)
    else:
        inner = acco_reduce_scatter(inside, gradients)
    reduction = _two_levels(cluster, inner, exchange(between, sent, calls))
    return reduction + norm + _two_levels(cluster, all_gather(inside, gathered), all_gather(between, gathered))


def _pieces(model: Model, cluster: Cluster) -> int:
    """Returns in how many pieces the gradients of a quantized round travel where the COMMIT is quantized: on NCCL one
    after the other; on gloo the latency of all but the first is hidden."""
    if cluster.backend == "gloo":
        return 1
    shard = -(-model.numel // cluster.ranks)
    return -(-shard // max(-(-shard // _PIECES), _SMALLEST_PIECE))


def _two_levels(cluster: Cluster, inside: Cost, between: Cost) -> Cost:
    """Returns the cost of both levels of one way. ``between`` is what a host sends, to which its ranks contribute
    equally. On NCCL one level follows the other; on gloo the pieces of one travel beside those of the other, so that of
    the faster level only a piece is seen."""
    wire_bytes = inside.wire_bytes + between.wire_bytes / cluster.ranks_per_host
    faster, slower = sorted((inside.seconds, between.seconds))
    if cluster.backend == "gloo":
        faster /= max(1, math.ceil(wire_bytes / _PIECE_BYTES))
    return Cost(wire_bytes, between.link_bytes, faster + slower)


def round_s(model: Model, cluster: Cluster, work: Work, this: Round = COMMIT, wire: Wire = _ALL_IN_FULL) -> float:
    """Returns R, seconds of one round with nothing beside it: its communication, and AdamW on a shard, scaled by the
    memory traffic of what the round updates."""
    traffic = _COMMIT_TRAFFIC * this.writes_state + _ESTIMATE_TRAFFIC * (this.predicts or not this.writes_state)
    update = model.numel / cluster.ranks * work.update_s_per_parameter * traffic / _COMMIT_TRAFFIC
    return round_communication(model, cluster, this, wire).seconds + update


@dataclass(frozen=True)
class Prediction:
    """Holds what one configuration costs, per step and rank.

    Attributes:
        name: one of :func:`names`.
        wire_bytes: bytes that a rank sends, inside its host or out of it.
        link_bytes: bytes that the ranks of one host together send to other hosts; 0 with one host.
        communication_s: seconds of all collectives, hidden or not.
        exposed_s: what communication and update add to the computation: step_s - C.
        step_s: seconds of a step.
        memory_bytes: of the model states.
        bound_s: of ACCO's modes the least time that the schedule can take, which is predicted; None of stages.
    """

    name: str
    wire_bytes: float
    link_bytes: float
    communication_s: float
    exposed_s: float
    step_s: float
    memory_bytes: float
    bound_s: float | None


def memory_bytes(name: str, model: Model, ranks: int) -> float:
    """Returns bytes of the model states on one rank: weights, gradients, 12 bytes of AdamW in fp32 and a gradient of 4
    (ZeRO, arXiv 1910.02054, section 3; ACCO's buffers: runtime/buffers.py)."""
    w, g, whole = model.weight_bytes, model.accumulation_bytes, model.numel
    shard = -(-whole // ranks)
    mode = modes().get(name)
    if mode is not None:
        before = (w + _ROOT_BYTES) * mode.schedule.predicts_locally  # true weights of one commit earlier, and roots
        held = w * bool(mode.wire.commit)  # of its shard, what every rank has
        return (w + g + _comm_buffer_bytes(mode, model) + before) * whole + (16 + held) * shard
    stage = int(name[4])
    if stage == 0:
        return (w + g + (8 if w == 4 else 16)) * whole
    return w * (shard if stage == 3 else whole) + g * (shard if stage >= 2 else whole) + 16 * shard


def _comm_buffer_bytes(mode: Mode, model: Model) -> float:
    """Returns the bytes of X per parameter: the most that a round sends or gathers (runtime/buffers.py)."""
    rounds = list(mode.wire.rounds())
    if not all(rounds):
        return max(model.comm_bytes, model.weight_bytes)
    return _coded_bytes(max(max(bits.gradient, bits.change) for bits in rounds))


def _matrices(numel: int) -> int:
    """Returns how many matrices a transformer of so many parameters has: four in each of l layers, of together 12 h^2
    parameters with h = 128 l (GPT-3, arXiv 2005.14165, table 2.1, from 6.7B on)."""
    return max(1, round(4 * (numel / (12 * 128**2)) ** (1 / 3)))


def _exposed_of_buckets(backward_s: float, reduction_s: float, buckets: int) -> float:
    """Returns what reduction adds to a backward beside it: bucket k is reduced while k + 1 fills, and nothing hides the
    last one (zero/stage_1_and_2.py: average_tensor)."""
    inside = (buckets - 1) / buckets * max(backward_s, reduction_s)
    return (backward_s + reduction_s) / buckets + inside - backward_s


def _stage(name: str, model: Model, cluster: Cluster, work: Work) -> tuple[Cost, float]:
    """Returns (all communication, exposed seconds) of one of DeepSpeed's stages.

    Sources: deepspeed/runtime/engine.py, allreduce_gradients (stage 0 after the last backward, stage 2
    at every micro-batch);
    zero/stage_1_and_2.py, average_tensor (all-reduce, or -reduce without use_multi_rank_bucket_allreduce: gradients
    come last matrix first, and the parts of a matrix in the order of their ranks);
    zero/stage3.py and zero/parameter_offload.py (weights gathered for forward and backward, overlap taken as perfect).
    """
    stage, reduces_to_each = int(name[4]), name.endswith("-reduce")
    gradients, weights = model.comm_bytes * model.numel, model.weight_bytes * model.numel
    buckets = math.ceil(model.numel / _REDUCE_BUCKET)
    norm = all_reduce(cluster, _NORM_BYTES)
    update = work.update_s_per_parameter * model.numel / (1 if stage == 0 else cluster.ranks)
    backward = work.backward_share * work.micro_batch_s
    if stage == 0:
        communication = all_reduce(cluster, gradients, buckets) + norm
        return communication, communication.seconds + update
    if stage == 3:
        gather = all_gather(cluster, weights, math.ceil(model.numel / _GATHER_BUCKET))
        scatter = reduce_scatter(cluster, gradients, buckets)
        inside = gather.times(2) + scatter
        exposed = inside.seconds
        if cluster.hides_stock:
            forward = work.micro_batch_s - backward
            exposed = max(forward, gather.seconds) + max(backward, gather.seconds + scatter.seconds)
            exposed -= work.micro_batch_s
        return inside.times(work.n) + norm, work.n * exposed + norm.seconds + update
    if reduces_to_each:
        reduction = reduce_to_each(cluster, gradients, _matrices(model.numel))
    else:
        reduction = all_reduce(cluster, gradients, buckets)
    exposed = reduction.seconds
    if cluster.hides_stock and not reduces_to_each:
        exposed = _exposed_of_buckets(backward, reduction.seconds, buckets)
    times = work.n if stage == 2 else 1
    at_step = norm + all_gather(cluster, weights)
    return reduction.times(times) + at_step, times * exposed + at_step.seconds + update


def figures_of(name: str, model: Model, cluster: Cluster, work: Work) -> Figures:
    """Returns what a step of one of ACCO's modes is made of."""
    schedule, wire = modes()[name].schedule, modes()[name].wire
    commit = round_s(model, cluster, work, schedule.at_window_end, wire)
    estimate = 0.0
    if schedule.at_phase_b is not None:
        estimate = round_s(model, cluster, work, schedule.at_phase_b, wire)
    return Figures(work.micro_batch_s, commit, estimate)


def split_of(name: str, model: Model, cluster: Cluster, work: Work) -> int:
    """Returns the micro-batches of phase A, of a mode with two: as ``estimate_fraction`` says, or its default."""
    mode = modes()[name]
    require_room(mode.schedule, work.n)
    if work.estimate_fraction is None and mode.is_quantized:
        return best_split(mode.schedule, work.n, figures_of(name, model, cluster, work))
    return phase_a_micro_batches(work.n, work.estimate_fraction or _DEFAULT_FRACTION)


def fraction_of(a: int, n: int) -> float:
    """Returns the ``estimate_fraction`` of a phase A, below one also where a float cannot tell a from n."""
    return min(a / n, math.nextafter(1.0, 0.0))


def predict(name: str, model: Model, cluster: Cluster, work: Work) -> Prediction:
    """Returns what a step of one configuration costs.

    Raises:
        ValueError: for a name that is none of :func:`names`, and for a mode of two phases with n = 1.
    """
    _require(name in names(), "name", name, ", ".join(names()))
    compute, memory = work.compute_s, memory_bytes(name, model, cluster.ranks)
    mode = modes().get(name)
    if mode is None:
        communication, exposed = _stage(name, model, cluster, work)
        step = compute + exposed
        return _prediction(name, communication, exposed, step, memory, None)
    schedule, a = mode.schedule, work.n
    communication = round_communication(model, cluster, schedule.at_window_end, mode.wire)
    if schedule.at_phase_b is not None:
        communication += round_communication(model, cluster, schedule.at_phase_b, mode.wire)
        a = split_of(name, model, cluster, work)
    step = figures_of(name, model, cluster, work).step_s(schedule, work.n, a)
    m = work.micro_batch_s
    exposed = step - (a * m + (work.n - a) * m)  # added up as in the step, so that what is hidden leaves exactly 0
    return _prediction(name, communication, exposed, step, memory, step)


def _prediction(
    name: str, moved: Cost, exposed_s: float, step_s: float, memory: float, bound_s: float | None
) -> Prediction:
    return Prediction(name, moved.wire_bytes, moved.link_bytes, moved.seconds, exposed_s, step_s, memory, bound_s)


def predict_all(model: Model, cluster: Cluster, work: Work, also: Collection[str] = ()) -> list[Prediction]:
    """Returns the predictions of all stages and of the modes that are listed or named in ``also``, without those for
    whose phases n = 1 has no room."""
    shown = [name for name, mode in modes().items() if (mode.is_listed or name in also) and mode.has_room(work.n)]
    return [predict(name, model, cluster, work) for name in (*STAGES, *shown)]


# ---- a measured round


def calibrated(model: Model, cluster: Cluster, work: Work, measured_round_s: float) -> Cluster:
    """Returns the same cluster with the payload rate at which a COMMIT takes as long as measured.

    All else then follows from that rate: with ``latency_s = 0`` the communication of every stage is the measured one
    scaled by its bytes on the ring.

    Raises:
        ValueError: with one rank, and where update and latencies alone take as long as was measured.
    """
    _require(_is_positive(measured_round_s), "the measured round", measured_round_s, f"seconds {_POSITIVE}")
    if cluster.ranks == 1:
        raise ValueError("plan: a round of one rank communicates nothing, so it tells nothing. Measure with 2 or more")

    def took(cluster: Cluster) -> float:
        return round_s(model, cluster, work)

    shortest, longest = (took(at_rate(cluster, rate)) for rate in (FASTEST, SLOWEST))
    if shortest >= measured_round_s:
        inside = ", or the true bandwidth inside the hosts" if cluster.has_inside else ""
        raise ValueError(
            f"plan: the measured round took {measured_round_s:g} s, but the update and the latencies alone take "
            f"{shortest:g} s. Give a smaller latency, or the update's true time per parameter{inside}"
        )
    if longest < measured_round_s:
        raise ValueError(
            f"plan: the measured round took {measured_round_s:g} s; allowed: up to {longest:g} s, which it takes at "
            "0.001 bytes/s. Give the round's true time"
        )
    return with_rate_of(cluster, took, measured_round_s)


SLOWEST, FASTEST = 1e-3, 1e18  # bytes/s


def at_rate(cluster: Cluster, rate: float) -> Cluster:
    """Returns the same cluster with so many bytes/s of payload."""
    return replace(cluster, bandwidth=rate, efficiency=1.0)


def with_rate_of(cluster: Cluster, took: Callable[[Cluster], float], measured_s: float) -> Cluster:
    """Returns the same cluster with the payload rate, in 0.001 to 1e18 bytes/s, at which ``took`` comes nearest to
    ``measured_s``; it falls as the rate grows."""
    slow, fast = math.log(SLOWEST), math.log(FASTEST)
    for _ in range(100):
        middle = (slow + fast) / 2
        slow, fast = (middle, fast) if took(at_rate(cluster, math.exp(middle))) > measured_s else (slow, middle)
    return at_rate(cluster, math.exp(fast))
