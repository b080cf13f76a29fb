# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the recorder's times are times of, by a clock of the test's own."""

import json

import torch

from deepspeed_acco import recorder


class Engine:
    module = torch.nn.Linear(1, 1)
    device = torch.device("cpu")
    global_rank = 3
    optimizer = None


def test_from_the_end_of_a_step_to_the_end_of_the_next(monkeypatch, tmp_path):
    now = 0.0

    class Clock:
        def __init__(self, device):
            self.at = now

        def is_known(self):
            return True

        def seconds_since(self, earlier):
            return self.at - earlier.at

    monkeypatch.setattr(recorder, "Instant", Clock)
    monkeypatch.setattr(recorder, "_header", lambda engine: {})
    engine = Engine()
    record = recorder.Recorder(engine, tmp_path)
    for outside, inside in ((5.0, 1.0), (8.0, 2.0), (16.0, 4.0)):
        now += outside
        with record.step():
            now += inside
    record._close()
    _, *steps = (json.loads(line) for line in (tmp_path / "rank3.jsonl").read_text().splitlines())
    assert [(line["step_s"], line["inside_s"]) for line in steps] == [(None, 1.0), (10.0, 2.0), (20.0, 4.0)]
