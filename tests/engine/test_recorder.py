# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the recorder's times are times of, by a clock of the test's own."""

import json
import types

import pytest
import torch

from deepspeed_acco.engine import recorder
from deepspeed_acco.engine.recorder_format import RankHeader
from deepspeed_acco.runtime.clock import LaneTimes
from deepspeed_acco.settings import Settings

HEADER = RankHeader(rank=3, n=1, micro_batch=1, samples_per_step=1)


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
    monkeypatch.setattr(recorder, "header_of", lambda engine: HEADER)
    engine = Engine()
    record = recorder.Recorder(engine, tmp_path)
    record.attach(engine)
    for outside, inside in ((5.0, 1.0), (8.0, 2.0), (16.0, 4.0)):
        now += outside
        with record.step(engine):
            now += inside
    record.close()
    _, *steps = (json.loads(line) for line in (tmp_path / "rank3.jsonl").read_text().splitlines())
    assert [(line["step_s"], line["inside_s"]) for line in steps] == [(None, 1.0), (10.0, 2.0), (20.0, 4.0)]
    assert all(line["samples"] is line["sent_bytes"] is line["estimate_s"] is None for line in steps)


class Optimizer:
    """ACCO's, as far as the recorder asks it."""

    settings = Settings(accumulation="adaptive", schedule="dpu")

    def __init__(self):
        self.times = LaneTimes()
        self.wire_bytes = (100, 10)
        self.last_micro_batches = 0

    def lane_times(self):
        return self.times.copy()


def test_samples_bytes_and_estimates_of_each_step(monkeypatch, tmp_path):
    monkeypatch.setattr(recorder, "header_of", lambda engine: HEADER)
    engine = Engine()
    engine.train_micro_batch_size_per_gpu = lambda: 8
    engine.optimizer = optimizer = Optimizer()
    optimizer.times.add("ESTIMATE 0", 100.0, 0.0)  # before the recording
    record = recorder.Recorder(engine, tmp_path)
    record.attach(engine)
    for micro_batches, estimates in ((4, ()), (7, (1.0,)), (0, (2.0, 4.0))):
        with record.step(engine):
            optimizer.last_micro_batches = micro_batches
            optimizer.times.add("COMMIT 1", 5.0, 1.0)
            for estimate_s in estimates:
                optimizer.times.add("ESTIMATE 1", estimate_s, 0.5)
            sent, received = optimizer.wire_bytes
            optimizer.wire_bytes = (sent + 1000 * (1 + micro_batches), received + 1)
    record.close()
    _, *steps = (json.loads(line) for line in (tmp_path / "rank3.jsonl").read_text().splitlines())
    assert [line["samples"] for line in steps] == [32, 56, 0]
    assert [line["sent_bytes"] for line in steps] == [5000, 8000, 1000]
    assert [line["received_bytes"] for line in steps] == [1, 1, 1]
    assert [line["estimate_s"] for line in steps] == [None, 1.0, 3.0]
    assert [(line["round_s"], line["rounds"]) for line in steps] == [(5.0, 1), (6.0, 2), (11.0, 3)]


def _counter(tmp_path, name):
    """The kernel's count of that interface, made up."""
    path = tmp_path / "net" / name / "statistics" / "tx_bytes"
    path.parent.mkdir(parents=True)
    path.write_text("5000\n")
    return path


def _told(monkeypatch, tmp_path, device, rdma, **environment):
    """What the recorder tells of two steps, in which eth0 sends 100 and 2000 bytes and eth1 ten times as many."""
    counters = [_counter(tmp_path, name) for name in ("eth0", "eth1")]
    monkeypatch.setattr(recorder, "INTERFACES", tmp_path / "net")
    monkeypatch.setattr(recorder, "RDMA_DEVICES", tmp_path if rdma else tmp_path / "none")
    monkeypatch.setattr(recorder, "header_of", lambda engine: HEADER)
    now = types.SimpleNamespace(is_known=lambda: True, seconds_since=lambda earlier: 0.0)
    monkeypatch.setattr(recorder, "Instant", lambda device: now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name in ("LOCAL_RANK", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = Engine()
    engine.device = torch.device(device)
    record = recorder.Recorder(engine, tmp_path / "record")
    record.attach(engine)
    for sent in (100, 2000):
        with record.step(engine):
            for counter, times in zip(counters, (1, 10)):
                counter.write_text(f"{int(counter.read_text()) + times * sent}\n")
    record.close()
    _, *steps = (json.loads(line) for line in (tmp_path / "record" / "rank3.jsonl").read_text().splitlines())
    return [line["interface_bytes"] for line in steps]


@pytest.mark.parametrize(
    ("device", "rdma", "environment", "told"),
    [
        ("cpu", True, {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth1"}, [100, 2000]),
        ("cuda", False, {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth1"}, [1000, 20000]),
        ("cuda", False, {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "=eth0"}, [100, 2000]),
        ("cuda", True, {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "eth0"}, [None, None]),  # it is not asked to send
        ("cuda", False, {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "eth"}, [None, None]),  # either of the two
        ("cuda", False, {"LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "^eth0"}, [None, None]),  # any other
        ("cpu", False, {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "eth0,eth1"}, [None, None]),
        ("cpu", False, {"LOCAL_RANK": "0"}, [None, None]),
        ("cpu", False, {"LOCAL_RANK": "1", "GLOO_SOCKET_IFNAME": "eth0"}, [None, None]),
        ("cpu", False, {"GLOO_SOCKET_IFNAME": "eth0"}, [None, None]),
    ],
)
def test_bytes_at_the_interface_of_the_collectives(monkeypatch, tmp_path, device, rdma, environment, told):
    assert _told(monkeypatch, tmp_path, device, rdma, **environment) == told
