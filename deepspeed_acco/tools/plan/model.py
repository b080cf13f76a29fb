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
_WORTH_IT = 1.02  # a smaller speed-up is called none


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


# ---- advice


def best_stage(model: Model, cluster: Cluster, work: Work) -> Prediction | None:
    """The fastest of DeepSpeed's stages whose model states fit; None where none does."""
    stages = [predict(name, model, cluster, work) for name in STAGES]
    fitting = [stage for stage in stages if stage.memory_bytes <= cluster.memory_bytes]
    return min(fitting, key=lambda stage: stage.step_s, default=None)


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


def best_window(
    model: Model, cluster: Cluster, work: Work, micro_batch_size: int = 1, name: str = "acco"
) -> Work | None:
    """n and ``estimate_fraction`` for ``name`` at the same batch: micro-batches may be cut, never merged, as merged
    ones need more memory. Computation is taken to stay as long. The smallest n within 0.1 % of the best.

    Args:
        micro_batch_size: samples of a micro-batch; 1: it cannot be cut.
        name: one of ``TWO_PHASES``.

    Returns:
        None where n = 1 and the micro-batch has one sample.
    """
    cuts = [cut for cut in range(1, micro_batch_size + 1) if micro_batch_size % cut == 0 and cut * work.n > 1]
    windows = [replace(work, n=cut * work.n, micro_batch_s=work.micro_batch_s / cut) for cut in cuts]
    windows = [best_split(model, cluster, window, name) for window in windows]
    steps = [predict(name, model, cluster, window).step_s for window in windows]
    return next((window for window, step in zip(windows, steps) if step <= 1.001 * min(steps)), None)


def stops_paying(
    model: Model, cluster: Cluster, work: Work, against: Iterable[str] = STAGES, name: str = "acco"
) -> float | None:
    """The R/C from which on ``name`` is not faster than the fastest of ``against``: R stays, the computation varies.

    Returns:
        None where it is nowhere faster between R/C = 0.01 and 100, infinity where it still is at 100.
    """
    against = tuple(against)
    commit = round_s(model, cluster, work)

    def is_faster(ratio: float) -> bool:
        this = replace(work, micro_batch_s=commit / ratio / work.n)
        steps = [predict(other, model, cluster, this).step_s for other in against]
        return predict(name, model, cluster, this).step_s < min(steps) * (1 - 1e-9)

    if commit == 0:
        return None
    ratios = [10 ** (point / 100) for point in range(-200, 201)]
    faster = [ratio for ratio in ratios if is_faster(ratio)]
    if not faster:
        return None
    if faster[-1] == ratios[-1]:
        return math.inf
    low, high = faster[-1], ratios[ratios.index(faster[-1]) + 1]
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_faster(middle) else (low, middle)
    return high


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        name: one of ``NAMES``; None where no model states fit.
        n, estimate_fraction: what to set with ACCO; with a stage n as it is and None.
        baseline: the fastest of DeepSpeed's stages that fits, or None.
        speedup: how many times faster than the baseline; None without one.
        sentences: why.
    """

    name: str | None
    n: int
    estimate_fraction: float | None
    baseline: str | None
    speedup: float | None
    sentences: tuple[str, ...]


def seconds(value: float) -> str:
    """``2.12 s``, ``650 ms``, ``12 us``: three digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def advise(model: Model, cluster: Cluster, work: Work, micro_batch_size: int = 1) -> Advice:
    """Whether ACCO pays here, with what settings, and why. ``acco`` is taken before the faster ``wp``, which costs
    quality, and before ``acco-int4`` where that is not 2 % faster; anything must be at least 2 % faster than the best
    stage. Splits are chosen, whatever ``work.estimate_fraction`` says."""
    baseline = best_stage(model, cluster, work)
    commit, compute = round_s(model, cluster, work), work.compute_s
    said = [
        f"R = {seconds(commit)} (reduce-scatter, sharded update, all-gather), C = {seconds(compute)} "
        f"({work.n} x {seconds(work.micro_batch_s)}): R/C = {commit / compute:.3g}."
    ]

    if baseline is None:  # nor does ACCO: ZeRO-3 has the smallest model states of all
        said.append("The model states of no stage fit in a rank's memory: use more ranks, or offload.")
        return Advice(None, work.n, None, None, None, tuple(said))

    def decide(name: str, window: Work | None = None, step_s: float = baseline.step_s) -> Advice:
        n, fraction = (window.n, window.estimate_fraction) if window else (work.n, None)
        return Advice(name, n, fraction, baseline.name, baseline.step_s / step_s, tuple(said))

    window = best_window(model, cluster, work, micro_batch_size)
    acco = predict("acco", model, cluster, window) if window else None
    delayed = predict("wp", model, cluster, work)
    if cluster.ranks == 1:
        said.append("One rank communicates nothing: there is nothing to hide.")
        return decide(baseline.name)
    if delayed.memory_bytes > cluster.memory_bytes:
        said.append(
            f"ACCO's model states do not fit: {delayed.memory_bytes / 2**30:.1f} GiB of "
            f"{cluster.memory_bytes / 2**30:.1f}; {baseline.name} is the fastest stage that does."
        )
        return decide(baseline.name)
    if baseline.step_s < _WORTH_IT * compute:
        said.append(
            f"Nothing to win: communication and update make a step of {baseline.name} only "
            f"{100 * (baseline.step_s / compute - 1):.2g} % longer than its computation."
        )
        return decide(baseline.name)
    if window is None or acco is None:
        said.append(
            "n = 1 has no second phase for acco: set gradient_accumulation_steps = 2 and halve the micro-batch."
        )
    else:
        chosen = acco
        said.append(_regime(acco, delayed, baseline, commit, compute, window.n))
        if acco.step_s > 1.01 * compute:
            quantised = best_window(model, cluster, work, micro_batch_size, "acco-int4")
            assert quantised is not None, "it has as many phases as acco"
            int4 = predict("acco-int4", model, cluster, quantised)
            said.append(_larger_batch(commit, window))
            if acco.step_s >= _WORTH_IT * int4.step_s:
                estimate = round_s(model, cluster, quantised, ESTIMATE, "int4")
                said.append(_int4(acco, int4, quantised, estimate))
                window, chosen = quantised, int4
            elif commit > compute / 2:
                said.append(_no_int4(cluster))
        anywhere = window if chosen is acco else replace(window, estimate_fraction=None)  # the best split at each R/C
        crossing = stops_paying(model, cluster, anywhere, (baseline.name,), chosen.name)
        said.append(_crossing(crossing, baseline.name, chosen.name))
        if baseline.step_s >= _WORTH_IT * chosen.step_s:
            if chosen.step_s >= _WORTH_IT * delayed.step_s:
                faster = chosen.step_s / delayed.step_s
                said.append(f"wp and dpu would be {faster:.2f}x as fast as {chosen.name}, at a price: {_QUALITY}")
            said.append(_memory_cost(model, cluster.ranks))
            return decide(chosen.name, window, chosen.step_s)
    if baseline.step_s >= _WORTH_IT * delayed.step_s:
        said.append(f"What is faster than {baseline.name} here is wp, at a price: {_QUALITY}")
        said.append(_memory_cost(model, cluster.ranks))
        return decide("wp", work, delayed.step_s)
    said.append(f"No schedule is 2 % faster than {baseline.name}.")
    return decide(baseline.name)


_QUALITY = (
    "gradients are taken at weights one step old, or predicted ones, and the final loss is higher than acco's in every "
    "comparison that the README has; measure yours."
)


def _regime(acco: Prediction, delayed: Prediction, baseline: Prediction, commit: float, compute: float, n: int) -> str:
    against = f"{baseline.step_s / acco.step_s:.2f}x the speed of {baseline.name} ({seconds(baseline.step_s)})"
    if acco.step_s <= 1.01 * compute:
        return (
            f"Everything is hidden: each round fits behind its part of the computation (R <= C/2), so acco takes C, "
            f"{against}. Nothing can be faster; at R = C/2 it would be 1.5x as fast as C + R."
        )
    if commit < compute / 2:
        return (
            f"R <= C/2, but with n = {n} one of the phases is shorter than its round: acco takes "
            f"{seconds(acco.step_s)}, {against}. An even n has equal phases."
        )
    if commit < compute:
        return (
            f"A part is hidden: past R = C/2 acco's two rounds take longer than the computation; a step takes "
            f"{seconds(acco.step_s)}, {against}. wp and dpu have one round and hide it until R = C: "
            f"{seconds(delayed.step_s)}."
        )
    return (
        f"The network is slower than the computation (R >= C): acco's two rounds take {seconds(acco.step_s)}, "
        f"{against}; they cost more than one that waits (C + R = {seconds(compute + commit)}), and wp and dpu, with "
        f"one round, take {seconds(delayed.step_s)}."
    )


def _int4(acco: Prediction, int4: Prediction, window: Work, estimate_s: float) -> str:
    hidden = int4.exposed_s <= 0.01 * window.compute_s
    hides = "everything is hidden" if hidden else f"{seconds(int4.exposed_s)} of it exposed"
    return (
        f'"estimate_comm": "int4" hides more: the ESTIMATE then takes {seconds(estimate_s)}, so phase A, which hides '
        f"the COMMIT, can have {window.estimate_fraction:.4g} of the computation; a step takes {seconds(int4.step_s)} "
        f"({hides}), {acco.step_s / int4.step_s:.2f}x the speed of plain acco. The COMMIT stays exact; measure your "
        "loss with it."
    )


def _no_int4(cluster: Cluster) -> str:
    in_host = cluster.ranks // cluster.host_count
    why = ""
    if in_host > 1 and cluster.backend == "nccl":
        why = f": its gradients go directly from rank to rank, and the {in_host} ranks of a host share its link"
    return f'"estimate_comm": "int4" would not be 2 % faster{why}.'


def _memory_cost(model: Model, ranks: int) -> str:
    own, zero1 = memory_bytes("acco", model, ranks), memory_bytes("zero1", model, ranks)
    return f"Model states: {own / 2**30:.3g} GiB a rank, {(own - zero1) / 2**30:.3g} GiB more than zero1."


def _larger_batch(commit: float, work: Work) -> str:
    n = 2 * math.ceil(commit / work.micro_batch_s * (1 - 1e-9))
    if n <= work.n:
        n = work.n + work.n % 2
    return f"If the batch may grow: n = {n} (a {n / work.n:.3g} times larger batch) hides everything in acco."


def _crossing(ratio: float | None, name: str, mode: str) -> str:
    if ratio is None:
        return f"{mode} is at no R/C faster than {name} here."
    if math.isinf(ratio):
        return f"{mode} stays faster than {name} up to R/C = 100."
    return f"{mode} stops paying against {name} at R/C = {ratio:.3g}."
