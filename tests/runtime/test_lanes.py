# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the lanes measure, by a clock of the test's own."""

import dataclasses

import pytest
import torch

from deepspeed_acco.runtime import lanes


@pytest.mark.parametrize("name", ["auto", "inline"])
def test_times_by_kind_of_round(monkeypatch, name):
    now = [0.0]
    monkeypatch.setattr(lanes.time, "perf_counter", lambda: now[0])
    lane = lanes.make_lane(name, torch.device("cpu"))

    def run(kind, seconds):
        def round_():
            now[0] += seconds

        lane.start(round_, kind)
        lane.finish()

    run("COMMIT 0", 4.0)
    run("ESTIMATE 1", 1.0)
    before = dataclasses.replace(lane.times())
    run("ESTIMATE 2", 2.0)
    assert before.round_s_of == {"COMMIT": 4.0, "ESTIMATE": 1.0}, "a copy stays as it was"
    assert lane.times().round_s_of == {"COMMIT": 4.0, "ESTIMATE": 3.0}
    assert lane.times().rounds_of == {"COMMIT": 1, "ESTIMATE": 2}
    spent = lane.times().since(before)
    assert spent.round_s_of == {"COMMIT": 0.0, "ESTIMATE": 2.0} and spent.rounds_of == {"COMMIT": 0, "ESTIMATE": 1}
    assert (spent.round_s, spent.rounds) == (2.0, 1)
    lane.close()
