# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The performance and memory model behind ``ds_acco plan``: what a step of each ZeRO stage and ACCO schedule costs.

Everything here is a PREDICTION, made of formulas alone; only ``calibrated`` puts a measured round in. Every term is
explained once, here. Ψ: trainable parameters; N: ranks; n: micro-batches of a step; m: seconds of one (forward and
backward); w, g, c: bytes of a weight, an accumulated and a communicated gradient; V: bytes of what a collective moves
as a whole; L: latency of a message; D: payload bytes/s of the network. DeepSpeed files are those of 0.19.8, below
``deepspeed/runtime``.

**Compute.** C = n m, the same for all. A = a/n C, B = C - A, a from ``settings.phase_a_micro_batches``. The backward is
``backward_share`` = 2/3 of m: two matrix products for each one of the forward (Narayanan et al., arXiv 2104.04473).

**Network.** ``bandwidth`` is one host's, in one direction, all its links together, with one rank in each host unless
``hosts`` says otherwise; a ring over all ranks leaves and enters each host once, on every link it has. With
``hosts=1`` it is that between two ranks. ``efficiency`` is the part of it that carries payload, D = bandwidth x
efficiency: for gloo 1448 of the 1514 bytes of an Ethernet frame (TCP with time stamps, MTU 1500), so 4.4 % are lost
and nothing else; for NCCL 0.9, an assumption: set it to the bus bandwidth that nccl-tests shows, over the link's.
Nothing else slows a message: no staging copies, congestion, stragglers, competition of two collectives for a link.

**Collectives** (Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005; for
NCCL its own cost model, ``src/graph/tuning.cc``). Wire bytes are what a rank sends; it receives as many.

- reduce-scatter, all-gather, ring: (N-1)/N V bytes, N-1 steps. All-reduce, ring: the one, then the other.
- A step between hosts costs L, one inside a host 0.35 L (tuning.cc: 3.4 us on NVLink, 9.6 us on a network).
- NCCL's all-reduce may be a double binary tree: 2V/(0.9 D) and 2 ceil(log2 hosts) steps between hosts, 2 (ranks of a
  host - 1) in it (tuning.cc). Its reduce-scatter and all-gather may be trees (PAT, arXiv 2506.20252; by itself only
  with one rank a host): (N-1)/N V/(0.9 D) and ceil(log2 N) steps. The cheaper is taken. gloo has only rings here.
- NCCL's reduce to one rank is a chain: V/D and N steps (tuning.cc); a rank that is not its root sends V.
- gloo's reduce is a reduce-scatter, then everybody sends its part to the root, whose link is busy for another
  (N-1)/N V (``gloo/reduce.cc``): as long as an all-reduce. gloo's reduce-scatter moves as much as an all-reduce
  (README, "Two hosts").
- ACCO on gloo: every rank sends each other one its part directly (``comm.py``): (N-1)/N V, N-1 messages. With k ranks
  in a host its link carries k (N-k)/N V, where a ring has (N-1)/N V. So it is with a quantised ESTIMATE, on NCCL, too.

**Update.** ``update_s_per_parameter`` is AdamW's COMMIT: 28 bytes of memory traffic per parameter. An ESTIMATE has 16,
wp's PREDICT both, and they are scaled by that. Sharded: Ψ/N; ZeRO-0: Ψ.

**ACCO.** A round R = reduce-scatter (c) + all-reduce of the norm (16 bytes) + update + all-gather (w). A step takes
max(A, R_commit) + max(B, R_estimate) with ``acco``, max(C, R) with ``wp`` and ``dpu``, C + R with ``sync`` (ACCO, arXiv
2406.02613; ``rounds.py``). This is the bound, and the prediction is the bound. What it leaves out: packing gradients
and installing weights between the rounds, up to (2g + c + 2w)Ψ bytes of memory traffic per round.

``acco-int8``, ``acco-int4``: ``acco`` with ``"estimate_comm": "int8"`` or ``"int4"``. The ESTIMATE's gradients are sent
in blocks of 256 with one bf16 scale each, q = 1 + 2/256 or 0.5 + 2/256 bytes per parameter, directly from rank to rank
(sums of codes cannot be passed round a ring), and its all-gather moves the CHANGE of the weights in the same format.
The COMMIT stays as it is. With bf16 weights and gradients R_estimate is about R/4 in int4, and with f =
``estimate_fraction`` all is hidden while R_commit <= f C and R_estimate <= (1-f) C: up to R = 0.8 C at f = 0.8, where
plain ``acco`` ends at R = C/2. Where no ``estimate_fraction`` is given, f is the best one (``best_split``), for plain
``acco`` one half. Left out: the passes that quantise. With k ranks in a host the direct exchange of q Ψ bytes costs
that host's link k times what a ring of as many bytes does, so on NCCL with several ranks a host it may win nothing.

**DeepSpeed's stages**, all with one all-reduce of the norm:

- ZeRO-0: one all-reduce (c) after the last backward, in no stage hidden (``engine.py``: ``allreduce_gradients`` runs in
  ``_backward_epilogue``), then the whole update on every rank.
- ZeRO-1: gradients are reduced at the boundary only; the all-gather (w) in ``step()`` is blocking. ``zero1``: as by
  default all buckets are ALL-REDUCED, 1.5 times the bytes of R (``zero/stage_1_and_2.py``: ``average_tensor`` with
  ``use_multi_rank_bucket_allreduce``). ``zero1-reduce``: that key false, one reduce for each rank.
- ``zero2``, ``zero2-reduce``: the same, but gradients are reduced at EVERY micro-batch (``engine.py``:
  ``allreduce_gradients``; ``zero/stage_1_and_2.py``: ``reduce_ready_partitions_and_remove_grads``).
- ZeRO-3: in every micro-batch weights are gathered for the forward and again for the backward, and gradients really
  reduce-scattered (``zero/parameter_offload.py``; ``zero/stage3.py``: ``__avg_scatter_grads``); none after the update.
- ``overlap_comm`` is taken as switched on. On CUDA each bucket of ``reduce_bucket_size`` (5e8 parameters) is reduced
  while the next one fills; the backward waits for the bucket before last (``average_tensor``), and nothing is left to
  hide the last one. With K buckets, a backward of b seconds and a reduction of r: (b + r)/K + (K-1)/K max(b, r) in
  place of b. Not for ``-reduce``: there the host waits for the device before each reduce (``allreduce_and_copy``).
  ZeRO-3's is taken as perfect: max(forward, all-gather) + max(backward, all-gather + reduce-scatter). ZeRO-0 and
  everything in ``step()`` hide nothing.
- On CPU ``overlap_comm`` hides nothing: streams are no-ops (``accelerator/cpu_accelerator.py``).
- Latencies are paid for every bucket: 5e8 parameters, gathers of ZeRO-3 5e7 (``zero/config.py``).

**Memory** per rank, model states only: activations, buckets, ZeRO-3's gathered weights and the framework are NOT
counted. ZeRO (Rajbhandari et al., arXiv 1910.02054): weights wΨ, gradients gΨ, AdamW in fp32 (master, exp_avg,
exp_avg_sq) 12Ψ, of which stage 1 shards the last, 2 also the gradients, 3 all. To this come 4 bytes for each of those
12: DeepSpeed makes an fp32 gradient of its shard in the step, ACCO holds one. fp32 ZeRO-0 has neither it nor a
separate master. ACCO: (w + g + max(c, w))Ψ + 16Ψ/N (README, "Memory"), also with a quantised ESTIMATE, whose staging is
not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...algorithm.schedules import COMMIT, ESTIMATE, SCHEDULES, Round
from ...algorithm.step_time import step_s as law
from ...algorithm.window import phase_a_micro_batches, require_room

BACKENDS = ("nccl", "gloo")
STAGES = ("zero0", "zero1", "zero1-reduce", "zero2", "zero2-reduce", "zero3")
# ACCO's: name -> (schedule, estimate_comm).
MODES = {
    "acco": ("acco", "full"),
    "acco-int8": ("acco", "int8"),
    "acco-int4": ("acco", "int4"),
    "wp": ("wp", "full"),
    "dpu": ("dpu", "full"),
    "sync": ("sync", "full"),
}
TWO_PHASES = ("acco", "acco-int8", "acco-int4")  # these need n >= 2
NAMES = (*STAGES, *MODES)

_EFFICIENCY = {"nccl": 0.9, "gloo": 1448 / 1514}
_TREE_SHARE = 0.9
_STEP_INSIDE_HOST = 3.4 / 9.6
_NORM_BYTES = 16
_SCALE_BYTES = 2 / 256  # bf16, one for each block of a quantised ESTIMATE
_CODE_BYTES = {"int8": 1 + _SCALE_BYTES, "int4": 0.5 + _SCALE_BYTES}
_REDUCE_BUCKET = 500_000_000
_GATHER_BUCKET = 50_000_000
_COMMIT_TRAFFIC, _ESTIMATE_TRAFFIC = 28, 16


def _require(condition: bool, what: str, given, allowed: str) -> None:
    if not condition:
        raise ValueError(f"plan: {what} = {given!r} is not allowed; allowed: {allowed}")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Model:
    """Attributes: numel: trainable parameters; the bytes of one weight, communicated and accumulated gradient."""

    numel: int
    weight_bytes: int = 2
    comm_bytes: int = 2
    accumulation_bytes: int = 2

    def __post_init__(self):
        _require(_is_count(self.numel), "numel", self.numel, "a whole number >= 1")
        for name in ("weight_bytes", "comm_bytes", "accumulation_bytes"):
            _require(getattr(self, name) in (2, 4), name, getattr(self, name), "2 or 4")


@dataclass(frozen=True)
class Cluster:
    """The ranks and what joins them.

    Attributes:
        ranks: data-parallel ranks, N.
        bandwidth: bytes/s of one host in one direction; of one rank where every host has one.
        latency_s: seconds of one message between hosts.
        backend: ``nccl`` or ``gloo``.
        hosts: they share the ranks equally; None: one rank in each.
        overlaps_stock: whether DeepSpeed's ``overlap_comm`` hides anything; None: on nccl, not on gloo.
        efficiency: part of the bandwidth that carries payload, in (0, 1]; None: the backend's (module docstring).
        memory_bytes: what a rank has for model states; only :func:`advise` looks at it.
    """

    ranks: int
    bandwidth: float
    latency_s: float = 0.0
    backend: str = "nccl"
    hosts: int | None = None
    overlaps_stock: bool | None = None
    efficiency: float | None = None
    memory_bytes: float = math.inf

    def __post_init__(self):
        _require(_is_count(self.ranks), "ranks", self.ranks, "a whole number >= 1")
        _require(_is_positive(self.bandwidth), "bandwidth", self.bandwidth, "bytes/s, > 0")
        _require(self.latency_s >= 0, "latency_s", self.latency_s, "seconds, >= 0")
        _require(self.backend in BACKENDS, "backend", self.backend, " or ".join(BACKENDS))
        if self.hosts is not None:
            fits = _is_count(self.hosts) and self.ranks % self.hosts == 0
            _require(fits, "hosts", self.hosts, f"a whole number that divides the {self.ranks} ranks")
        if self.efficiency is not None:
            fits = _is_positive(self.efficiency) and self.efficiency <= 1
            _require(fits, "efficiency", self.efficiency, "a number > 0 and <= 1")
        _require(_is_positive(self.memory_bytes), "memory_bytes", self.memory_bytes, "bytes, > 0")

    def with_ranks(self, ranks: int) -> Cluster:
        """The same hosts, more or fewer of them.

        Raises:
            ValueError: unless the ranks fill hosts, two at least where a host has several.
        """
        in_host = self.ranks // self.host_count
        if in_host == 1:
            return replace(self, ranks=ranks, hosts=None)
        fits = _is_count(ranks) and ranks % in_host == 0 and (ranks > in_host) == (self.host_count > 1)
        allowed = f"multiples of the {in_host} ranks of a host, from {2 * in_host} on"
        _require(fits, "ranks", ranks, allowed if self.host_count > 1 else f"{in_host}, which one host has")
        return replace(self, ranks=ranks, hosts=ranks // in_host)

    @property
    def host_count(self) -> int:
        return self.hosts or self.ranks

    @property
    def payload_rate(self) -> float:
        """D: payload bytes/s."""
        return self.bandwidth * (self.efficiency or _EFFICIENCY[self.backend])

    @property
    def hides_stock(self) -> bool:
        return self.backend == "nccl" if self.overlaps_stock is None else self.overlaps_stock


@dataclass(frozen=True)
class Work:
    """One step of one rank.

    Attributes:
        micro_batch_s: m, seconds of one forward and backward with nothing beside it.
        n: micro-batches of a step (``gradient_accumulation_steps``).
        update_s_per_parameter: seconds of AdamW per parameter that a rank updates.
        estimate_fraction: ACCO's key; says a. None: one half, the best one where the ESTIMATE is quantised.
        backward_share: the backward's part of m.
    """

    micro_batch_s: float
    n: int
    update_s_per_parameter: float = 1e-11
    estimate_fraction: float | None = None
    backward_share: float = 2 / 3

    def __post_init__(self):
        _require(_is_positive(self.micro_batch_s), "micro_batch_s", self.micro_batch_s, "seconds, > 0")
        _require(_is_count(self.n), "n", self.n, "a whole number >= 1")
        _require(self.update_s_per_parameter >= 0, "update_s_per_parameter", self.update_s_per_parameter, ">= 0")
        for name in ("estimate_fraction", "backward_share"):
            value = getattr(self, name)
            _require(value is None or 0 < value < 1, name, value, "a number > 0 and < 1")

    @property
    def compute_s(self) -> float:
        """C."""
        return self.n * self.micro_batch_s


@dataclass(frozen=True)
class Cost:
    """Of collectives: the bytes that a rank sends, and seconds."""

    wire_bytes: float
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wire_bytes + other.wire_bytes, self.seconds + other.seconds)

    def times(self, count: int) -> Cost:
        return Cost(count * self.wire_bytes, count * self.seconds)


NOTHING = Cost(0.0, 0.0)


def _ring_latency(cluster: Cluster) -> float:
    hosts = cluster.host_count
    if hosts == 1:
        return (cluster.ranks - 1) * cluster.latency_s
    return (hosts - 1 + (cluster.ranks - hosts) * _STEP_INSIDE_HOST) * cluster.latency_s


def _steps(count: int) -> int:
    """ceil(log2 count)."""
    return (count - 1).bit_length()


def _one_way(cluster: Cluster, whole_bytes: float, calls: int) -> Cost:
    """A reduce-scatter or an all-gather that a ring or a tree carries out."""
    moved = whole_bytes * (cluster.ranks - 1) / cluster.ranks
    seconds = moved / cluster.payload_rate + calls * _ring_latency(cluster)
    if cluster.backend == "nccl" and cluster.host_count == cluster.ranks:
        tree = moved / (_TREE_SHARE * cluster.payload_rate) + calls * _steps(cluster.ranks) * cluster.latency_s
        seconds = min(seconds, tree)
    return Cost(moved, seconds)


def all_gather(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """Of tensors of together ``whole_bytes`` bytes (all ranks' parts) in ``calls`` collectives."""
    return _one_way(cluster, whole_bytes, calls)


def all_reduce(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """See :func:`all_gather`."""
    moved = 2 * whole_bytes * (cluster.ranks - 1) / cluster.ranks
    seconds = moved / cluster.payload_rate + 2 * calls * _ring_latency(cluster)
    if cluster.backend == "nccl" and cluster.ranks > 1:
        hosts = cluster.host_count
        inside = (cluster.ranks // hosts - 1) * (_STEP_INSIDE_HOST if hosts > 1 else 1.0)
        latency = 2 * calls * (inside + _steps(hosts)) * cluster.latency_s
        seconds = min(seconds, 2 * whole_bytes / (_TREE_SHARE * cluster.payload_rate) + latency)
    return Cost(moved, seconds)


def reduce_scatter(cluster: Cluster, whole_bytes: float, calls: int = 1) -> Cost:
    """The backend's own; see :func:`all_gather`."""
    if cluster.backend == "gloo":
        return all_reduce(cluster, whole_bytes, calls)
    return _one_way(cluster, whole_bytes, calls)


def reduce_to_each(cluster: Cluster, whole_bytes: float) -> Cost:
    """One reduce for each rank, of its part."""
    ranks, part = cluster.ranks, whole_bytes / cluster.ranks
    if ranks == 1:
        return NOTHING
    if cluster.backend == "gloo":
        one = all_reduce(cluster, part)
        return Cost(whole_bytes * (ranks - 1) / ranks * (1 + 1 / ranks), ranks * one.seconds)
    seconds = part / cluster.payload_rate + ranks / (ranks - 1) * _ring_latency(cluster)
    return Cost(part * (ranks - 1), ranks * seconds)


def acco_reduce_scatter(cluster: Cluster, whole_bytes: float) -> Cost:
    """ACCO's own on gloo: each rank sends every other one its part."""
    return exchange(cluster, whole_bytes) if cluster.backend == "gloo" else reduce_scatter(cluster, whole_bytes)


def exchange(cluster: Cluster, whole_bytes: float) -> Cost:
    """Each rank sends every other one its part of ``whole_bytes`` bytes, directly."""
    ranks, hosts = cluster.ranks, cluster.host_count
    moved = whole_bytes * (ranks - 1) / ranks
    in_host = ranks // hosts
    on_link = in_host * (ranks - in_host) / ranks * whole_bytes if hosts > 1 else moved
    return Cost(moved, on_link / cluster.payload_rate + (ranks - 1) * cluster.latency_s)


# ---- rounds and steps


def round_communication(model: Model, cluster: Cluster, estimate_comm: str = "full") -> Cost:
    """What a round of ACCO moves: every one, or with ``estimate_comm`` int8 or int4 a quantised ESTIMATE."""
    norm = all_reduce(cluster, _NORM_BYTES)
    if estimate_comm != "full":
        whole_bytes = _CODE_BYTES[estimate_comm] * model.numel
        return exchange(cluster, whole_bytes) + norm + all_gather(cluster, whole_bytes)
    gradients = acco_reduce_scatter(cluster, model.comm_bytes * model.numel)
    return gradients + norm + all_gather(cluster, model.weight_bytes * model.numel)


def round_s(model: Model, cluster: Cluster, work: Work, this: Round = COMMIT, estimate_comm: str = "full") -> float:
    """R: seconds of one round with nothing beside it; ``estimate_comm`` is an ESTIMATE's."""
    traffic = _COMMIT_TRAFFIC * this.writes_state + _ESTIMATE_TRAFFIC * (this.predicts or not this.writes_state)
    update = model.numel / cluster.ranks * work.update_s_per_parameter * traffic / _COMMIT_TRAFFIC
    return round_communication(model, cluster, estimate_comm if this is ESTIMATE else "full").seconds + update


@dataclass(frozen=True)
class Prediction:
    """Of one configuration, per step and rank.

    Attributes:
        name: one of ``NAMES``.
        wire_bytes: bytes that a rank sends.
        communication_s: seconds of all collectives, hidden or not.
        exposed_s: what communication and update add to the computation: step_s - C.
        step_s: seconds of a step.
        memory_bytes: of the model states.
        bound_s: of ACCO's schedules max(A, R) + max(B, R) or its like; None of DeepSpeed's stages.
    """

    name: str
    wire_bytes: float
    communication_s: float
    exposed_s: float
    step_s: float
    memory_bytes: float
    bound_s: float | None


def memory_bytes(name: str, model: Model, ranks: int) -> float:
    """Bytes of the model states on one rank."""
    w, g, c, whole = model.weight_bytes, model.accumulation_bytes, model.comm_bytes, model.numel
    shard = -(-whole // ranks)
    if name in MODES:
        return (w + g + max(c, w)) * whole + 16 * shard
    stage = int(name[4])
    if stage == 0:
        return (w + g + (8 if w == 4 else 16)) * whole
    return w * (shard if stage == 3 else whole) + g * (shard if stage >= 2 else whole) + 16 * shard


def _exposed_of_buckets(backward_s: float, reduction_s: float, buckets: int) -> float:
    """What reduction adds to a backward that it runs beside, bucket by bucket."""
    inside = (buckets - 1) / buckets * max(backward_s, reduction_s)
    return (backward_s + reduction_s) / buckets + inside - backward_s


def _stage(name: str, model: Model, cluster: Cluster, work: Work) -> tuple[Cost, float]:
    """(all communication, exposed seconds) of one of DeepSpeed's stages."""
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
    reduction = reduce_to_each(cluster, gradients) if reduces_to_each else all_reduce(cluster, gradients, buckets)
    exposed = reduction.seconds
    if cluster.hides_stock and not reduces_to_each:
        exposed = _exposed_of_buckets(backward, reduction.seconds, buckets)
    times = work.n if stage == 2 else 1
    at_step = norm + all_gather(cluster, weights)
    return reduction.times(times) + at_step, times * exposed + at_step.seconds + update


def predict(name: str, model: Model, cluster: Cluster, work: Work) -> Prediction:
    """What a step of one configuration costs.

    Raises:
        ValueError: for a name that is none of ``NAMES``, and for ``acco`` with n = 1.
    """
    _require(name in NAMES, "name", name, ", ".join(NAMES))
    compute, memory = work.compute_s, memory_bytes(name, model, cluster.ranks)
    if name not in MODES:
        communication, exposed = _stage(name, model, cluster, work)
        step = compute + exposed
        return Prediction(name, communication.wire_bytes, communication.seconds, exposed, step, memory, None)
    schedule, estimate_comm = MODES[name]
    communication = round_communication(model, cluster)
    if name in TWO_PHASES:
        communication += round_communication(model, cluster, estimate_comm)
        a = split_of(name, model, cluster, work)
        step = _step_of_split(name, model, cluster, work, [a])[0]
    else:
        step = law(SCHEDULES[schedule], 0.0, compute, round_s(model, cluster, work, SCHEDULES[schedule].at_window_end))
    return Prediction(name, communication.wire_bytes, communication.seconds, step - compute, step, memory, step)


def _step_of_split(name: str, model: Model, cluster: Cluster, work: Work, splits: Iterable[int]) -> list[float]:
    """The step with so many micro-batches in phase A, for each of ``splits``."""
    schedule, estimate_comm = MODES[name]
    commit = round_s(model, cluster, work)
    estimate = round_s(model, cluster, work, ESTIMATE, estimate_comm)
    m = work.micro_batch_s
    return [law(SCHEDULES[schedule], a * m, (work.n - a) * m, commit, estimate) for a in splits]


def split_of(name: str, model: Model, cluster: Cluster, work: Work) -> int:
    """a of one of ``TWO_PHASES``: as ``estimate_fraction`` says, or its default."""
    require_room(SCHEDULES[MODES[name][0]], work.n)
    if work.estimate_fraction is not None or name == "acco":
        return phase_a_micro_batches(work.n, 0.5 if work.estimate_fraction is None else work.estimate_fraction)
    return best_split_of(name, model, cluster, work)


def best_split_of(name: str, model: Model, cluster: Cluster, work: Work) -> int:
    """The a of 1 to n - 1 that makes ``name`` fastest; of those within 0.1 %, the one nearest to n/2, which is the
    paper's."""
    splits = range(1, work.n)
    steps = _step_of_split(name, model, cluster, work, splits)
    fast = [a for a, step in zip(splits, steps) if step <= 1.001 * min(steps)]
    return min(fast, key=lambda a: abs(a / work.n - 0.5))


def best_split(model: Model, cluster: Cluster, work: Work, name: str = "acco") -> Work:
    """The same work with the ``estimate_fraction`` of :func:`best_split_of`."""
    return replace(work, estimate_fraction=best_split_of(name, model, cluster, work) / work.n)


def predict_all(model: Model, cluster: Cluster, work: Work) -> list[Prediction]:
    """Of all ``NAMES``; without ``acco`` where n = 1 leaves it no second phase."""
    return [predict(name, model, cluster, work) for name in NAMES if name not in TWO_PHASES or work.n > 1]


# ---- a measured round


def calibrated(model: Model, cluster: Cluster, work: Work, measured_round_s: float) -> Cluster:
    """The same cluster with the payload rate at which a COMMIT takes as long as measured.

    All else then follows from that rate: with ``latency_s = 0`` the communication of every stage is the measured one
    scaled by its bytes on the ring.

    Raises:
        ValueError: with one rank, and where update and latencies alone take as long as was measured.
    """
    _require(_is_positive(measured_round_s), "the measured round", measured_round_s, "seconds, > 0")
    if cluster.ranks == 1:
        raise ValueError("plan: a round of one rank communicates nothing, so it tells nothing. Measure with 2 or more")

    def took(log_rate: float) -> float:
        return round_s(model, replace(cluster, bandwidth=math.exp(log_rate), efficiency=1.0), work)

    slow, fast = math.log(1e-3), math.log(1e18)
    if took(fast) >= measured_round_s:
        raise ValueError(
            f"plan: the measured round took {measured_round_s:g} s, but the update and the latencies alone take "
            f"{took(fast):g} s. Give a smaller latency, or the update's true time per parameter"
        )
    for _ in range(100):
        middle = (slow + fast) / 2
        slow, fast = (middle, fast) if took(middle) > measured_round_s else (slow, middle)
    return replace(cluster, bandwidth=math.exp(fast), efficiency=1.0)
