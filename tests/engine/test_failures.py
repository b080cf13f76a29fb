"""Ranks that die or hang, rounds that fail, scripts that just end: an error that says so, and never a hang."""

import os
import re
import time

import pytest

from deepspeed_acco.runtime.communicator import Communicator
from deepspeed_acco.tools.launch.shaped_hosts import why_not
from tests.faults import Cell, judge, run
from tests.support import faults, training
from tests.support.launcher import launch
from tests.support.ranks import RankError, RankPool, run_script

pytestmark = pytest.mark.timeout(240)
TIMEOUT_S = 3
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


CRUCIAL = [
    Cell("acco", "stop", "gather of COMMIT"),
    Cell("acco", "stop and continue", "reduce of COMMIT"),
    Cell("acco", "NaN", "backward"),
    Cell("acco", "other config", "start"),
    Cell("acco", "stop", "save: shard"),
    Cell("int4", "full disk", "save: shard"),
    Cell("adaptive", "no memory", "reduce of COMMIT"),
    Cell("fp16", "stop", "backward"),
    Cell("sync", "kill", "load"),
    Cell("two levels", "kill", "sums of a host"),
]
OTHERS = [
    Cell("acco", "kill", "forward"),
    Cell("acco", "kill", "gather of ESTIMATE"),
    Cell("wp", "exception", "eval"),
    Cell("fp16", "exception", "gather of ESTIMATE"),
    Cell("local", "stop and continue", "gather of COMMIT"),
    Cell("two levels", "stop", "reduce of COMMIT"),
    pytest.param(Cell("acco", "cut link", "gather of COMMIT"), marks=needs_hosts),
]


@pytest.mark.distributed
@pytest.mark.parametrize("cell", CRUCIAL, ids=str)
def test_a_rank_that_something_happens_to(cell):
    """A part of what ``python -m tests.faults`` goes through; a loaded machine may take a little longer."""
    _, wrong = judge(cell, slack_s=5)
    assert not wrong


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("cell", OTHERS, ids=str)
def test_a_rank_that_something_else_happens_to(cell):
    _, wrong = judge(cell, slack_s=5)
    assert not wrong


LOOK = "a look at the true weights (evaluation, saving or state_dict)"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("eval", f"rank 1 behind {LOOK}; this rank at ESTIMATE of window 3"),
        ("save: shard", f"rank 1 behind {LOOK}; this rank behind its files of a checkpoint"),
    ],
)
def test_the_rank_that_does_not_come_is_named(place, seen):
    ends = run("acco", Cell("acco", "stop", place))
    assert ends[1] is None
    assert f"Last seen: {seen}" in ends[0]["error"]


def _start_slowly(config, seconds):
    import torch.distributed as dist

    from deepspeed_acco.optim import native

    prepare = native.prepare

    def build(device):
        time.sleep(seconds)
        prepare(device)

    if dist.get_rank() == 1:
        native.prepare = build
    try:
        engine = training.start_engine(config)
        losses = training.run_windows(engine, 2)["losses"]
        engine.destroy()
    finally:
        native.prepare = prepare
    return losses


def test_a_rank_that_builds_kernels_may_take_longer_than_a_round(ranks):
    config = training.ds_config(2, comm_timeout_s=1)
    slow, plain = (ranks(2).run(_start_slowly, config=config, seconds=seconds) for seconds in (3, 0))
    assert slow == plain


SCRIPT_THAT_RAISES = """
import os, signal, sys, time, torch, deepspeed
sys.path.insert(0, {root!r})
from tests.support import training
deepspeed.init_distributed()
engine = training.start_engine(training.ds_config(2))
rank = torch.distributed.get_rank()
for micro_batch in range(8):
    engine.backward(engine(*training.batch(rank, 0, micro_batch)))
    if rank and micro_batch == 7:
        time.sleep(1.5)  # the ESTIMATE before is finished
        os.kill(os.getpid(), signal.SIGSTOP)
    engine.step()
time.sleep(1.0)  # a round waits for rank 1 now
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
print("raises at", time.time(), flush=True)
{raises}
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("raises", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(99)", 130),
        pytest.param("raise KeyError('the script')", 1, marks=pytest.mark.full),
    ],
)
def test_an_exception_beside_a_rank_that_stands_still_ends_the_process(tmp_path, raises, code):
    """comm_timeout_s is DeepSpeed's default, of minutes."""
    script = tmp_path / "raises.py"
    script.write_text(SCRIPT_THAT_RAISES.format(root=ROOT, raises=raises))
    done = run_script(script)
    took = time.time() - float(re.search(r"raises at ([\d.]+)", done.stdout)[1])
    assert done.returncode == code
    assert ("KeyError: 'the script'" if code == 1 else "KeyboardInterrupt") in done.stderr
    assert "a round still waits for another rank 5 s after the" in done.stdout + done.stderr
    assert took < 20


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
from deepspeed_acco.tools.launch.shaped_hosts import why_not
from tests.faults import Cell, judge, run
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


LEAVING = [
    ("exit mid", "acco"),
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
@pytest.mark.full
@pytest.mark.parametrize(("how", "schedule"), LEAVING)
def test_leaving_is_clean(tmp_path, how, schedule):
    script = tmp_path / "leave.py"
    script.write_text(SCRIPT.format(root=ROOT))
    done = launch(script, how, schedule, per_node=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("reached the end") == 2
    assert not re.search(r"Traceback|terminate called|Exception ignored", output), output


@pytest.mark.distributed
def test_the_harness_reports_a_failing_rank():
    pool = RankPool(2)
    with pytest.raises(RankError, match="(?s)rank 0: ValueError.*rank 1: ValueError"):
        pool.run(training.start_engine, config=training.ds_config(1, schedule="acco"))
