# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What only a device has in the runtime: the stream lane's order, values that the host learns later, NCCL."""

import logging
import time

import pytest
import torch

from deepspeed_acco.runtime.clock import HostValue, Instant
from deepspeed_acco.runtime.lanes import RoundFailed, make_lane
from deepspeed_acco.runtime.overdue import Overdue

pytestmark = pytest.mark.gpu

CYCLES = 50_000_000  # some 25 ms on the device
NUMEL = 2**20


@pytest.fixture
def lane():
    made = make_lane("auto", torch.device("cuda", torch.cuda.current_device()))
    yield made
    made.close()


@pytest.fixture
def no_waiting():
    """Makes every wait of the host for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_order_of_both_streams(native, lane, no_waiting):
    """Behind sleeps on either side: a round reads what training wrote before it, and training what the round wrote."""
    a, b, c = (torch.zeros(NUMEL, device="cuda") for _ in range(3))

    def round_():
        torch.cuda._sleep(CYCLES)
        b.copy_(a).add_(1.0)
        torch.cuda._sleep(CYCLES)
        b.mul_(3.0)
        return "result"

    round_()  # a kernel's first launch loads it, and waits for the device
    torch.cuda._sleep(CYCLES)
    a.fill_(1.0)
    lane.start(round_, "COMMIT 0")
    beside = torch.cuda.current_stream().record_event()
    assert not lane.is_finished() and not beside.query(), "nobody waited"
    assert lane.finish() == "result"
    c.copy_(b)
    assert not torch.cuda.current_stream().query(), "the host waited for the device"
    torch.cuda.set_sync_debug_mode("default")
    assert c.eq(6.0).all() and lane.is_finished()
    times = lane.times()
    assert times.rounds == 1 and 0.01 < times.exposed_s < times.round_s + 1e-4, "all of it was waited for"


def test_training_goes_on_while_the_round_runs(native, lane):
    lane.start(lambda: torch.cuda._sleep(4 * CYCLES), "COMMIT 0")
    torch.cuda._sleep(100_000)
    torch.cuda.current_stream().synchronize()
    assert not lane.is_finished(), "training's stream was empty before the round had ended"
    lane.finish()
    torch.cuda.synchronize()
    lane.start(lambda: None, "COMMIT 1")
    lane.finish()
    assert lane.times().hidden_share < 1.0


def test_a_round_that_another_stream_has_finished_is_ordered_for_this_one(native, lane):
    value, read = torch.zeros(NUMEL, device="cuda"), torch.zeros(NUMEL, device="cuda")

    def round_():
        torch.cuda._sleep(4 * CYCLES)
        value.fill_(2.0)

    lane.start(round_, "COMMIT 0")
    with torch.cuda.stream(torch.cuda.Stream()):
        lane.finish()
    lane.order()
    read.copy_(value)
    assert read.eq(2.0).all()


def test_a_round_that_raises_while_it_is_enqueued(native, lane):
    with pytest.raises(RoundFailed, match="no such thing"):
        lane.start(lambda: (_ for _ in ()).throw(ValueError("no such thing")), "COMMIT 0")
    with pytest.raises(RoundFailed, match="no such thing"):
        lane.finish()


def test_the_host_stays_one_micro_batch_behind(native, lane):
    lane.pace(decides=False)
    torch.cuda._sleep(4 * CYCLES)
    begin = time.perf_counter()
    lane.pace(decides=False)
    assert time.perf_counter() - begin < 0.01, "the one before has passed"
    lane.pace(decides=False)
    assert time.perf_counter() - begin > 0.02


def test_a_value_is_known_later_and_never_waited_for(native, no_waiting):
    value = torch.zeros(3, dtype=torch.float64, device="cuda")
    begin = Instant(value.device)
    torch.cuda._sleep(CYCLES)
    value += torch.arange(3, device="cuda")
    later, end = HostValue(value), Instant(value.device)
    assert not later.is_known() and not end.is_known()
    assert later.tensor().device.type == "cuda"
    torch.cuda.set_sync_debug_mode("default")
    later.wait()
    end.wait()
    assert later.is_known() and later.value() == [0.0, 1.0, 2.0] and later.tensor().device.type == "cpu"
    assert 0.005 < end.seconds_since(begin) < 1.0


class _Nowhere:
    def of_others(self):
        return "Last seen: rank 1 at the start. "


def test_a_round_that_takes_too_long_is_named(native, lane, caplog):
    logging.getLogger("deepspeed_acco").addHandler(caplog.handler)
    watch = Overdue(0, 2, 0.25, _Nowhere())
    lane.start(lambda: torch.cuda._sleep(40 * CYCLES), "COMMIT 7")
    watch.expect("COMMIT of window 7", lane.is_finished)
    torch.cuda.synchronize()
    lane.finish()
    watch.close()
    logging.getLogger("deepspeed_acco").removeHandler(caplog.handler)
    (line,) = set(caplog.messages)  # the logger may pass on what it was given
    assert line.startswith("ACCO: COMMIT of window 7 has not finished on rank 0 of 2 0.2 s after it was started")
    assert "rank 1 at the start" in line


# ---- NCCL


def _communicator(parallel_group=None, timeout_s=60):
    from deepspeed_acco.runtime.communicator import Communicator

    return Communicator(parallel_group, torch.device("cuda", torch.cuda.current_device()), timeout_s)


def _integers(numel, world_size, rank):
    return ((torch.arange(numel * world_size) * (rank + 3)) % 17 - 8).float()


def _reduce_and_gather(numels, dtype_name, bits, hosts):
    """Small integers, which every dtype holds exactly; in bits a level is one, so that records are exact, too."""
    import torch.distributed as dist

    from deepspeed_acco.optim import ops
    from deepspeed_acco.runtime.encoding import Encoding
    from deepspeed_acco.runtime.levels import Levels

    comm, dtype = _communicator(), getattr(torch, dtype_name)
    if hosts is not None:
        comm.use_levels(Levels(hosts))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    encoding, is_message = Encoding(dtype, bits), bool(bits) and comm.levels.is_flat
    arenas, totals, expected = [], [], []
    for numel in numels:
        limit = {4: 7, 8: 127}.get(bits, 8)  # at the ends, so that the scale is 1
        shards = [_integers(numel, world_size, r).clamp(-limit, limit) for r in range(world_size)]
        for flat in shards if bits else ():
            flat[:: min(numel, 64)] = limit
        for flat in shards[1:] if bits and not is_message else ():
            flat.zero_()  # a host's sum goes in bits, and must not be larger than one rank's values
        stride = encoding.message_stride(numel)
        size = (2 if is_message else 1) * world_size * max(stride, numel * dtype.itemsize)
        arena = torch.zeros(-(-size // 16) * 16, dtype=torch.uint8, device="cuda")
        placed = sorted(range(world_size), key=comm.levels.place)
        for place, of in enumerate(placed):
            values = shards[rank].split(numel)[of].cuda()
            if is_message:
                ops.quantize(values, encoding.message_in(arena[place * stride :], numel), bits, 1.0)
            else:
                arena.view(dtype)[place * numel :][:numel] = values.to(dtype)
        arenas.append(arena)
        totals.append(torch.full((numel,), -1.0, device="cuda"))
        expected.append(sum(flat.split(numel)[rank] for flat in shards))
    for total, sum_ in zip(comm.reduce_scatter_sum(arenas, totals, encoding), expected):
        assert total.cpu().float().equal(sum_)
    gathered = [torch.full((numel * world_size,), -1.0, dtype=dtype, device="cuda") for numel in numels]
    for tensor, numel in zip(gathered, numels):
        tensor[comm.levels.place(rank) * numel :][:numel] = rank + 1
    comm.all_gather(gathered)
    for tensor, numel in zip(gathered, numels):
        for of in range(world_size):
            assert tensor[comm.levels.place(of) * numel :][:numel].eq(of + 1).all()
    small = torch.tensor([1.0 + rank, 2.0], dtype=torch.float64, device="cuda")
    comm.all_reduce_sum(small)
    assert small.tolist() == [sum(range(1, world_size + 1)), 2.0 * world_size]
    assert comm.gather_objects({"rank": rank}) == [{"rank": r} for r in range(world_size)]
    comm.barrier()
    comm.destroy()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_reduce_and_gather(gpu_ranks, world_size, dtype, bits):
    gpu_ranks(world_size).run(_reduce_and_gather, numels=[300, 1, 4096], dtype_name=dtype, bits=bits, hosts=None)


@pytest.mark.parametrize("hosts", [((0, 1),), ((0,), (1,))])
@pytest.mark.parametrize("bits", [0, 4])
def test_levels_over_nccl(gpu_ranks, hosts, bits):
    gpu_ranks(2).run(_reduce_and_gather, numels=[300, 4096], dtype_name="bfloat16", bits=bits, hosts=hosts)


def _groups_of_one():
    """Each rank alone makes a communicator of its own group; the second rank a while later, and then one of all."""
    import torch.distributed as dist

    rank = dist.get_rank()
    own = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    time.sleep(2.0 * rank)
    alone = _communicator(own)
    assert alone.world_size == 1
    value = torch.full((3,), 2.0 + rank, device="cuda")
    begin = time.monotonic()
    alone.all_reduce_sum(value)
    torch.cuda.synchronize()
    assert value.eq(2.0 + rank).all() and time.monotonic() - begin < 1.5
    together = _communicator()
    together.all_reduce_sum(value)
    assert value.eq(5.0).all()
    alone.destroy()
    together.destroy()


def test_a_group_over_part_of_the_ranks_needs_no_others(gpu_ranks):
    gpu_ranks(2).run(_groups_of_one)
