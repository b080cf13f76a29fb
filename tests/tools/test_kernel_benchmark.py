# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""How ``ds_acco kernels`` times what runs on a device, with a device that is played."""

import pytest
import torch

from deepspeed_acco.tools import kernel_benchmark

HOST_S, DEVICE_S = 3e-3, 1e-5  # of one call


class Device:
    """Plays a stream: the host enqueues at its own time, the device works off one thing after the other."""

    def __init__(self, monkeypatch):
        self.host_s = self.device_s = 0.0
        self.calls = 0
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.enqueue(cycles / 2e9))
        monkeypatch.setattr(torch, "Event", lambda **_: Event(self))

    def enqueue(self, duration_s):
        """Puts work behind what is there."""
        self.device_s = max(self.device_s, self.host_s) + duration_s

    def call(self):
        """Takes the host long and the device short."""
        self.calls += 1
        self.host_s += HOST_S
        self.enqueue(DEVICE_S)

    def waiting_call(self):
        """Waits for the device, as a value that the host asks for."""
        self.host_s = max(self.host_s, self.device_s)
        self.call()


class Event:
    """Plays torch.Event."""

    def __init__(self, device):
        self._device = device

    def record(self):
        """Notes when the device comes here."""
        self.at_s = max(self._device.device_s, self._device.host_s)

    def query(self):
        """Tells whether the device has come here."""
        return self.at_s <= self._device.host_s

    def synchronize(self):
        """Waits."""
        self._device.host_s = max(self._device.host_s, self.at_s)

    def elapsed_time(self, other):
        """Returns milliseconds."""
        return (other.at_s - self.at_s) * 1e3


def test_no_time_of_the_host_is_in_the_figure(monkeypatch):
    device = Device(monkeypatch)
    clock = kernel_benchmark.DeviceClock(torch.device("cuda"), repetitions=4)
    assert clock.seconds(device.call) == pytest.approx(DEVICE_S)
    calls = device.calls
    assert clock.seconds(device.call) == pytest.approx(DEVICE_S)
    assert device.calls == calls + 4, "it has learned how much other work there must be"
    assert not clock.waits


def test_what_waits_for_the_device_is_told(monkeypatch):
    device = Device(monkeypatch)
    clock = kernel_benchmark.DeviceClock(torch.device("cuda"), repetitions=1)
    assert clock.seconds(device.waiting_call) == pytest.approx(HOST_S + DEVICE_S)
    assert clock.waits == {device.waiting_call}


def test_a_forgotten_lock_of_deepspeeds_adam_is_told_and_not_waited_for(native, tmp_path, monkeypatch):
    lock = tmp_path / "py" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    report = kernel_benchmark.measure(1000, torch.device("cpu"), turns=1)
    (remark,) = [remark for remark in report["remarks"] if "Adam" in remark]
    assert remark.startswith(f"DeepSpeed's own Adam is not measured: {lock}: a build lock") and "Remove it" in remark
    assert not any(row["name"] == "DeepSpeedCPUAdam" for row in report["rows"])
