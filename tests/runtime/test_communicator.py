"""The collectives on gloo, without DeepSpeed: values, pieces, bytes on the wire."""

import itertools
import os
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(200)


def loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise RuntimeError("no loopback interface")


def _communicator(timeout_s=60, hosts=None):
    """``hosts``: the ranks of each; None: one level."""
    import torch

    from deepspeed_acco.runtime.communicator import Communicator
    from deepspeed_acco.runtime.levels import Levels

    comm = Communicator(None, torch.device("cpu"), timeout_s)
    if hosts is not None:
        comm.use_levels(Levels(hosts))
    return comm


@contextmanager
def _mover(moves_by, comm):
    """``comm`` itself, or what runs on NCCL, on gloo: few large collectives, with a group for each level."""
    import torch.distributed as dist

    from deepspeed_acco.runtime.collectives import Collectives

    if moves_by == "messages":
        yield comm
        return
    levels, rank = comm.levels, comm.rank
    rows, columns = ({of(each) for each in range(comm.world_size)} for of in (levels.row, levels.column))
    groups = {ranks: dist.new_group(list(ranks), backend="gloo") for ranks in sorted(rows | columns)}
    yield Collectives(groups[levels.row(rank)], groups[levels.column(rank)], rank, levels)
    for group in groups.values():
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)  # else its threads wake 100 times a second for ever


@contextmanager
def small_staging(staging_bytes, gather_piece_bytes=None):
    """Exchanges in small pieces, on a rank."""
    from deepspeed_acco.runtime import messages

    with (
        mock.patch.object(messages, "STAGING_BYTES", staging_bytes or messages.STAGING_BYTES),
        mock.patch.object(messages, "SMALLEST_GATHER_PIECE", gather_piece_bytes or messages.SMALLEST_GATHER_PIECE),
    ):
        yield


def _by_place(shards, levels):
    """The shards in the order of their places; ``shards`` are in that of the ranks."""
    import torch

    placed = sorted(range(len(shards)), key=levels.place)
    return torch.cat([shards[rank] for rank in placed])


def _reduce_scatter_and_gather(numels, dtype_name, staging_bytes, hosts, moves_by):
    """Integers that every dtype holds exactly, also their sums inside a host, so that the sum must be exact."""
    import torch
    import torch.distributed as dist

    from deepspeed_acco.runtime.encoding import Encoding

    comm = _communicator(hosts=hosts)
    rank, world, levels = dist.get_rank(), dist.get_world_size(), comm.levels
    dtype = getattr(torch, dtype_name)
    with small_staging(staging_bytes, gather_piece_bytes=staging_bytes), _mover(moves_by, comm) as moves:
        for _ in range(2):
            arenas, expected, totals = [], [], []
            for numel in numels:
                parts = [((torch.arange(numel * world) * (r + 3)) % 17 - 8).split(numel) for r in range(world)]
                arenas.append(_by_place(parts[rank], levels).to(dtype).view(torch.uint8))
                expected.append(sum(part[rank] for part in parts).float())
                totals.append(torch.full((numel,), -1.0))
            sums = moves.reduce_scatter_sum(arenas, totals, Encoding(dtype))
            assert all(got.float().equal(want) for got, want in zip(sums, expected))
        gathered = [torch.full((numel * world,), -1.0, dtype=dtype) for numel in numels]
        for tensor, numel in zip(gathered, numels):
            tensor[levels.place(rank) * numel :][:numel] = rank + 1
        moves.all_gather(gathered)
        for tensor, numel in zip(gathered, numels):
            ranks_of_shards = [torch.full((numel,), float(r + 1), dtype=dtype) for r in range(world)]
            assert tensor.equal(_by_place(ranks_of_shards, levels))
    comm.destroy()
    comm.destroy()


def _hosts(*sizes):
    """Consecutive ranks on hosts of these sizes."""
    firsts = itertools.accumulate(sizes, initial=0)
    return tuple(tuple(range(first, first + size)) for first, size in zip(firsts, sizes))


HOSTS = {
    "1": _hosts(1),
    "1+1": _hosts(1, 1),
    "1+1+1": _hosts(1, 1, 1),
    "1+1+1+1": _hosts(1, 1, 1, 1),
    "2+2": _hosts(2, 2),
    "3": _hosts(3),
    "interleaved": ((0, 3), (1, 2)),
    "2+2+2": _hosts(2, 2, 2),
    "3+3": _hosts(3, 3),
}


def _run_both_ways(ranks, function, hosts, **arguments):
    for moves_by in ("messages", "collectives"):
        ranks(sum(map(len, hosts))).run(function, hosts=hosts, moves_by=moves_by, **arguments)


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize(
    ("numels", "staging_bytes", "dtype"),
    [
        ([1], 2**20, "float16"),
        ([7, 1, 300], 250, "float32"),
        ([1000], 2**20, "bfloat16"),
        ([5, 4096], 1000, "bfloat16"),
    ],
)
def test_values(ranks, hosts, numels, staging_bytes, dtype):
    arguments = dict(numels=numels, dtype_name=dtype, staging_bytes=staging_bytes)
    _run_both_ways(ranks, _reduce_scatter_and_gather, HOSTS[hosts], **arguments)


def _quantized_sum(numels, bits, staging_bytes, hosts, moves_by):
    """Every rank's gradients differ; the sum must be that of the quantized sums of the hosts, bit for bit."""
    import torch
    import torch.distributed as dist

    from deepspeed_acco.optim.quantization import dequantize_sum, message_bytes, quantize
    from deepspeed_acco.runtime.encoding import Encoding

    comm = _communicator(hosts=hosts)
    rank, world, levels = dist.get_rank(), dist.get_world_size(), comm.levels
    encoding = Encoding(torch.bfloat16, bits)
    arenas, expected, totals = [], [], []

    def message_of(values):
        message = torch.empty(message_bytes(values.numel(), bits), dtype=torch.uint8)
        quantize(values, message, bits)
        return message

    for group, numel in enumerate(numels):
        generator = torch.Generator().manual_seed(group)
        # Integers, so that the sum inside a host is exact in bfloat16 in whatever order it is taken.
        gradients = torch.randint(-40, 40, (world, world, numel), generator=generator).bfloat16()  # of rank, for rank
        if levels.is_flat:
            stride = encoding.message_stride(numel)
            arena = torch.zeros(2 * world * stride, dtype=torch.uint8)  # room for what arrives
            for receiver in range(world):
                message = message_of(gradients[rank, receiver])
                arena[receiver * stride :][: message.numel()] = message
            arenas.append(arena)
        else:
            arenas.append(_by_place(list(gradients[rank]), levels).view(torch.uint8))
        of_hosts = [gradients[list(ranks), rank].float().sum(0) for ranks in levels.hosts]
        expected.append(torch.empty(numel))
        dequantize_sum([message_of(values) for values in of_hosts], expected[-1], bits)
        totals.append(torch.full((numel,), -1.0))
    with small_staging(staging_bytes), _mover(moves_by, comm) as moves:
        moves.reduce_scatter_sum(arenas, totals, encoding)
    assert all(got.equal(want) for got, want in zip(totals, expected))
    comm.destroy()


@pytest.mark.parametrize("hosts", ["1", "1+1+1", "2+2", "3", "interleaved", "2+2+2"])
@pytest.mark.parametrize(
    ("numels", "bits", "staging_bytes"), [([3], 8, 2**20), ([5000, 256, 4097], 4, 2500), ([6000], 8, 2**20)]
)
def test_quantized_sums(ranks, hosts, numels, bits, staging_bytes):
    arguments = dict(numels=numels, bits=bits, staging_bytes=staging_bytes)
    _run_both_ways(ranks, _quantized_sum, HOSTS[hosts], **arguments)


def _compact_sum(moves_by, hosts, numels, bits, inner_bits, staging_bytes, pieces):
    """Sums where records leave from a buffer that has room for nothing else, also inside a host."""
    import torch
    import torch.distributed as dist

    from deepspeed_acco.optim.quantization import dequantize_sum, message_bytes, quantize
    from deepspeed_acco.runtime import collectives
    from deepspeed_acco.runtime.encoding import Encoding

    comm = _communicator(hosts=hosts)
    rank, world, levels = dist.get_rank(), dist.get_world_size(), comm.levels
    encoding = Encoding(torch.bfloat16, bits, inner_bits)
    first = encoding if levels.is_flat else encoding.inner
    arenas, expected, totals = [], [], []

    def message_of(values, bits):
        message = torch.empty(message_bytes(values.numel(), bits), dtype=torch.uint8)
        quantize(values, message, bits)
        return message

    def value_of(messages, numel, bits):
        value = torch.empty(numel)
        dequantize_sum(messages, value, bits)
        return value

    for group, numel in enumerate(numels):
        generator = torch.Generator().manual_seed(group)
        gradients = torch.randn(world, world, numel, generator=generator)  # of rank, for rank
        stride = first.message_stride(numel)
        arena = torch.zeros(world * stride, dtype=torch.uint8)
        for receiver in range(world):
            message = message_of(gradients[rank, receiver], first.bits)
            arena[levels.place(receiver) * stride :][: message.numel()] = message
        arenas.append(arena)
        of_hosts = []
        for ranks in levels.hosts:
            messages = [message_of(gradients[of, rank], first.bits) for of in ranks]
            if not levels.is_flat:
                messages = [message_of(value_of(messages, numel, first.bits), bits)]
            of_hosts += messages
        expected.append(value_of(of_hosts, numel, bits))
        totals.append(torch.full((numel,), -1.0))
    with small_staging(staging_bytes), _mover(moves_by, comm) as moves:
        with mock.patch.multiple(collectives, PIECES=pieces, SMALLEST_PIECE=2048):
            moves.reduce_scatter_sum(arenas, totals, encoding)
    assert all(got.equal(want) for got, want in zip(totals, expected))
    needed = 0
    for numel in numels:
        inside = (levels.ranks_per_host - 1) * levels.host_count * message_bytes(numel, first.bits)
        needed += inside + (levels.host_count - 1) * message_bytes(numel, bits)
    assert needed <= moves.sent_bytes <= needed + 16 * world * len(numels)
    comm.destroy()


@pytest.mark.parametrize("hosts", ["1", "1+1+1", "2+2", "interleaved", "2+2+2"])
@pytest.mark.parametrize(
    ("numels", "bits", "staging_bytes"), [([3], 8, 2**20), ([5001, 256, 4097], 4, 2500), ([9000], 8, 2500)]
)
def test_quantized_sums_that_leave_no_room(ranks, hosts, numels, bits, staging_bytes):
    arguments = dict(numels=numels, bits=bits, inner_bits=8, staging_bytes=staging_bytes, pieces=3)
    _run_both_ways(ranks, _compact_sum, HOSTS[hosts], **arguments)


def _sums_of_two_groups(members):
    """Tensor parallelism: every second rank is of one data-parallel group, and each group has its own two levels."""
    import torch
    import torch.distributed as dist

    from deepspeed_acco.engine.hosts import agree_on_levels
    from deepspeed_acco.runtime.communicator import Communicator
    from deepspeed_acco.runtime.encoding import Encoding

    groups = [dist.new_group(list(ranks), backend="gloo") for ranks in members]
    mine = next(index for index, ranks in enumerate(members) if dist.get_rank() in ranks)
    with mock.patch.dict(os.environ, {"CROSS_RANK": str(dist.get_rank() // 4)}):
        comm = Communicator(groups[mine], torch.device("cpu"), 60)
        levels = agree_on_levels(comm, "auto")
    comm.use_levels(levels)
    shards = [torch.full((50,), float(10 * comm.rank + of + mine)) for of in range(4)]
    total = torch.empty(50)
    comm.reduce_scatter_sum([_by_place(shards, levels).view(torch.uint8)], [total], Encoding(torch.float32))
    gathered = torch.zeros(200)
    gathered[50 * levels.place(comm.rank) :][:50] = total
    comm.all_gather([gathered])
    comm.destroy()
    dist.destroy_process_group(groups[mine])
    expected = [torch.full((50,), 60.0 + 4 * (of + mine)) for of in range(4)]
    assert gathered.equal(_by_place(expected, levels))
    return str(levels)


def test_every_data_parallel_group_has_its_own_levels(ranks):
    members = ((0, 2, 4, 6), (1, 3, 5, 7))
    for _ in range(2):  # the second engine's groups have the names of the first one's
        assert ranks(8).run(_sums_of_two_groups, members=members) == ["2 hosts x 2 ranks"] * 8


def _messages_sent(hosts, numel):
    """Counts the messages of a reduce-scatter and of an all-gather where nothing is cut."""
    import torch
    import torch.distributed as dist

    from deepspeed_acco.runtime.encoding import Encoding

    comm, sends, counts = _communicator(hosts=hosts), [], []
    whole = torch.zeros(numel * dist.get_world_size(), dtype=torch.bfloat16)

    def send(tensor, to, group, tag):
        sends.append(to)
        return original(tensor, to, group, tag)

    original = dist.isend
    with mock.patch.object(dist, "isend", send):
        for collective, arguments in (
            (comm.reduce_scatter_sum, ([whole.view(torch.uint8)], [torch.empty(numel)], Encoding(whole.dtype))),
            (comm.all_gather, ([whole],)),
        ):
            collective(*arguments)
            counts.append(len(sends))
            sends.clear()
    sent_bytes = comm.sent_bytes
    comm.destroy()
    return counts, sent_bytes


@pytest.mark.parametrize(("hosts", "k"), [("1+1+1", 1), ("2+2", 2), ("2+2+2", 2), ("3+3", 3)])
def test_few_messages(ranks, hosts, k):
    h, numel = len(HOSTS[hosts]), 1000
    for counts, sent_bytes in ranks(h * k).run(_messages_sent, hosts=HOSTS[hosts], numel=numel):
        # Gathering passes on what arrives, so that a rank sends each neighbor one message from each host.
        assert counts == [(k - 1) + (h - 1), (k - 1) * h + (h - 1)]
        assert sent_bytes == 2 * 2 * numel * ((k - 1) * h + (h - 1))


def _broken_sum():
    import torch
    import torch.distributed as dist

    from deepspeed_acco.runtime.encoding import Encoding

    comm = _communicator()

    def broken(self, messages, total):
        raise RuntimeError("no such kernel")

    with (
        mock.patch.object(Encoding, "add_up", broken),
        pytest.raises(RuntimeError, match="^no such kernel$"),
    ):
        arena = torch.zeros(16 * dist.get_world_size(), dtype=torch.uint8)
        comm.reduce_scatter_sum([arena], [torch.empty(4)], Encoding(torch.float32))
    comm.destroy()


def test_an_error_in_what_takes_the_pieces_is_not_called_a_timeout(ranks):
    ranks(2).run(_broken_sum)


def _gather_that_one_rank_leaves_out():
    import torch
    import torch.distributed as dist

    from deepspeed_acco.runtime.failures import CommFailed

    comm = _communicator(timeout_s=2)
    if dist.get_rank() == 0:
        with pytest.raises(CommFailed, match="all_gather failed on rank 0 of 3.*comm_timeout_s = 2 s"):
            comm.all_gather([torch.zeros(3 * 2**20)])
    dist.barrier()  # the others are there all the time, and do not gather
    comm.destroy()


@pytest.mark.distributed
def test_a_gather_does_not_wait_for_ever():
    pool = RankPool(3)
    try:
        pool.run(_gather_that_one_rank_leaves_out)
    finally:
        pool.close()


def _bytes_moved(numel):
    import torch
    import torch.distributed as dist

    from deepspeed_acco.runtime.encoding import Encoding

    comm = _communicator()
    whole = [torch.ones(numel)]
    shard = [torch.empty(numel // dist.get_world_size())]
    gloo = dist.new_group(backend="gloo")
    moved = {}
    for name in ("ours", "gloo"):
        dist.barrier()
        begin = loopback_bytes()
        dist.barrier()  # no rank sends before all have read the counter
        for _ in range(3):
            if name == "ours":
                comm.reduce_scatter_sum([whole[0].view(torch.uint8)], shard, Encoding(torch.float32))
            else:
                scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
                scatter(shard[0], whole[0], group=gloo)
        dist.barrier()
        moved[name] = loopback_bytes() - begin
        dist.barrier()
    comm.destroy()
    dist.destroy_process_group(gloo)
    return moved


@pytest.mark.parametrize("world_size", [2, 4])
def test_half_the_bytes_of_gloos_own_reduce_scatter(ranks, world_size, capsys):
    numel = 2**22
    moved = ranks(world_size).run(_bytes_moved, numel=numel)[0]
    with capsys.disabled():
        print(f"\n{world_size} ranks, bytes on the loopback interface: {moved}")
    needed = 3 * 4 * numel * (world_size - 1)  # every rank sends each other its shard
    assert needed < moved["ours"] < 1.1 * needed  # acknowledgements vary
    assert moved["ours"] < 0.55 * moved["gloo"]


def _own_bytes(config, world_sizes=None):
    from tests.support import training

    engine = training.start_engine(config)
    optimizer = engine.optimizer
    weights = sum(flat.nbytes for flat in optimizer.bit16_groups_flat)
    masters = optimizer.single_partition_of_fp32_groups
    moments = [optimizer.optimizer.state[master][key] for master in masters for key in ("exp_avg", "exp_avg_sq")]
    state = sum(tensor.nbytes for tensor in (*masters, *moments))
    padded = sum(flat.numel() for flat in optimizer.bit16_groups_flat)
    total = weights + state + optimizer.own_bytes()
    engine.destroy()
    return total, padded


@pytest.mark.parametrize(
    ("precision", "wire", "w", "g", "c"),
    [("fp32", None, 4, 4, 4), ("bf16", None, 2, 2, 2), ("bf16+fp32", None, 2, 4, 2), ("bf16", "fp32", 2, 2, 4)],
)
@pytest.mark.parametrize("estimate_comm", ["full", pytest.param("int8", marks=pytest.mark.full)])  # no own buffer
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_storages_stay_within_the_formula(ranks, precision, wire, w, g, c, world_size, estimate_comm):
    from tests.support import training

    config = training.ds_config(4, precision=precision, estimate_comm=estimate_comm)
    config |= {"communication_data_type": wire} if wire else {}
    for total, padded in ranks(world_size).run(_own_bytes, config=config):
        allowed = (w + g + max(c, w) + 16 / world_size) * padded
        assert allowed - 1 <= total <= allowed + 64, "the alignment of the flat buffer may add some bytes"


@pytest.mark.parametrize(
    ("schedule", "precision", "w", "g"),
    [
        ("acco", "bf16", 2, 2),
        ("local", "bf16", 2, 2),
        ("sync", "fp32", 4, 4),
        ("acco", "bf16+fp32", 2, 4),
    ],
)
@pytest.mark.parametrize(("world_size", "k"), [(2, 1), (4, 2)])
def test_storages_with_a_quantized_commit(ranks, schedule, precision, w, g, world_size, k):
    """The buffer has room for records alone; on top come what all ranks hold of a shard and, with ``local``, the true
    weights and the roots."""
    from deepspeed_acco.algorithm.schedules import SCHEDULES
    from deepspeed_acco.algorithm.wire import COMMIT_COMMS
    from deepspeed_acco.tools.plan import model as plan
    from tests.support import training

    estimate = {"estimate_comm": "int4"} if schedule == "acco" else {}
    config = training.ds_config(
        4, precision=precision, schedule=schedule, ranks_per_host=k, commit_comm="int8", **estimate
    )
    bits = COMMIT_COMMS["int8"]
    codes = max(bits.gradient, bits.change) / 8 + 2 / 256
    before = (w + 4 / 256) * (schedule == "local")
    for total, padded in ranks(world_size).run(_own_bytes, config=config):
        allowed = (w + g + codes + before + (16 + w) / world_size) * padded
        print(total - allowed, padded)
        rests = world_size * (16 + 2 + 4 * (schedule == "local"))  # each shard's last record and root, and alignment
        assert allowed - 1 <= total <= allowed + rests
        name = plan.Mode(SCHEDULES[schedule], **estimate, commit_comm="int8").name
        planned = plan.memory_bytes(name, plan.Model(padded, w, w, g), world_size)
        assert planned == pytest.approx(allowed, abs=20), "what the plan says"


@pytest.mark.parametrize("world_size", [1, 2])
def test_local_holds_the_weights_once_more_and_the_roots(ranks, world_size):
    from tests.support import training

    configs = [training.ds_config(1, precision="bf16", schedule=schedule) for schedule in ("local", "wp")]
    (local, padded), (wp, _) = (ranks(world_size).run(_own_bytes, config=config)[0] for config in configs)
    roots = world_size * -(-padded // world_size // 256)
    assert local - wp == 2 * padded + 4 * roots


def _wait_for_a_late_rank(debug):
    """Rank 1 comes to the first barrier two seconds late and to the second never; returns rank 0's last wait."""
    from datetime import timedelta

    import torch.distributed as dist

    from deepspeed_acco.runtime.waits import at_most

    dist.set_debug_level(getattr(dist.DebugLevel, debug))
    first, second = (dist.new_group(timeout=timedelta(seconds=20)) for _ in range(2))
    with at_most(1, [first, second]):
        dist.barrier(first)
    if dist.get_rank() == 1:
        time.sleep(2)
    dist.barrier(first)
    begin = time.monotonic()
    if dist.get_rank() == 0 and debug == "OFF":
        with pytest.raises(RuntimeError), at_most(1, [second]):
            dist.barrier(second)
    return time.monotonic() - begin


@pytest.mark.distributed
@pytest.mark.parametrize("debug", ["OFF", "DETAIL"])
def test_a_bounded_wait_leaves_the_groups_own_timeout(debug):
    """With DETAIL torch puts checks around every group, whose timeout cannot be set."""
    pool = RankPool(2)
    try:
        assert pool.run(_wait_for_a_late_rank, debug=debug)[0] < 10
    finally:
        for process in pool.processes:
            process.kill()
        pool.close()
