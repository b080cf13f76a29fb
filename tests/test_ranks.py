"""Checks the harness of ranks itself: forked ranks are as good as new interpreters."""

import os
import signal
import time

import pytest

from tests.support import training
from tests.support.ranks import RankPool, run_script

pytestmark = pytest.mark.distributed


def _variable(name):
    return os.environ.get(name), os.environ["RANK"]


def test_ranks_see_todays_environment(ranks, monkeypatch):
    ranks(1).run(_variable, name="ACCO_TODAY")  # the server has been started
    monkeypatch.setenv("ACCO_TODAY", "yes")
    pool = RankPool(2)
    try:
        assert pool.run(_variable, name="ACCO_TODAY") == [("yes", "0"), ("yes", "1")]
    finally:
        pool.close()


def _sleep(seconds):
    time.sleep(seconds)
    return "too late"


def test_ranks_whose_test_ran_out_of_time_take_no_other_call():
    """The answer to the first call would be taken for that to the next one, or the next one waits behind it."""

    def out_of_time(*_):
        raise TimeoutError("the test's own limit")

    pool, before = RankPool(1), signal.signal(signal.SIGALRM, out_of_time)
    left, _ = signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(TimeoutError, match="own limit"):
            pool.run(_sleep, seconds=3)
        assert not pool.is_usable and not pool.processes
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)  # of pytest-timeout


def test_a_script_in_ranks_gives_its_output_and_the_first_exit_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print('rank', os.environ['RANK'], sys.argv[1:], flush=True)\n"
        "time.sleep(0 if os.environ['RANK'] == '1' else 600)\n"
        "raise SystemExit('rank 1 has had enough')\n"
    )
    done = run_script(script, "--steps", 3)
    assert done.returncode == 1 and done.stderr == "rank 1 has had enough\n"
    assert "rank 1 ['--local_rank=1', '--steps', '3']" in done.stdout.splitlines()


@pytest.mark.full
def test_forked_ranks_have_the_bits_of_new_interpreters(ranks):
    run = dict(config=training.ds_config(4, 2.0, precision="bf16"), windows=5, precision="bf16")
    forked = ranks(2).run(training.train, **run)
    pool = RankPool(2, start_method="spawn")
    try:
        spawned = pool.run(training.train, **run)
    finally:
        pool.close()
    for mine, theirs in zip(forked, spawned):
        assert mine["losses"] == theirs["losses"] and mine["norms"] == theirs["norms"]
        assert all(a.equal(b) for a, b in zip(mine["weights"] + mine["live"], theirs["weights"] + theirs["live"]))
