# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The plan's formulas against simulations of the rings, hand-made sums, published and measured figures."""

import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepspeed_acco.algorithm.schedules import COMMIT, ESTIMATE, PREDICT
from deepspeed_acco.algorithm.window import phase_a_micro_batches
from deepspeed_acco.algorithm.wire import COMMIT_COMMS, ESTIMATE_COMMS, Wire
from deepspeed_acco.engine.auto_fraction import WINDOWS_TO_MEASURE, AutoFraction
from deepspeed_acco.engine.recorder_format import RECORD_RUN
from deepspeed_acco.optim.flat import pieces as cut
from deepspeed_acco.runtime import collectives
from deepspeed_acco.runtime.clock import LaneTimes
from deepspeed_acco.settings import Settings
from deepspeed_acco.tools.cli import main
from deepspeed_acco.tools.launch import launcher as launches
from deepspeed_acco.tools.plan import command as planning
from deepspeed_acco.tools.plan import model as plan
from deepspeed_acco.tools.plan.advice import advise, best_window, stops_paying
from deepspeed_acco.tools.plan.model import Cluster, Model, Work, predict

ROOT = Path(__file__).parents[2]

# 1000 parameters, V = 2000 bytes; with 4 ranks at 1000 bytes/s a reduce-scatter or an all-gather takes 1.5 s.
SMALL = Model(1000)
WORK = Work(micro_batch_s=2.0, n=4, update_s_per_parameter=0.0)
NORM_S = 2 * 16 * 3 / 4 / 1000
INT4, INT4_INT8 = Wire(ESTIMATE_COMMS["int4"]), Wire(ESTIMATE_COMMS["int4"], COMMIT_COMMS["int8"])
COARSE = INT4_INT8.commit  # whose bits are a table's: figures by hand follow them


def coded(bits):
    """Bytes of a value in blocks of 256 with a scale of two bytes."""
    return (256 * bits / 8 + 2) / 256


def slow(ranks=4, **changes):
    return Cluster(ranks, 1000.0, backend="gloo", efficiency=1.0, **changes)


# ---- collectives


def simulate_ring(ranks, whole_bytes, rate, latency_s, rounds):
    """Every step each rank passes one chunk on and waits for the one that arrives; (bytes sent by a rank, seconds)."""
    chunk = whole_bytes / ranks
    now, sent = [0.0] * ranks, [0.0] * ranks
    for _ in range(rounds * (ranks - 1)):
        leaves = list(now)
        for rank in range(ranks):
            sent[rank] += chunk
            now[rank] = max(leaves[rank], leaves[rank - 1]) + latency_s + chunk / rate
    assert len(set(sent)) == 1
    return sent[0], max(now)


@pytest.mark.parametrize("ranks", [2, 3, 8, 17])
def test_rings(ranks):
    cluster = slow(ranks, latency_s=0.25)
    for collective, rounds in ((plan.all_gather, 1), (plan.all_reduce, 2), (plan.reduce_scatter, 2)):
        cost = collective(cluster, 5000.0)
        assert (cost.wire_bytes, cost.seconds) == pytest.approx(simulate_ring(ranks, 5000.0, 1000.0, 0.25, rounds))
    nccl = replace(cluster, backend="nccl")
    fast = replace(nccl, latency_s=0.0)  # no latency: the ring, whose rate is the higher
    assert plan.reduce_scatter(fast, 5000.0).seconds == pytest.approx(5000 * (ranks - 1) / ranks / 1000)
    assert plan.reduce_scatter(nccl, 5000.0).seconds <= simulate_ring(ranks, 5000.0, 1000.0, 0.25, 1)[1] + 1e-9


def link_loads_of_a_ring(ranks, hosts, chunk):
    """An all-gather: in every step each rank passes a chunk on; bytes that leave each host."""
    host = [rank * hosts // ranks for rank in range(ranks)]
    loads = [0.0] * hosts
    for _ in range(ranks - 1):
        for rank in range(ranks):
            if host[rank] != host[(rank + 1) % ranks]:
                loads[host[rank]] += chunk
    return loads


def children_of_a_tree(hosts):
    """NCCL's binary tree, as the drawing in src/graph/trees.cc has it: the lowest set bit is a host's height."""
    parents = {}
    for host in range(1, hosts):
        bit = host & -host
        parent = (host ^ bit) | (bit << 1)
        parents[host] = parent if parent < hosts else host ^ bit
    return parents


def link_loads_of_two_trees(hosts, whole_bytes):
    """Half of the bytes in a tree and half in its mirror (its shift, of an odd number), up and down each edge."""
    loads = [0.0] * hosts
    for child, parent in children_of_a_tree(hosts).items():
        for turn in (lambda host: host, lambda host: (host + 1) % hosts if hosts % 2 else hosts - 1 - host):
            loads[turn(child)] += whole_bytes / 2
            loads[turn(parent)] += whole_bytes / 2
    return loads


@pytest.mark.parametrize(("hosts", "in_host"), [(2, 2), (2, 8), (3, 4), (4, 2), (8, 8)])
def test_what_nccl_moves_over_a_hosts_link(hosts, in_host):
    cluster = Cluster(hosts * in_host, 1000.0, hosts=hosts, efficiency=1.0)
    (ring,) = set(link_loads_of_a_ring(cluster.ranks, hosts, 4800.0 / cluster.ranks))
    for one_way in (plan.all_gather, plan.reduce_scatter):
        cost = one_way(cluster, 4800.0)
        assert (cost.link_bytes, cost.seconds) == pytest.approx((ring, ring / 1000))
    loads = link_loads_of_two_trees(hosts, 4800.0)
    mean = sum(loads) / hosts
    cost = plan.all_reduce(cluster, 4800.0)
    assert (cost.link_bytes, cost.seconds) == pytest.approx((mean, mean / 1000 / 0.92))
    assert cost.seconds < 2 * ring / 1000, "the tree is taken where it is cheaper"
    assert (max(loads) == mean) == (hosts == 2), "more hosts than two are not loaded alike, which is left out"


def test_the_slower_kind_of_link_counts():
    # Inside a host at 500 bytes/s, between hosts at 1000. Ring: each rank sends 3/4 V. Tree: half of 2 V, chain of two.
    cluster = Cluster(4, 1000.0, hosts=2, efficiency=1.0, inside_bandwidth=500.0)
    assert plan.all_gather(cluster, 4000.0).seconds == pytest.approx(3000 / 500)
    assert plan.all_reduce(cluster, 4000.0).seconds == pytest.approx(4000 / 500 / 0.92)
    assert plan.all_gather(replace(cluster, hosts=4), 4000.0).seconds == pytest.approx(3000 / 1000)


def test_tree_where_it_is_cheaper():
    cluster = Cluster(4096, 1e10, 10e-6, efficiency=1.0)
    assert plan.all_gather(cluster, 0).seconds == pytest.approx(12 * 10e-6)
    assert plan.all_reduce(cluster, 0).seconds == pytest.approx(24 * 10e-6)
    assert plan.all_reduce(cluster, 1e12).seconds == pytest.approx(2e12 * 4095 / 4096 / 1e10 + 2 * 4095 * 10e-6)
    packed = replace(cluster, hosts=512)  # 8 ranks a host: no tree for an all-gather; 7 steps inside, 9 between hosts
    assert plan.all_gather(packed, 0).seconds == pytest.approx((511 + 3584 * 3.4 / 9.6) * 10e-6)
    assert plan.all_reduce(packed, 0).seconds == pytest.approx(2 * (7 * 3.4 / 9.6 + 9) * 10e-6)
    assert plan.all_gather(replace(cluster, backend="gloo"), 0).seconds == pytest.approx(4095 * 10e-6)


@pytest.mark.parametrize(("ranks", "hosts"), [(2, 2), (6, 2), (6, 3), (6, 6), (8, 2)])
def test_direct_exchange_counts_what_crosses_a_hosts_link(ranks, hosts):
    part = 1200.0 / ranks
    host = [rank * hosts // ranks for rank in range(ranks)]
    crossing = sum(part for a in range(ranks) for b in range(ranks) if host[a] == 0 and host[b] != 0)
    cost = plan.acco_reduce_scatter(slow(ranks, hosts=hosts), 1200.0)
    assert cost.seconds == pytest.approx(crossing / 1000)
    assert cost.wire_bytes == pytest.approx((ranks - 1) * part)


def test_reduce_to_each_rank():
    # gloo, 4 ranks, V = 4000: each of four reduces of 1000 bytes sends 3 x 250 round the ring, then 250 to the root,
    # whose link receives 3 x 250; a rank is the root once and sends it 3 times.
    cost = plan.reduce_to_each(slow(4, latency_s=0.0), 4000.0)
    assert cost.wire_bytes == pytest.approx(4 * 750 + 3 * 250)
    assert cost.seconds == pytest.approx(4 * (0.75 + 0.75))
    chain = plan.reduce_to_each(Cluster(4, 1000.0, 0.5, efficiency=1.0), 4000.0)
    assert chain.wire_bytes == 3 * 1000
    on_host = 4 * 50e-6  # each is launched by itself
    assert chain.seconds == pytest.approx(4 * (1.0 + 4 * 0.5) + on_host)
    assert plan.reduce_to_each(slow(1), 4000.0) == plan.NOTHING
    # Two hosts of two: 250 of each of the two ranks outside reach a root through its host's link, for four roots; the
    # ring of 250 leaves each host three times for each root.
    cost = plan.reduce_to_each(slow(4, hosts=2), 4000.0)
    assert (cost.link_bytes, cost.seconds) == pytest.approx((4 * 750 + 2 * 2 * 250, 4 * (0.75 + 0.5)))


def simulate_chains(roots, ranks, step_s):
    """Each reduce passes from the rank behind the root round the ring to the root, a step a rank; a rank takes part in
    one at a time. Seconds until all have ended."""
    free = [0.0] * ranks
    for root in roots:
        arrived = 0.0
        for distance in range(1, ranks + 1):
            rank = (root + distance) % ranks
            arrived = free[rank] = max(arrived, free[rank]) + step_s
    return max(free)


@pytest.mark.parametrize(("ranks", "runs"), [(8, 8), (64, 1), (64, 4), (256, 16)])
def test_reduces_follow_one_another_where_their_roots_ascend(ranks, runs):
    # The last stretch of ranks first, as a backward gives them, and within a stretch from its first rank on.
    length = ranks // runs
    roots = [first + at for first in range(ranks - length, -1, -length) for at in range(length)]
    expected = simulate_chains(roots, ranks, 10e-6)
    cost = plan.reduce_to_each(Cluster(ranks, 1e30, 10e-6), 4000.0, runs)
    assert cost.seconds - ranks * 50e-6 == pytest.approx(expected)


# ---- two levels


class TwoLevels:
    """Does what a round over two levels does, with numbers: counts bytes and messages, and ends with every rank's sum.

    Rank (host, place) owns segment host * k + place, of ``segment`` bytes inside and of ``between`` between hosts.
    """

    def __init__(self, hosts, in_host, inside, between):
        self.hosts, self.in_host, self.sizes = hosts, in_host, {True: inside, False: between}
        self.ranks = [(host, place) for host in range(hosts) for place in range(in_host)]
        self.sent, self.on_link = dict.fromkeys(self.ranks, 0.0), [0.0] * hosts
        self.messages = {True: dict.fromkeys(self.ranks, 0), False: dict.fromkeys(self.ranks, 0)}

    def send(self, sender, receiver, segments):
        is_inside = sender[0] == receiver[0]
        self.sent[sender] += len(segments) * self.sizes[is_inside]
        self.messages[is_inside][sender] += 1
        if not is_inside:
            self.on_link[sender[0]] += len(segments) * self.sizes[False]

    def reduce_scatter(self, gradients):
        """``gradients[rank][segment]``; returns each rank's sum of its own segment."""
        partial = {}
        for host, place in self.ranks:
            segments = [other * self.in_host + place for other in range(self.hosts)]
            neighbors = [(host, other) for other in range(self.in_host)]
            for neighbor in neighbors:
                if neighbor != (host, place):
                    self.send(neighbor, (host, place), segments)
            partial[host, place] = {at: sum(gradients[rank][at] for rank in neighbors) for at in segments}
        sums = {}
        for host, place in self.ranks:
            own = host * self.in_host + place
            for other in range(self.hosts):
                if other != host:
                    self.send((other, place), (host, place), [own])
            sums[host, place] = sum(partial[other, place][own] for other in range(self.hosts))
        return sums

    def all_gather(self, own):
        """``own[rank]``; returns what each rank has of all segments."""
        held = {rank: {rank[0] * self.in_host + rank[1]: own[rank]} for rank in self.ranks}
        for host, place in self.ranks:
            for other in range(self.hosts):
                if other != host:
                    self.send((other, place), (host, place), [other * self.in_host + place])
                    held[host, place][other * self.in_host + place] = own[other, place]
        whole = {}
        for host, place in self.ranks:
            whole[host, place] = dict(held[host, place])
            for other in range(self.in_host):
                if other != place:
                    self.send((host, other), (host, place), list(held[host, other]))
                    whole[host, place] |= held[host, other]
        return whole


@pytest.mark.parametrize(("hosts", "in_host"), [(2, 2), (3, 2), (2, 4), (5, 3)])
@pytest.mark.parametrize(
    ("this", "wire"), [(COMMIT, Wire()), (ESTIMATE, INT4), (COMMIT, INT4_INT8), (ESTIMATE, INT4_INT8)]
)
def test_two_levels_move_what_a_simulation_of_them_moves(hosts, in_host, this, wire):
    ranks, bits = hosts * in_host, wire.of(this)
    model = Model(ranks * 256)
    inside = 258 if wire.commit else 512  # of a segment: codes of 8 bits, or bf16
    sent, gathered = (256 * coded(each) if bits else 512 for each in (bits.gradient, bits.change))
    down, up = TwoLevels(hosts, in_host, inside, sent), TwoLevels(hosts, in_host, gathered, gathered)
    gradients = {rank: [7 * at + number for at in range(ranks)] for number, rank in enumerate(down.ranks)}
    total = [sum(gradients[rank][at] for rank in down.ranks) for at in range(ranks)]
    own = down.reduce_scatter(gradients)
    assert all(list(map(whole.get, range(ranks))) == total for whole in up.all_gather(own).values())
    (sent,) = {down.sent[rank] + up.sent[rank] for rank in down.ranks}
    (on_link,) = set(map(sum, zip(down.on_link, up.on_link)))
    cluster = Cluster(ranks, 1000.0, 0.5, hosts=hosts, efficiency=1.0, inside_bandwidth=4000.0)
    norm = plan.all_reduce(cluster, 16)
    cost = plan.round_communication(model, cluster, this, wire)
    assert cost.wire_bytes - norm.wire_bytes == pytest.approx(sent)
    assert cost.link_bytes - norm.link_bytes == pytest.approx(on_link)
    # On NCCL one level after the other, a latency for each message (no tree is cheaper for so many bytes).
    inside_bytes = sent - on_link / in_host
    messages = sum(level.messages[False][0, 0] for level in (down, up))
    inside_messages = sum(level.messages[True][0, 0] for level in (down, up))
    assert (messages, inside_messages) == (2 * (hosts - 1), 2 * (in_host - 1))
    latency = 0.5 * (messages + 3.4 / 9.6 * inside_messages)
    seconds = inside_bytes / 4000 + on_link / 1000 + latency
    assert cost.seconds - norm.seconds == pytest.approx(seconds, rel=1e-6 if hosts < 4 else 0.1)


def simulate_pieces(first_s, second_s, pieces):
    """Two links after one another, each with one piece at a time; seconds until the last piece is through."""
    first, second = 0.0, 0.0
    for _ in range(pieces):
        first += first_s / pieces
        second = max(first, second) + second_s / pieces
    return second


@pytest.mark.parametrize("inside_bandwidth", [2e6, 2e7, 2e9])
def test_on_gloo_the_levels_overlap_but_for_a_piece(inside_bandwidth):
    model, pieces = Model(64 * 2**20), 24  # of 128 MiB a rank sends half inside and a quarter outside: 24 times 4 MiB
    cluster = Cluster(4, 2e7, backend="gloo", hosts=2, efficiency=1.0, inside_bandwidth=inside_bandwidth)
    inside, between = 64 * 2**20 / inside_bandwidth, 64 * 2**20 / 2e7
    expected = 2 * simulate_pieces(inside, between, pieces)
    norm = plan.all_reduce(cluster, 16).seconds
    assert plan.round_communication(model, cluster).seconds - norm == pytest.approx(expected)


@pytest.mark.parametrize("in_host", [2, 4])
def test_two_shaped_hosts_take_as_long_however_many_ranks_they_have(in_host):
    model, alone = Model(10_000_000), Cluster(2, 200e6 / 8, backend="gloo")
    packed = Cluster(2 * in_host, 200e6 / 8, backend="gloo", hosts=2)
    one, several = plan.round_communication(model, alone), plan.round_communication(model, packed)
    assert several.link_bytes == pytest.approx(one.link_bytes, rel=1e-4)
    assert one.seconds < several.seconds < 1.1 * one.seconds
    flat = plan.round_communication(model, replace(packed, two_levels=False))
    assert flat.seconds > 1.4 * one.seconds and flat.link_bytes > 1.4 * one.link_bytes


@pytest.mark.parametrize("backend", plan.BACKENDS)
@pytest.mark.parametrize("wire", [Wire(), INT4, INT4_INT8])
@pytest.mark.parametrize(("ranks", "hosts"), [(4, 4), (4, None), (4, 1)])
def test_one_kind_of_link_has_one_level(backend, wire, ranks, hosts):
    cluster = Cluster(ranks, 1000.0, 0.1, backend, hosts)
    flat = replace(cluster, two_levels=False)
    for this in (COMMIT, ESTIMATE):
        at_once = plan.round_communication(SMALL, cluster, this, wire)
        assert at_once == plan.round_communication(SMALL, flat, this, wire)


@pytest.mark.parametrize(("numel", "pieces"), [(1000, 1), (4 * 2**20, 1), (12 * 2**20, 3), (400 * 2**20, 8)])
def test_on_nccl_a_quantized_commit_pays_latency_for_every_piece(numel, pieces):
    assert (collectives.PIECES, collectives.SMALLEST_PIECE) == (8, 2**20)
    model, cluster = Model(numel), Cluster(4, 1e30, 0.5, hosts=2)
    shards = [numel // 4] * 2
    taken = [len(list(cut(shard, max(-(-shard // 8), 2**20)))) for shard in shards]
    assert taken == [pieces] * 2, "as the runtime cuts them"
    for wire in (INT4, INT4_INT8):
        others = plan.all_reduce(cluster, 16).seconds + (1 + 3.4 / 9.6) * 0.5  # the norm, and gathering
        took = plan.round_communication(model, cluster, ESTIMATE, wire).seconds - others
        assert took == pytest.approx((1 + 3.4 / 9.6) * 0.5 * (pieces if wire.commit else 1), rel=1e-2)


def test_two_hosts_of_eight_at_25_gbit():
    # 1.3B, 16,384 tokens a rank and step on an A100 at 40 %. Flat rounds are as the plan had all of them: 3.468, 2.894.
    model, work = Model(1_300_000_000), Work(0.128, 8)
    cluster = Cluster(16, 25e9 / 8, 10e-6, hosts=2)
    stage = min(predict(name, model, cluster, work).step_s for name in plan.STAGES)
    flat = replace(cluster, two_levels=False)
    for name, step_s, speed in (("acco", 3.468, 1.05), ("acco-int4", 2.894, 1.65)):
        assert predict(name, model, flat, work).step_s == pytest.approx(step_s, rel=1e-3)
        assert stage / predict(name, model, cluster, work).step_s == pytest.approx(speed, abs=0.005)
    # With a COMMIT in few bits all is hidden, and flat the ranks of a host still share its link.
    assert predict("acco-int4-commit8", model, cluster, work).exposed_s == 0
    assert predict("acco-int4-commit8", model, flat, work).exposed_s > work.compute_s / 2


# ---- steps


@pytest.mark.parametrize(
    ("name", "exposed_s"),
    [
        ("zero0", 3.0),  # one all-reduce
        ("zero1", 3.0 + 1.5),
        ("zero1-reduce", 3.0 + 1.5),  # gloo's reduce: as long as an all-reduce
        ("zero2", 4 * 3.0 + 1.5),  # at every micro-batch
        ("zero2-reduce", 4 * 3.0 + 1.5),
        ("zero3", 4 * (1.5 + 1.5 + 3.0)),  # gloo's reduce-scatter: as an all-reduce
        ("sync", 3.0),
        ("acco", 0.0),  # A = B = 4 s, R = 3 s
        ("acco-int8", 0.0),
        ("acco-int4", 0.0),
        ("acco-int4-commit8", 0.0),
        ("sync-commit8", 0.75 * (coded(COARSE.gradient) + coded(COARSE.change))),
        ("local", 0.0),
        ("wp", 0.0),
        ("dpu", 0.0),
    ],
)
def test_steps_by_hand(name, exposed_s):
    row = predict(name, SMALL, slow(), WORK)
    norm = 0.0 if exposed_s == 0 else NORM_S
    assert row.exposed_s == pytest.approx(exposed_s + norm)
    assert row.step_s == pytest.approx(8.0 + exposed_s + norm)
    assert row.bound_s == (None if name.startswith("zero") else row.step_s)


def test_bytes_on_the_wire():
    sent = {name: predict(name, SMALL, slow(), WORK).wire_bytes for name in plan.names()}
    norm = 2 * 16 * 3 / 4
    assert sent["dpu"] == sent["wp"] == sent["sync"] == 3000 + norm  # RS + AG
    assert sent["acco"] == 2 * sent["dpu"]
    assert sent["local"] == pytest.approx(sent["dpu"] + 1500 * 4 / 256 / 2)  # a root for 256 weights of 2 bytes
    assert sent["zero0"] == 3000 + norm
    assert sent["zero1"] == 4500 + norm
    assert sent["zero2"] == 4 * 3000 + 1500 + norm
    assert sent["zero3"] == 4 * (1500 + 1500 + 3000) + norm
    # 256 parameters: 256 or 128 bytes of codes and 2 of a scale; each way to and from the 3 others.
    assert sent["acco-int8"] == pytest.approx(sent["dpu"] + 2 * 750 * 258 / 256 + norm)
    assert sent["acco-int4"] == pytest.approx(sent["dpu"] + 2 * 750 * 130 / 256 + norm)
    commit = 750 * (coded(COARSE.gradient) + coded(COARSE.change)) + norm
    assert sent["sync-commit8"] == sent["wp-commit8"] == sent["dpu-commit8"] == pytest.approx(commit)
    assert sent["local-commit8"] == pytest.approx(commit + 750 * 4 / 256)
    assert sent["acco-commit8"] == pytest.approx(commit + sent["dpu"])
    assert sent["acco-int4-commit8"] == pytest.approx(commit + 2 * 750 * 130 / 256 + norm)
    assert sent["acco-int4-commit8"] < 0.77 * sent["sync"], "less than one round in full"
    on_nccl = replace(slow(), backend="nccl")
    assert predict("zero3", SMALL, on_nccl, WORK).wire_bytes == 4 * 3 * 1500 + norm
    assert predict("zero1-reduce", SMALL, on_nccl, WORK).wire_bytes == 3000 + norm
    mixed = Model(1000, weight_bytes=2, comm_bytes=4, accumulation_bytes=4)
    assert predict("dpu", mixed, slow(), WORK).wire_bytes == 3000 + 1500 + norm


def test_acco_takes_the_longer_of_phase_and_round():
    work = Work(1.0, 5, 0.0, estimate_fraction=0.8)
    rounds = 3.0 + NORM_S
    assert predict("acco", SMALL, slow(), work).step_s == pytest.approx(4.0 + rounds)  # A = 4 > R, B = 1 < R
    assert predict("wp", SMALL, slow(), work).step_s == 5.0


INT4_S = 2 * 750 * 130 / 256 / 1000 + NORM_S  # R_estimate of SMALL on slow()


def test_a_quantized_estimate_by_hand():
    estimate = plan.round_s(SMALL, slow(), WORK, ESTIMATE, INT4)
    assert estimate == pytest.approx(INT4_S)
    assert estimate / plan.round_s(SMALL, slow(), WORK) == pytest.approx(0.26, abs=0.01)
    assert plan.round_s(SMALL, slow(), WORK, COMMIT, INT4) == plan.round_s(SMALL, slow(), WORK, COMMIT)
    # R_commit = 3.02 s, R_estimate = 0.79 s. Ten micro-batches of 0.4 s: 8 of them hide the COMMIT, 2 the ESTIMATE.
    work = Work(0.4, 10, 0.0)
    assert plan.split_of("acco-int4", SMALL, slow(), work) == 8
    assert predict("acco-int4", SMALL, slow(), work).step_s == pytest.approx(4.0)
    assert predict("acco", SMALL, slow(), work).step_s == pytest.approx(2 * (3.0 + NORM_S))
    given = replace(work, estimate_fraction=0.5)
    assert predict("acco-int4", SMALL, slow(), given).step_s == pytest.approx(3.0 + NORM_S + 2.0)
    assert [row.name for row in plan.predict_all(SMALL, slow(), replace(work, n=1))] == [
        *plan.STAGES,
        "local",
        "wp",
        "dpu",
        "sync",
    ]


COMMIT8_S = 0.75 * (coded(COARSE.gradient) + coded(COARSE.change)) + NORM_S


def test_a_quantized_commit_by_hand():
    # R_estimate = 0.79 s and R_commit = 1.17 with changes in 4 bits, 1.55 in 8. Two micro-batches of 0.8 s hide each.
    work = Work(0.8, 4, 0.0)
    assert plan.round_s(SMALL, slow(), work, COMMIT, INT4_INT8) == pytest.approx(COMMIT8_S)
    assert plan.split_of("acco-int4-commit8", SMALL, slow(), work) == 2
    assert predict("acco-int4-commit8", SMALL, slow(), work).exposed_s == 0
    assert predict("acco-int4", SMALL, slow(), work).step_s == pytest.approx(3.0 + NORM_S + 0.8)
    # With a full ESTIMATE phase B must hide 3 s, and phase A the rest.
    assert plan.split_of("acco-commit8", SMALL, slow(), Work(1.2, 5, 0.0)) == 2
    short = Work(0.1, 4, 0.0)
    assert predict("dpu-commit8", SMALL, slow(), short).step_s == pytest.approx(COMMIT8_S)
    assert predict("acco-int4-commit8", SMALL, slow(), short).step_s == pytest.approx(COMMIT8_S + INT4_S)


def test_modes_have_names_and_tables_those_that_are_listed():
    quantized = ["local-commit8", "wp-commit8", "dpu-commit8", "sync-commit8"]
    assert list(plan.modes()) == [
        *("acco", "acco-int8", "acco-int4", "acco-commit8", "acco-int8-commit8", "acco-int4-commit8"),
        *(name for pair in zip(("local", "wp", "dpu", "sync"), quantized) for name in pair),
    ]
    assert all(mode.name == name for name, mode in plan.modes().items())
    listed = ["acco", "acco-int8", "acco-int4", "acco-int4-commit8", "local", "wp", "dpu", "sync"]
    assert [row.name for row in plan.predict_all(SMALL, slow(), WORK)] == [*plan.STAGES, *listed]
    also = [row.name for row in plan.predict_all(SMALL, slow(), WORK, also=quantized)]
    assert set(also) - {*plan.STAGES, *listed} == set(quantized)


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_quantized_estimate_on_nccl_goes_from_rank_to_rank(hosts):
    cluster = replace(slow(4, hosts=hosts), backend="nccl")
    cluster = replace(cluster, two_levels=False)
    whole = 1000 * 130 / 256
    crossing = {4: 3 / 4 * whole, 2: 2 * 2 / 4 * whole}[hosts]  # out of a host: each of its ranks to each one outside
    expected = (crossing + 3 / 4 * whole) / 1000 + plan.all_reduce(cluster, 16).seconds
    assert plan.round_s(SMALL, cluster, WORK, ESTIMATE, INT4) == pytest.approx(expected)


def test_updates():
    work = replace(WORK, update_s_per_parameter=0.028)
    base = 3.0 + NORM_S
    assert plan.round_s(SMALL, slow(), work, COMMIT) == pytest.approx(base + 250 * 0.028)
    assert plan.round_s(SMALL, slow(), work, ESTIMATE) == pytest.approx(base + 250 * 0.016)
    assert plan.round_s(SMALL, slow(), work, PREDICT) == pytest.approx(base + 250 * 0.044)
    assert predict("zero0", SMALL, slow(), work).exposed_s == pytest.approx(3.0 + NORM_S + 1000 * 0.028)
    assert predict("zero1", SMALL, slow(), work).exposed_s == pytest.approx(4.5 + NORM_S + 250 * 0.028)


@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_one_rank_and_an_infinite_network_take_the_computation(backend):
    alone = Cluster(1, 1.0, 1.0, backend)
    perfect = Cluster(64, 1e30, 0.0, backend)
    for cluster in (alone, perfect):
        for row in plan.predict_all(SMALL, cluster, WORK):
            reduces = (
                0
                if cluster == alone or backend == "gloo"
                else {"zero1-reduce": 64, "zero2-reduce": 4 * 64}.get(row.name, 0)
            )
            on_host_s = 50e-6 * reduces  # no network makes it shorter
            assert row.step_s == pytest.approx(8.0 + on_host_s), row.name
            assert row.exposed_s == pytest.approx(on_host_s, abs=1e-9)
    assert all(row.wire_bytes == 0 for row in plan.predict_all(SMALL, alone, WORK))


def simulate_buckets(backward_s, reduction_s, buckets):
    """The backward fills a bucket, waits for the reduction before, starts this one's; seconds until all is reduced."""
    now, reduced = 0.0, 0.0
    for _ in range(buckets):
        now = max(now + backward_s / buckets, reduced)
        reduced = now + reduction_s / buckets
    return reduced


@pytest.mark.parametrize("reduction_s", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("numel", [400_000_000, 5_000_000_000])
def test_overlap_comm_hides_all_buckets_but_the_last(numel, reduction_s):
    model, buckets = Model(numel), math.ceil(numel / 500_000_000)
    rate = 2 * 2 * numel * 3 / 4 / reduction_s if reduction_s else 1e30
    cluster = Cluster(4, rate, efficiency=1.0)
    work = Work(1.5, 2, 0.0)  # a backward of 1 s
    expected = simulate_buckets(1.0, reduction_s, buckets) - 1.0
    gather = reduction_s / 2
    assert predict("zero1", model, cluster, work).exposed_s == pytest.approx(expected + gather, abs=1e-6)
    assert predict("zero2", model, cluster, work).exposed_s == pytest.approx(2 * expected + gather, abs=1e-6)
    without = replace(cluster, overlaps_stock=False)
    assert predict("zero1", model, without, work).exposed_s == pytest.approx(reduction_s + gather, abs=1e-6)


def test_zero3_hides_behind_forward_and_backward():
    # A forward of 0.5 s beside 0.6 s of gathering, a backward of 1 s beside 0.6 + 0.6 s.
    cluster = Cluster(4, 2 * 1000 * 3 / 4 / 0.6, efficiency=1.0)
    row = predict("zero3", SMALL, cluster, Work(1.5, 2, 0.0))
    assert row.exposed_s == pytest.approx(2 * (0.1 + 0.2), rel=0.02)  # and the norm's 16 bytes


def test_memory_is_that_of_the_zero_paper():
    # ZeRO, figure 1: 7.5B parameters, 64 ranks. Ours has DeepSpeed's fp32 gradient of the shard on top.
    model, extra = Model(7_500_000_000), 4 * 7.5e9 / 64
    for name, gigabytes in (("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)):
        assert (plan.memory_bytes(name, model, 64) - extra) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert (plan.memory_bytes("zero0", model, 64) - 4 * 7.5e9) / 1e9 == pytest.approx(120, abs=0.05)
    assert plan.memory_bytes("zero0", Model(10, 4, 4, 4), 2) == 160  # torch's AdamW: weight, gradient, two states
    assert plan.memory_bytes("zero3", Model(10), 4) == 20 * 3  # shards are rounded up


def test_memory_with_a_quantized_commit():
    # 2560 parameters, 4 ranks: weights 2, gradients 2, shard 16, and what all ranks hold of the shard 2 bytes each.
    bf16, mixed = Model(2560), Model(2560, 2, 4, 4)
    codes = coded(max(COARSE.gradient, COARSE.change))
    for name in ("acco-int4-commit8", "acco-int8-commit8", "dpu-commit8", "wp-commit8", "sync-commit8"):
        assert plan.memory_bytes(name, bf16, 4) == (2 + 2 + codes) * 2560 + 18 * 640
        assert plan.memory_bytes(name, mixed, 4) == (2 + 4 + codes) * 2560 + 18 * 640
    assert plan.memory_bytes("local-commit8", bf16, 4) == (2 + 2 + codes + 2 + 4 / 256) * 2560 + 18 * 640
    full = plan.memory_bytes("acco", mixed, 4)
    assert plan.memory_bytes("acco-commit8", mixed, 4) == full + 2 * 640, "the ESTIMATE needs all of the buffer"


def test_memory_above_zero1_is_the_measured_one():
    measured = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
    model, ranks = Model(measured["numel"]), measured["ranks"]
    above = (plan.memory_bytes("acco", model, ranks) - plan.memory_bytes("zero1", model, ranks)) / model.numel
    assert above == pytest.approx(measured["above_zero1_bytes_per_param"]["acco"], rel=0.05)


# ---- the committed measurement


def _two_hosts():
    measured = json.loads((ROOT / "benchmarks/results/two_hosts_compare.json").read_text())
    work = Work(measured["reference"]["micro_batch_s"], measured["n"], update_s_per_parameter=1e-9)
    steps = {config["name"]: config["step_s"]["median"] for config in measured["configs"]}
    return (
        measured["reference"]["round_s"],
        steps,
        Model(measured["model"]["numel"]),
        Cluster(2, 300e6 / 8, backend="gloo"),
        work,
    )


def test_the_measured_steps_within_ten_percent():
    round_s, steps, model, cluster, work = _two_hosts()
    cluster = plan.calibrated(model, cluster, work, round_s)
    assert plan.round_s(model, cluster, work) == pytest.approx(round_s, rel=1e-9)
    assert set(steps) == {"acco", "wp", "dpu", "sync", "zero0", "zero1"}
    for name, step_s in steps.items():
        assert predict(name, model, cluster, work).step_s == pytest.approx(step_s, rel=0.10), name


def test_the_bandwidth_alone_makes_the_measured_round():
    round_s, steps, model, cluster, work = _two_hosts()
    alone = plan.round_s(model, cluster, work)
    assert alone == pytest.approx(2e7 / (300e6 / 8) * 1514 / 1448 + 0.005, rel=1e-3)  # two times V/2, and the update
    assert alone == pytest.approx(round_s, rel=0.02)
    for name, step_s in steps.items():  # nearly all of it is computation
        assert predict(name, model, cluster, work).step_s == pytest.approx(step_s, rel=0.10), name


def test_a_calibrated_network_scales_by_bytes():
    work = replace(WORK, update_s_per_parameter=0.01)
    cluster = plan.calibrated(SMALL, slow(), work, 3.0 + 2.5)  # 2.5 s of it are the update
    exposed = predict("zero1", SMALL, cluster, work).exposed_s - 2.5
    assert exposed == pytest.approx(3.0 * (4500 + 24) / (3000 + 24))
    latent = plan.calibrated(SMALL, Cluster(4, 1.0, 0.1), work, 5.5)
    assert plan.round_s(SMALL, latent, work) == pytest.approx(5.5)
    with pytest.raises(ValueError, match="update and the latencies alone take 2.5"):
        plan.calibrated(SMALL, slow(), work, 2.4)
    with pytest.raises(ValueError, match="one rank communicates nothing"):
        plan.calibrated(SMALL, slow(1), work, 3.0)


# ---- advice


def _work_at(ratio, n=8, cluster=None, **changes):
    """Of SMALL: such that R/C is ``ratio``."""
    return Work((3.0 + NORM_S) / ratio / n, n, 0.0, **changes)


def test_where_acco_stops_paying():
    work, cluster = _work_at(0.3), slow()
    norm = NORM_S
    assert stops_paying(SMALL, cluster, work, ["sync"]) == pytest.approx(1.0)  # 2R = C + R
    assert stops_paying(SMALL, cluster, work, ["zero0"]) == pytest.approx(1.0)
    expected = (3.0 + norm) / (2 * (3.0 + norm) - (4.5 + norm))  # 2R = C + 1.5 R: about 2
    assert stops_paying(SMALL, cluster, work, ["zero1"]) == pytest.approx(expected)
    assert expected == pytest.approx(2.0, rel=0.02)
    assert stops_paying(SMALL, cluster, work, ["wp"]) is None
    assert stops_paying(SMALL, cluster, work, ["zero3"]) == math.inf
    assert stops_paying(SMALL, cluster, work) == pytest.approx(1.0)
    assert stops_paying(SMALL, slow(1), work) is None
    # R + R_estimate = C + R, where no phase is longer than its round: at C = R_estimate.
    expected = (3.0 + norm) / INT4_S
    assert stops_paying(SMALL, cluster, work, ["sync"], "acco-int4") == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("ratio", "name", "speedup", "says"),
    [
        (0.01, "zero0", 1.0, "Nothing to win: communication and update make a step of zero0 only 1 % longer"),
        (0.3, "acco", 1.3, "Everything is hidden"),
        (0.5, "acco", 1.5, "Everything is hidden"),
        # C = 3.78 s in 8 micro-batches: int4 leaves a part of R_commit = 3.024 s to be seen, quantized COMMIT8_S.
        (0.8, "acco-int4-commit8", 1.8, "A part is hidden"),
        (1.05, "acco-int4-commit8", 2.05, "The network is slower than the computation"),  # 5 x 0.36 s hide the COMMIT
        (20.0, "acco-int4-commit8", 21 * (3 + NORM_S) / 20 / (COMMIT8_S + INT4_S), "The network is slower than"),
    ],
)
def test_advice_over_the_regimes(ratio, name, speedup, says):
    advice = advise(SMALL, slow(), _work_at(ratio))
    assert (advice.name, advice.baseline) == (name, "zero0")
    assert advice.speedup == pytest.approx(speedup, rel=1e-3)
    text = " ".join(advice.sentences)
    assert says in text
    assert ("at a price" in text) == (ratio > 10), "what hides no more than the chosen is not named"
    assert ("If the batch may grow: n =" in text) == (ratio > 0.6)


def test_the_advice_names_int4_only_where_it_hides_more():
    # R_commit = 0.7 C, R_estimate = 0.182 C: 7 + 3 and 8 + 2 micro-batches hide both, 8 + 2 leaves more room.
    hidden = advise(SMALL, slow(), _work_at(0.7, n=10))
    assert (hidden.name, hidden.estimate_fraction, hidden.speedup) == ("acco-int4", 0.8, pytest.approx(1.7))
    text = " ".join(hidden.sentences)
    assert "the ESTIMATE then takes 786 ms" in text and "everything is hidden" in text and "1.40x the speed" in text
    assert "acco-int4 stops paying against zero0 at R/C" in text and "at a price" not in text
    assert "int4" not in " ".join(advise(SMALL, slow(), _work_at(0.45)).sentences), "acco hides all"
    packed = replace(slow(64, hosts=8), backend="nccl")  # 8 ranks share a link
    assert advise(SMALL, packed, Work(plan.round_s(SMALL, packed, WORK) / 0.7 / 10, 10, 0.0)).name == "acco-int4"
    packed = replace(packed, two_levels=False)
    exposed = Work(plan.round_s(SMALL, packed, WORK) / 0.8 / 8, 8, 0.0)
    advice = advise(SMALL, packed, exposed)
    assert advice.name != "acco-int4"
    assert "would not be 2 % faster: its gradients go directly" in " ".join(advice.sentences)


@pytest.mark.parametrize(("ratio", "is_said"), [(0.8, False), (9.9, False), (10.1, True), (50.0, True)])
def test_the_advice_names_who_wins_on_a_very_slow_network(ratio, is_said):
    sentences = advise(SMALL, slow(), _work_at(ratio)).sentences
    said = [sentence for sentence in sentences if "local-SGD family" in sentence]
    assert len(said) == is_said
    assert all(name in sentence for sentence in said for name in ("Streaming DiLoCo", "DiLoCoX", "SparseLoCo", "DeMo"))


def test_the_larger_batch_hides_everything():
    work = _work_at(0.8)
    sentence = next(said for said in advise(SMALL, slow(), work).sentences if "If the batch may grow" in said)
    assert "n = 14 " in sentence  # 2 x 0.8 x 8 = 12.8
    larger = replace(work, n=14)
    assert predict("acco", SMALL, slow(), larger).step_s == pytest.approx(larger.compute_s)
    fewer = replace(work, n=12)
    assert predict("acco", SMALL, slow(), fewer).step_s > 1.01 * fewer.compute_s


def test_window_and_fraction_at_the_same_batch():
    odd = _work_at(0.45, n=3)
    cut = best_window(SMALL, slow(), odd, micro_batch_size=2)
    assert (cut.n, cut.estimate_fraction, cut.compute_s) == (6, 0.5, pytest.approx(odd.compute_s))
    assert best_window(SMALL, slow(), odd, micro_batch_size=1).n == 3
    assert "An even n has equal phases" in " ".join(advise(SMALL, slow(), odd).sentences)
    one = _work_at(0.3, n=1)
    assert best_window(SMALL, slow(), one, 1) is None
    assert best_window(SMALL, slow(), one, 4).n == 2
    assert "n = 1 has no second phase" in " ".join(advise(SMALL, slow(), one).sentences)
    assert advise(SMALL, slow(), one, 4).n == 2
    assert "acco" not in [row.name for row in plan.predict_all(SMALL, slow(), one)]
    # Where a COMMIT is longer than an ESTIMATE, phase A is: R_commit = 3 + 7, R_estimate = 3 + 4 s, C = 17.1 s.
    uneven = Work(1.71, 10, 0.028)
    assert best_window(SMALL, slow(), uneven).estimate_fraction == 0.6
    for n in range(2, 40):
        assert all(phase_a_micro_batches(n, a / n) == a for a in range(1, n))


class _MeasuredRank:
    """Is a driver whose rounds take what a plan predicts; every window takes ``n`` micro-batches and no more."""

    def __init__(self, figures, n, monkeypatch):
        self._figures, self._times = figures, LaneTimes()
        self.lane = SimpleNamespace(times=self._times.copy)
        self.comm = SimpleNamespace(device=torch.device("cpu"), gather_from_all=lambda own: [own, own])
        now = itertools.count(0.0, n * figures.micro_batch_s)
        monkeypatch.setattr("deepspeed_acco.runtime.clock.time", SimpleNamespace(perf_counter=lambda: next(now)))

    def finish(self):
        self._times.add("COMMIT 7", self._figures.commit_s, 0.0)
        self._times.add("ESTIMATE 7", self._figures.estimate_s, 0.0)


@pytest.mark.parametrize("n", [2, 5, 8, 64])
@pytest.mark.parametrize("name", ["acco", "acco-int8", "acco-int4", "acco-commit8", "acco-int4-commit8"])
def test_the_split_is_the_one_that_auto_takes(n, name, monkeypatch):
    mode = plan.modes()[name]
    # Hosts of one and of two ranks, a fast and a slow update, rounds from far shorter to far longer than computation.
    clusters = (slow(), slow(hosts=2), replace(slow(latency_s=0.1), backend="nccl"))
    for cluster, update_s, total_s in itertools.product(clusters, (0.0, 0.02), (1.0, 5.0, 9.0, 23.0, 70.0)):
        work = Work(total_s / n, n, update_s)
        driver = _MeasuredRank(plan.figures_of(name, SMALL, cluster, work), n, monkeypatch)
        keys = {"estimate_comm": mode.estimate_comm, "commit_comm": mode.commit_comm}
        settings = Settings(schedule="acco", estimate_fraction="auto", **keys)
        split = AutoFraction(settings, driver, driver.comm, driver.lane)
        for window in range(WINDOWS_TO_MEASURE):
            split.at_window_end(window, n, n, logs=False)
        planned = best_window(SMALL, cluster, work, name=name)
        assert phase_a_micro_batches(n, planned.estimate_fraction) == split.phase_a(n), (cluster, work)
        if mode.is_quantized:
            assert plan.split_of(name, SMALL, cluster, work) == split.phase_a(n)


def test_advice_with_one_rank_and_with_little_memory():
    assert "One rank communicates nothing" in " ".join(advise(SMALL, slow(1), WORK).sentences)
    work = _work_at(0.3)
    need = {name: plan.memory_bytes(name, SMALL, 4) for name in plan.names()}
    without_zero0 = advise(SMALL, slow(memory_bytes=need["acco"]), work)
    assert (without_zero0.name, without_zero0.baseline) == ("acco", "zero1")
    without_acco = advise(SMALL, slow(memory_bytes=need["zero1"]), work)
    assert (without_acco.name, without_acco.baseline) == ("zero1", "zero1")
    assert "ACCO's model states do not fit" in without_acco.sentences[-1]
    few_bits = advise(SMALL, slow(memory_bytes=need["acco-int4-commit8"]), work)
    assert (few_bits.name, few_bits.baseline, few_bits.speedup) == (
        "acco-int4-commit8",
        "zero1",
        pytest.approx(1.45, 0.01),
    )
    assert "do not fit" in few_bits.sentences[1] and "those of acco-int4-commit8 do" in few_bits.sentences[1]
    assert need["zero1"] < need["acco-int4-commit8"] < need["acco"]
    nothing = advise(SMALL, slow(memory_bytes=10.0), work)
    assert (nothing.name, nothing.baseline, nothing.speedup) == (None, None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model(0), "numel = 0 is not allowed; allowed: a whole number"),
        (lambda: Model(7e9), "numel = 7000000000.0 is not allowed"),
        (lambda: Model(5, weight_bytes=1), "weight_bytes = 1"),
        (lambda: Cluster(0, 1.0), "ranks = 0"),
        (lambda: Cluster(2, 0), "bandwidth = 0"),
        (lambda: Cluster(2, 1.0, -1.0), "latency_s = -1.0"),
        (lambda: Cluster(2, 1.0, backend="mpi"), "backend = 'mpi' is not allowed; allowed: nccl or gloo"),
        (lambda: Cluster(6, 1.0, hosts=4), "hosts = 4 .* divides the 6 ranks"),
        (lambda: Cluster(2, 1.0, efficiency=1.1), "efficiency = 1.1"),
        (lambda: Cluster(2, 1.0, memory_bytes=0), "memory_bytes = 0"),
        (lambda: Cluster(2, 1.0, inside_bandwidth=0), "inside_bandwidth = 0"),
        (lambda: Work(0.0, 2), "micro_batch_s = 0.0"),
        (lambda: Work(1.0, 0), "n = 0"),
        (lambda: Work(1.0, 2, -1.0), "update_s_per_parameter = -1.0"),
        (lambda: Work(1.0, 2, estimate_fraction=1.0), "estimate_fraction = 1.0"),
        (lambda: predict("zero4", SMALL, slow(), WORK), "name = 'zero4' .* zero0, zero1,"),
        (lambda: predict("acco", SMALL, slow(), replace(WORK, n=1)), "gradient_accumulation_steps = 1"),
        (lambda: slow(8, hosts=2).with_ranks(12 + 1), "ranks = 13 .* multiples of the 4 ranks of a host, from 8 on"),
        (lambda: slow(8, hosts=2).with_ranks(4), "from 8 on"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the command


ARGUMENTS = ["plan", "--params", "1e7", "--ranks", "2", "--micro-batch-ms", "265", "--n", "8", "--backend", "gloo"]


def test_the_command(tmp_path, capsys):
    report = tmp_path / "plan.json"
    assert main([*ARGUMENTS, "--round-ms", "648", "--bandwidth", "300mbit", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTION, not a measurement")
    # R = 648 ms. 3 of 265 ms in phase B leave the ESTIMATE room, 2 would not hide it: 5 of 8 for the COMMIT.
    setting = '{"schedule": "acco", "estimate_fraction": 0.625}'
    assert f'Use ACCO: {setting}, "gradient_accumulation_steps": 8; 1.31x' in printed
    assert "From the bandwidth alone a round would take 563 ms, -13 % against the measured one." in printed
    written = json.loads(report.read_text())
    modes = ["acco", "acco-int8", "acco-int4", "acco-int4-commit8", "local", "wp", "dpu", "sync"]
    assert [row["name"] for row in written["rows"]] == [*plan.STAGES, *modes]
    assert written["round_s"] == pytest.approx(0.648)
    assert written["cluster"]["memory_bytes"] is None


def test_the_command_says_what_to_set_with_int4(capsys):
    arguments = ["plan", "--params", "1e7", "--ranks", "2", "--micro-batch-ms", "100", "--n", "10"]
    assert main([*arguments, "--round-ms", "700"]) == 0
    printed = capsys.readouterr().out
    # Of 100 ms each: 8 hide the COMMIT of 700, 2 the ESTIMATE of 178; in int8 of 353 it needs 3 or 4, and 7 are room.
    setting = '{"schedule": "acco", "estimate_comm": "int4", "estimate_fraction": 0.8}'
    assert f'Use ACCO: {setting}, "gradient_accumulation_steps": 10; ' in printed
    fractions = "acco 0.5, acco-int8 0.7, acco-int4 0.8, acco-int4-commit8"
    assert re.search(rf"{fractions} 0\.\d \(acco's default, else the best one\)", printed)
    assert main([*arguments, "--round-ms", "700", "--estimate-fraction", "0.3"]) == 0
    assert "acco 0.3, acco-int8 0.3, acco-int4 0.3, acco-int4-commit8 0.3 (as given)" in capsys.readouterr().out


def test_the_command_says_what_to_set_with_one_phase(capsys):
    one = ["plan", "--params", "1e7", "--ranks", "2", "--micro-batch-ms", "500", "--n", "1", "--round-ms", "400"]
    assert main([*one, "--estimate-fraction", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert 'Use ACCO: {"schedule": "local"}, "gradient_accumulation_steps": 1; ' in printed
    assert 'n = 1 has no second phase for acco, so "auto" takes local' in printed
    assert "here is local, at a price" in printed


def test_the_command_says_what_to_set_with_a_quantized_commit(capsys):
    # R = 2 s, C = 1.6 s; the COMMIT takes 0.78 s with changes in 4 bits, 1.03 in 8, the ESTIMATE 0.52.
    arguments = ["plan", "--params", "1e7", "--ranks", "2", "--micro-batch-ms", "200", "--round-ms", "2000"]
    assert main([*arguments, "--n", "8"]) == 0
    printed = capsys.readouterr().out
    keys = '"schedule": "acco", "estimate_comm": "int4", "commit_comm": "int8", "estimate_fraction": 0.625'
    assert f"Use ACCO: {{{keys}}}, " in printed and "stays in the fp32 master" in printed.replace("\n  ", " ")
    assert "would be" not in printed.split('"commit_comm": "int8" hides more')[1], "nothing else hides more"
    assert main([*arguments, "--n", "1"]) == 0
    assert 'Use ACCO: {"schedule": "local", "commit_comm": "int8"}' in capsys.readouterr().out
    assert main([*arguments, "--n", "8", "--also", "sync-commit8", "local-commit8"]) == 0
    firsts = [line.split(" ")[0] for line in capsys.readouterr().out.split("\nsamples/s")[0].splitlines()]
    assert firsts[-6:] == ["local", "local-commit8", "wp", "dpu", "sync", "sync-commit8"]
    with pytest.raises(SystemExit):
        main([*arguments, "--n", "8", "--also", "sync-commit9"])


def test_a_fraction_that_is_printed_gives_the_split_that_was_chosen(capsys):
    # A COMMIT of 22 ms, an ESTIMATE of at most 11.2: phase B needs one micro-batch, however many there are.
    arguments = ["plan", "--params", "1e7", "--ranks", "2", "--micro-batch-ms", "20", "--round-ms", "22"]
    for n, in_b in ((500, 1), (12_345, 1), (10**18, 128)):  # no float below one tells more of 10^18
        assert main([*arguments, "--n", str(n)]) == 0
        listed = re.search(r"acco-int8 (\S+), acco-int4 (\S+),", capsys.readouterr().out)
        settings = [Settings(estimate_fraction=float(fraction)) for fraction in listed.groups()]
        chosen = [n - phase_a_micro_batches(n, given.estimate_fraction) for given in settings]
        assert chosen == [in_b, in_b], n


@pytest.mark.timeout(30)  # tried one by one, the splits would take minutes
@pytest.mark.parametrize("size", ["1000", "997", "1e18"])
def test_a_large_micro_batch_is_planned_at_once(size, capsys):
    assert main([*ARGUMENTS, "--round-ms", "648", "--micro-batch-size", size]) == 0
    assert '"gradient_accumulation_steps": 8; 1.31x' in capsys.readouterr().out


@pytest.mark.parametrize(
    "large", [["--micro-batch-size", "1000"], ["--n", "1e18"], ["--params", "1e18", "--hosts", "1"]]
)
def test_a_plan_takes_less_than_a_second(large, capsys):
    begin = time.process_time()
    assert main([*ARGUMENTS, "--round-ms", "1e12", *large]) == 0
    assert time.process_time() - begin < 1 and not re.search(r"\b(nan|inf)\b", capsys.readouterr().out)


@pytest.mark.parametrize("large", [["--n", "1e19"], ["--params", "9" * 400], ["--micro-batch-ms", "1e31"]])
def test_larger_than_anything_is_refused(large, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*ARGUMENTS, "--round-ms", "648", *large])
    assert stop.value.code == 2 and re.search(r"allowed: .* <= 1e(18|30)", capsys.readouterr().err)


def test_sweep_over_ranks(tmp_path, capsys):
    report = tmp_path / "plan.json"
    arguments = ["plan", "--params", "7e9", "--ranks", "16", "--hosts", "2", "--bandwidth", "100gbit", "--n", "8"]
    assert main([*arguments, "--micro-batch-ms", "700", "--sweep-ranks", "--json", str(report)]) == 0
    assert "PREDICTION over ranks" in capsys.readouterr().out
    rows = json.loads(report.read_text())["sweep"]
    assert [row["ranks"] for row in rows] == [16 * 2**power for power in range(9)]
    assert all(low["round_s"] < high["round_s"] for low, high in zip(rows, rows[1:]))
    alone = Cluster(4096, 100e9 / 8, 10e-6, hosts=512)
    assert rows[-1]["acco"] == pytest.approx(predict("acco", Model(7_000_000_000), alone, Work(0.7, 8)).step_s)
    assert main([*arguments, "--micro-batch-ms", "700", "--sweep-ranks", "24", "20"]) == 2
    assert "ranks = 20 is not allowed; allowed: multiples of the 8 ranks" in capsys.readouterr().err


PACKED = ["plan", "--params", "1.3B", "--ranks", "16", "--hosts", "2", "--bandwidth", "25gbit"]
PACKED += ["--micro-batch-ms", "128"]


def test_the_command_tells_what_a_hosts_link_carries(tmp_path, capsys):
    report = tmp_path / "plan.json"
    written = {}
    for flags in ((), ("--flat",), ("--inside-bandwidth", "10GB/s")):
        assert main([*PACKED, "--n", "8", "--json", str(report), *flags]) == 0
        printed = capsys.readouterr().out
        row = next(line.split() for line in printed.splitlines() if line.startswith("acco "))
        written[flags] = {row["name"]: row for row in json.loads(report.read_text())["rows"]}["acco"]
        assert f"{written[flags]['link_bytes'] / 1e9:.4g}" == row[5] and "link GB" in printed
        assert ("rounds flat" if flags == ("--flat",) else "rounds in two levels") in printed
    levels, flat, slower = written.values()
    assert levels["link_bytes"] == pytest.approx(5.2e9) and flat["link_bytes"] == pytest.approx(9.75e9)
    assert slower["step_s"] - levels["step_s"] == pytest.approx(4 * 2.6e9 * 7 / 8 * (1 / 10e9 - 1 / 100e9))
    assert main([*PACKED[:5], *PACKED[7:], "--n", "8"]) == 0
    assert "link GB" not in capsys.readouterr().out, "a rank's bytes are the host's"


def test_sweep_over_hosts(tmp_path, capsys):
    report = tmp_path / "plan.json"
    assert main([*PACKED, "--n", "8", "--sweep-hosts", "--efficiency", "0.8", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    rows = {
        (row["hosts"], row["ranks_per_host"], row["gbit"]): row for row in json.loads(report.read_text())["sweep_hosts"]
    }
    assert set(rows) == set(itertools.product((2, 4, 8), (1, 2, 4, 8), (1, 10, 25, 100)))
    cluster = Cluster(32, 10e9 / 8, 10e-6, hosts=4, efficiency=0.8)
    row, model, work = rows[4, 8, 10], Model(1_300_000_000), Work(0.128, 8)
    assert row["acco-int4"] == pytest.approx(predict("acco-int4", model, cluster, work).step_s)
    assert row["stage_s"] == min(predict(name, model, cluster, work).step_s for name in plan.STAGES)
    line = next(line.split() for line in printed.splitlines() if line.startswith("4 x 8 "))
    modes = ("acco", "acco-int4", "acco-int4-commit8")
    assert line[7:11] == [f"{row['ratio']:.2g}", *(f"{row['stage_s'] / row[name]:.2f}" for name in modes)]
    measured = [*PACKED[:7], "--round-ms", "900", *PACKED[9:], "--n", "8", "--sweep-hosts", "--json", str(report)]
    assert main(measured) == 0
    rows = json.loads(report.read_text())["sweep_hosts"]
    at_first = plan.round_s(model, Cluster(2, 1e9 / 8, 0.0, hosts=2), work)
    assert rows[0]["round_s"] == pytest.approx(at_first), "by formulas, whatever was measured"
    assert main([*PACKED, "--n", "1", "--sweep-hosts"]) == 2
    assert "--sweep-hosts compares schedules of two phases, and n = 1 has no second" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--ranks", "2"], "give one of --params, --model, --results and --calibrate"),
        (ARGUMENTS, "--bandwidth is missing; or give a measured --round-ms"),
        ([*ARGUMENTS, "--model", "x", "--bandwidth", "1gbit"], "give one of --params, --model"),
        ([*ARGUMENTS, "--bandwidth", "1gbit", "--hosts", "3"], "hosts = 3 is not allowed"),
        ([*ARGUMENTS, "--bandwidth", "1gbit", "--estimate-fraction", "1.5"], "estimate_fraction = 1.5"),
        ([*ARGUMENTS, "--round-ms", "1"], "update and the latencies alone"),
        (
            ["plan", "--results", "no/such.json"],
            "no/such.json is no results.json that can be read: it is no file",
        ),
        (["plan", "--results", "x.json", "--n", "4"], "--n cannot be given with --results"),
        (["plan", "--results", "x.json", "--dtype", "bf16"], "--dtype cannot be given with --results"),
        (
            [*ARGUMENTS, "--bandwidth", "1gbit", "--json", "no/such/plan.json"],
            "--json no/such/plan.json cannot be written",
        ),
        (["plan", "--params", "5", "--ranks", "2", "--n", "2", "--bandwidth", "1gbit"], "--micro-batch-ms is missing"),
    ],
)
def test_arguments_that_are_refused(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("ds_acco plan: ") and message in said


HEADER = {
    "rank": 0,
    "world_size": 2,
    "optimizer": "ACCO",
    "schedule": "sync",
    "stage": 1,
    "numel": 10_000_000,
    "weight_bytes": 2,
    "comm_bytes": 4,
    "n": 8,
    "a": None,
    "micro_batch": 3,
    "samples_per_step": 48,
    "device": "cpu",
}


def test_inputs_from_a_measurement():
    inputs = planning.from_measurement(HEADER, compute_s=2.0, round_s=0.7)
    assert inputs.model == Model(10_000_000, 2, 4, 2)
    assert (inputs.work.n, inputs.work.micro_batch_s, inputs.work.estimate_fraction) == (8, 0.25, None)
    assert (inputs.cluster.ranks, inputs.cluster.backend, inputs.micro_batch_size) == (2, "gloo", 3)
    assert plan.round_s(inputs.model, inputs.cluster, inputs.work) == pytest.approx(0.7)
    # What is not the update moves 2 + 4 bytes for half of the parameters.
    assert inputs.cluster.payload_rate == pytest.approx((6 / 2 * 1e7 + 16) / (0.7 - 1e-9 * 5e6))
    packed = {"hosts": 2, "two_levels": False, "inside_bandwidth": 5e9}
    cluster = planning.from_measurement({**HEADER, "world_size": 4}, 2.0, 0.7, **packed).cluster
    assert (cluster.host_count, cluster.two_levels, cluster.inside_rate) == (2, False, 5e9)
    on_gpu = planning.from_measurement({**HEADER, "device": "cuda", "a": 6}, 2.0, 0.7)
    assert (on_gpu.cluster.backend, on_gpu.work.estimate_fraction) == ("nccl", 0.75)
    with pytest.raises(ValueError, match="header has no numel, device"):
        planning.from_measurement({k: v for k, v in HEADER.items() if k not in ("numel", "device")}, 2.0, 0.7)
    with pytest.raises(ValueError, match="device = 'xpu'"):
        planning.from_measurement({**HEADER, "device": "xpu"}, 2.0, 0.7)


def test_inputs_from_results(tmp_path, capsys):
    results = json.loads((ROOT / "benchmarks/results/compare_real_small.json").read_text()) | {
        "world_size": 2,
        "device": "cpu",
        "n": 8,
        "samples_per_step": 48,
        "model": {"numel": 10_000_000, "weight_bytes": 2, "comm_bytes": 4},
        "reference": {"compute_s": 2.0, "round_s": 0.7, "micro_batch_s": 0.25},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert planning.from_results(path) == planning.from_measurement(HEADER, 2.0, 0.7)
    assert main(["plan", "--results", str(path), "--estimate-fraction", "0.25", "--device-memory", "1GiB"]) == 0
    assert "network from a measured round" in capsys.readouterr().out
    packed = ["--hosts", "2", "--flat", "--inside-bandwidth", "5GB/s", "--json", str(tmp_path / "plan.json")]
    path.write_text(json.dumps(results | {"world_size": 4, "samples_per_step": 96}))
    assert main(["plan", "--results", str(path), *packed]) == 0
    cluster = json.loads((tmp_path / "plan.json").read_text())["cluster"]
    assert (cluster["hosts"], cluster["two_levels"], cluster["inside_bandwidth"]) == (2, False, 5e9)
    for change, message in (
        ({"reference": None}, "has no measured C and R. Run `ds_acco compare` again"),
        ({"reference": {"failed": "no sync"}}, "has no measured C and R: no sync."),
        ({"n": "8"}, "n is '8'; allowed: a whole number"),
        ({"samples_per_step": 7}, "samples_per_step is 7; allowed: multiples of 16, n x world_size"),
        ({"samples_per_step": 0}, "samples_per_step is 0; allowed: multiples of 16"),
        ({"device": "tpu"}, f"plan: --results {path}: device = 'tpu' is not allowed; allowed: cpu, cuda"),
        ({"reference": {"compute_s": -2.0, "round_s": 0.7}}, "reference.compute_s is -2.0; allowed: a number from"),
        ({"reference": {"compute_s": 2.0, "round_s": 1e29}}, "the measured round took 1e+29 s; allowed: up to"),
    ):
        path.write_text(json.dumps(results | change))
        assert main(["plan", "--results", str(path)]) == 2
        assert message in capsys.readouterr().err


# ---- calibration, with a run that is only written


class FakeRun:
    """Stands in for launches.run: two ranks with C = 2 s in 8 micro-batches and R = 0.7 s."""

    def __init__(self):
        self.seen, self.end = [], 0

    def __call__(self, script, arguments, folder, place, watch, environment):
        self.seen.append((script, arguments, folder, place, json.loads(Path(arguments[1]).read_text())))
        (folder / "log.txt").write_text("ValueError: no such thing\n")
        if isinstance(self.end, BaseException):
            raise self.end
        for rank in (0, 1):
            lines = [HEADER | {"rank": rank, "accumulation_bytes": 4, "run": environment[RECORD_RUN]}]
            for number in range(1, 6):
                line = {"step": number, "step_s": 2.75, "inside_s": 0.75, "round_s": 0.7, "exposed_s": 0.7}
                lines.append(line | {"peak_bytes": 1, "looked": False})
            (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.end


@pytest.fixture
def fake_run(monkeypatch, tmp_path):
    run = FakeRun()
    monkeypatch.setattr(launches, "run", run)
    monkeypatch.chdir(tmp_path)
    return run


CALIBRATE = ["plan", "--calibrate", str(ROOT / "ds_configs/acco_adaptive.json"), "--num_accelerators", "2"]


def test_a_calibrated_plan(fake_run, tmp_path, capsys):
    assert main([*CALIBRATE, "--json", "plan.json", "--", "--preset", "tiny"]) == 0
    script, arguments, folder, place, config = fake_run.seen[0]
    assert script == [str(ROOT / "examples/train_gpt.py")] and place.world_size == place.slots == 2
    assert folder == Path("runs/calibrate/runs/reference/1")
    assert arguments[2:] == ["--steps", "20", "--seed", "1", "--out", str(folder.resolve()), "--preset", "tiny"]
    assert config == json.loads((ROOT / "ds_configs/sync.json").read_text()), "the reference"
    written = json.loads(Path("plan.json").read_text())
    expected = planning.from_measurement(HEADER | {"accumulation_bytes": 4}, 2.0, 0.7)
    model, cluster, work = expected.model, expected.cluster, expected.work
    assert written["rows"] == [vars(row) for row in plan.predict_all(model, cluster, work)]
    assert written["model"]["accumulation_bytes"] == 4 and written["round_s"] == pytest.approx(0.7)
    printed = capsys.readouterr()
    assert "network from a measured round;" in printed.out and "[1/1] pass 1 reference" in printed.err
    # The same from its file, without a run; and for more ranks.
    assert main(["plan", "--results", "runs/calibrate/results.json", "--ranks", "8", "--sweep-ranks", "4"]) == 0
    printed = capsys.readouterr()
    assert "measured round of 2 ranks" in printed.out and ", 8 ranks, gloo" in printed.out and len(fake_run.seen) == 1
    at_eight = plan.predict("acco", model, cluster.with_ranks(8), work)
    assert f"{at_eight.step_s:.4g}" in printed.out
    Path("runs/calibrate/report.html").write_text("what ds_acco report makes of it")
    assert main([*CALIBRATE, "--steps", "9"]) == 0
    assert len(fake_run.seen) == 2 and "9" in fake_run.seen[1][1], "it is measured anew"


def test_a_calibration_that_fails_or_is_interrupted(fake_run, tmp_path, capsys):
    fake_run.end = 3
    assert main(CALIBRATE) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("no such thing") == 1
    assert "ds_acco plan: the measured run failed: the launcher ended with exit code 3; the end of runs/" in printed.err
    fake_run.end = KeyboardInterrupt()
    assert main(CALIBRATE) == 130
    printed = capsys.readouterr()
    assert not printed.out and printed.err == "ds_acco plan: interrupted; nothing was measured\n"
    assert not Path("runs/calibrate/results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "4"], "--n cannot be given with --calibrate, which has it"),
        (["--results", "x.json"], "--results cannot be given with --calibrate"),
        (["--params", "5"], "--params cannot be given with --calibrate"),
        (["--hosts", "2"], "--hosts and --rate belong together"),
        (["--num_accelerators", "1"], "--calibrate with one rank measures no communication"),
        (["--emulate-compute", "5", "--", "--preset", "tiny"], "trains a model of its own"),
        (["--out", "mine"], "--out mine is not empty and holds no comparison"),
        (["--calibrate", "no.json"], "CONFIG no.json is not a file"),
    ],
)
def test_calibrations_that_are_refused(fake_run, tmp_path, capsys, arguments, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert main([*CALIBRATE, *arguments]) == 2
    assert message in capsys.readouterr().err and not fake_run.seen
    assert (tmp_path / "mine/thesis.txt").exists()


@pytest.mark.parametrize("arguments", [["--script", "x.py"], ["--rate", "1gbit"], ["--", "--preset", "tiny"]])
def test_what_only_a_calibration_takes(capsys, arguments):
    assert main(["plan", "--params", "5", *arguments]) == 2
    assert "needs --calibrate CONFIG" in capsys.readouterr().err


def test_counting_a_transformers_config(tmp_path):
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config))
    block = 2 * 16 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    expected = 50 * 8 + 16 * 8 + 2 * block + 16  # the head is tied to the embedding
    assert planning.count_parameters(str(tmp_path)) == expected
    assert planning.count_parameters(str(tmp_path / "config.json")) == expected
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ValueError, match="gives no model: .*nonesuch.* or give --params"):
        planning.count_parameters(str(tmp_path / "config.json"))
