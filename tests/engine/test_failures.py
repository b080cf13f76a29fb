"""Ranks that die or hang, rounds that fail, scripts that just end: an error that says so, and never a hang."""

import os
import re
import signal
import time

import pytest

from deepspeed_acco.runtime.communicator import Communicator
from deepspeed_acco.runtime.encoding import Encoding
from tests.support import faults, training
from tests.support.launcher import launch
from tests.support.ranks import RankError, RankPool

pytestmark = pytest.mark.timeout(240)
TIMEOUT_S = 3


def _train_until(config, moment, victim, action, windows=4):
    """Trains; at ``moment`` the victim kills or stops itself. Returns how long the others waited for their error."""
    import torch.distributed as dist

    from deepspeed_acco.runtime.failures import CommFailed
    from deepspeed_acco.runtime.lanes import RoundFailed
    from deepspeed_acco.runtime.round import RoundWork

    window_of_death, place = moment
    is_victim = dist.get_rank() == victim

    def act():
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)

    engine = training.start_engine(config)
    if is_victim and place.startswith("in "):
        wanted = {"in COMMIT": True, "in ESTIMATE": False}[place]
        doomed = []

        def watched_run(run, _, this, *arguments):
            doomed[:] = [this.writes_state == wanted and engine.global_steps >= window_of_death]
            return run(this, *arguments)

        def deadly_gather(gather, _, *arguments, **options):
            if doomed == [True]:
                act()
            return gather(*arguments, **options)

        faults.from_now_on(RoundWork, "run", watched_run)
        faults.from_now_on(Communicator, "all_gather", deadly_gather)
    if is_victim and place in PLACES_OF_LEVELS:

        def deadly(original, _, *arguments, **options):
            if engine.global_steps >= window_of_death:
                act()
            return original(*arguments, **options)

        faults.from_now_on(*PLACES_OF_LEVELS[place], deadly)
    last_sign = time.monotonic()
    try:
        for window in range(windows):
            for micro_batch in range(4):
                loss = engine(*training.batch(dist.get_rank(), window, micro_batch))
                if is_victim and window == window_of_death and place == f"after forward {micro_batch}":
                    act()
                engine.backward(loss)
                if is_victim and window == window_of_death and place == f"after backward {micro_batch}":
                    act()
                engine.step()
                last_sign = time.monotonic()
        training.true_master_weights(engine)
    except (RoundFailed, CommFailed) as error:
        waited = time.monotonic() - last_sign
        for window in range(2):  # never lost, never a hang: the next wait says it again
            try:
                for micro_batch in range(8):
                    engine.backward(engine(*training.batch(0, window, micro_batch)))
                    engine.step()
                return "the error was lost", waited
            except RuntimeError as second:
                if "another rank has ended" not in str(second):
                    return f"a different error later: {second}", waited
        return str(error), waited
    return "no error", 0.0


def check_survivors(world_size, config, place, action):
    """Rank 1 is gone in window 2; all others must say so in time."""
    pool = RankPool(world_size)
    try:
        pool.start(_train_until, config=config, moment=(2, place), victim=1, action=action)
        for message, waited in pool.collect(ranks=[rank for rank in range(world_size) if rank != 1], limit_s=90):
            assert f"another rank has ended, or did not answer within comm_timeout_s = {TIMEOUT_S} s" in message
            assert waited < TIMEOUT_S + 5
    finally:
        for process in pool.processes:
            process.kill()
        pool.close()


CRUCIAL = [
    ("kill", "acco", "after forward 0"),
    ("kill", "acco", "after backward 1"),
    ("kill", "acco", "in ESTIMATE"),
    ("kill", "acco", "after backward 3"),
    ("kill", "acco", "in COMMIT"),
    ("hang", "acco", "in COMMIT"),
]
OTHERS = [
    ("kill", "wp", "in COMMIT"),
    ("hang", "acco", "in ESTIMATE"),
    ("kill", "acco", "after forward 2"),
    ("kill", "wp", "after backward 1"),
    ("kill", "dpu", "in COMMIT"),
    ("kill", "sync", "after backward 2"),
    ("kill", "sync", "in COMMIT"),
    ("hang", "acco", "after forward 2"),
    ("hang", "wp", "in COMMIT"),
    ("hang", "dpu", "in COMMIT"),
    ("hang", "sync", "in COMMIT"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("action", "schedule", "place"), CRUCIAL + [pytest.param(*case, marks=pytest.mark.full) for case in OTHERS]
)
def test_a_rank_that_is_gone(action, schedule, place):
    check_survivors(3, training.ds_config(4, schedule=schedule, comm_timeout_s=TIMEOUT_S), place, action)


PLACES_OF_LEVELS = {
    "inside a host": (Communicator, "reduce_scatter_sum"),
    "between hosts": (Encoding, "encode"),  # of the host's sums
    "in the gather": (Communicator, "all_gather"),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("kill", "between hosts"),
        ("hang", "inside a host"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [("kill", "inside a host"), ("hang", "between hosts"), ("kill", "in the gather")]
        ),
    ],
)
def test_a_rank_that_is_gone_at_a_level(action, place):
    """One of two hosts with two ranks each loses a rank; no survivor exchanges with it on both levels."""
    check_survivors(4, training.ds_config(4, ranks_per_host=2, comm_timeout_s=TIMEOUT_S), place, action)


def _failing_round(config):
    import torch.distributed as dist

    engine = training.start_engine(config)

    def broken(*args):
        raise MemoryError("no room for the staging buffer")

    errors = []
    for window in range(2):
        for micro_batch in range(4):
            if (window, micro_batch) == (1, 1):
                engine.optimizer.driver.finish()  # the COMMIT of the window before shall still succeed
                faults.from_now_on(Communicator, "all_reduce_sum", broken)
            try:
                engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
                engine.step()
            except RuntimeError as error:
                errors.append((window, micro_batch, str(error), repr(error.__cause__)))
    return errors


@pytest.mark.distributed
def test_an_exception_in_the_background_surfaces_with_its_cause():
    pool = RankPool(2)
    try:
        pool.start(_failing_round, config=training.ds_config(4, comm_timeout_s=TIMEOUT_S))
        for errors in pool.collect(limit_s=60):
            # launched at the forward of micro-batch 2, raised at the window's end, where it is waited for
            assert errors[0][:2] == (1, 3)
            assert "a communication round failed in the background: no room for the staging buffer" in errors[0][2]
            assert "MemoryError" in errors[0][3]
    finally:
        pool.close()


SCRIPT = """
import os, sys, torch, deepspeed
sys.path.insert(0, {root!r})
from tests.support import faults, training
how, schedule = sys.argv[-2:]
deepspeed.init_distributed()
if schedule == "stock":
    config = training.ds_config(4)
    config["optimizer"] = {{"type": "AdamW", "params": {{**training.HYPER, "torch_adam": True}}}}
else:
    config = training.ds_config(4, schedule=schedule)
engine = training.start_engine(config)
rank = torch.distributed.get_rank()
for window in range(3):
    for micro_batch in range(4):
        if (window, micro_batch) == (2, 3) and "mid" in how:
            break
        engine.backward(engine(*training.batch(rank, window, micro_batch)))
        engine.step()
if "destroy" in how:
    engine.destroy()
if "group" in how:
    torch.distributed.destroy_process_group()
if "del" in how:
    del engine
print("reached the end", flush=True)
"""


LEAVING = [("exit mid", "acco")]
LEAVING_OTHERWISE = [
    ("group mid", "dpu"),
    ("exit", "wp"),
    ("destroy mid", "acco"),
    ("exit", "acco"),
    ("destroy", "wp"),
    ("group", "acco"),
    ("destroy group", "acco"),
    ("del", "acco"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "schedule"), LEAVING + [pytest.param(*case, marks=pytest.mark.full) for case in LEAVING_OTHERWISE]
)
def test_leaving_is_clean(tmp_path, how, schedule):
    script = tmp_path / "leave.py"
    script.write_text(SCRIPT.format(root=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))
    done = launch(script, how, schedule, per_node=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("reached the end") == 2
    assert not re.search(r"Traceback|terminate called|Exception ignored", output), output


@pytest.mark.distributed
def test_the_harness_reports_a_failing_rank():
    pool = RankPool(2)
    with pytest.raises(RankError, match="(?s)rank 0: ValueError.*rank 1: ValueError"):
        pool.run(training.start_engine, config=training.ds_config(1))
