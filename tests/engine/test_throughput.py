# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed divides by a time to tell samples/s and FLOPS: with ACCO as with AdamW in the same loop."""

import re

import pytest

from tests.support import training
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(240)
WINDOWS, N, MICRO_BATCH, RANKS = 6, 4, 4, 2
ADAMW = {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}


def _counts(config, counts=None):
    engine = training.start_engine(config)
    training.run_windows(engine, WINDOWS, counts=counts)
    timer = engine.tput_timer
    # The rate that it prints is the first of these by its time of the steps behind the start.
    told = {
        name: getattr(timer, name) for name in ("batch_size", "global_step_count", "micro_step_count", "start_step")
    }
    told |= {"samples": engine.global_samples, "steps": engine.global_steps}
    told["rate_by_time"] = timer.avg_samples_per_sec() * timer.total_elapsed_time
    engine.destroy()
    return told


def _config(optimizer, schedule="acco"):
    config = training.ds_config(N, 2.0, schedule=schedule)
    return config if optimizer == "ACCO" else config | {"optimizer": ADAMW}


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        ("acco", None),
        ("acco", [4, 2, 4, 1, 3, 4]),
        pytest.param("local", None, marks=pytest.mark.full),
        pytest.param("sync", None, marks=pytest.mark.full),
    ],
)
def test_the_throughput_timer_counts_as_with_adamw(ranks, schedule, counts):
    """Windows of fewer micro-batches, by hand, count as whole ones in both."""
    mine, theirs = (
        ranks(RANKS).run(_counts, config=_config(name, schedule), counts=counts)[0] for name in ("ACCO", "")
    )
    # A rate times its time is a number of samples: of the steps that were measured.
    samples = mine.pop("rate_by_time"), theirs.pop("rate_by_time")
    assert mine == theirs
    assert mine["batch_size"] == N * MICRO_BATCH * RANKS and mine["samples"] == WINDOWS * mine["batch_size"]
    assert samples == pytest.approx([(WINDOWS - mine["start_step"]) * mine["batch_size"]] * 2)


def _profile(config, path):
    config = config | {"flops_profiler": {"enabled": True, "profile_step": 3, "detailed": True, "output_file": path}}
    engine = training.start_engine(config)
    training.run_windows(engine, WINDOWS)
    engine.destroy()


@pytest.mark.distributed
def test_the_flops_profiler_counts_as_with_adamw(tmp_path):
    """In processes of their own: what an earlier profile has left in torch's functions would be counted, too."""
    told = []
    for name in ("ACCO", ""):
        path = tmp_path / f"profile{name}"
        pool = RankPool(RANKS)
        try:
            pool.run(_profile, config=_config(name), path=str(path))
        finally:
            pool.close()
        text = path.read_text()
        of_summary = dict(re.findall(r"^((?:batch|params|fwd MACs|fwd flops)[^:,\n]*): +(.+?) *$", text, re.M))
        of_layers = re.findall(r"^ +\((\w+)\): Linear\((.+?% MACs), ", text, re.M)
        told.append((of_summary, of_layers))
    assert told[0] == told[1]
    of_summary, of_layers = told[0]
    assert of_summary["batch size per GPU"] == str(MICRO_BATCH)
    operations = 2 * MICRO_BATCH * (7 * 13 + 2 * 13 * 13 + 13 * 3)  # of the four products of a forward
    assert of_summary["fwd flops per GPU"] == f"{operations / 1e3:.2f} K"
    assert [name for name, _ in of_layers] == ["first", "middle", "again", "last"]
