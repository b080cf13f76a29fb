# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The model of streams itself, by hand-made orders: it reports each that is missing, and nothing where none is."""

import pytest
import torch

from tests.streams.accesses import watched
from tests.streams.clocks import Device


def findings_of(program, answers="never"):
    device = Device(answers)
    with watched(device):
        program(torch.cuda.current_stream(), torch.cuda.Stream(priority=-1))
    return sorted({finding.partition(":")[0] for finding in device.findings})


def written_on(stream, other, *, waits, begin=0):
    """Writes 8 of 16 elements on ``stream`` and reads from ``begin`` on ``other``."""
    with torch.cuda.stream(stream):
        values = torch.zeros(16)
        other.wait_stream(stream)
        values[:8].add_(1.0)
    if waits:
        other.wait_event(stream.record_event())
    with torch.cuda.stream(other):
        values.view(4, 4)[begin // 4 :].sum()
    stream.wait_stream(other)  # what is freed here was read


@pytest.mark.parametrize("swaps", [False, True])
def test_a_read_behind_a_write(swaps):
    def program(waits, begin=0):
        return lambda a, b: written_on(*((b, a) if swaps else (a, b)), waits=waits, begin=begin)

    assert findings_of(program(waits=True)) == []
    assert findings_of(program(waits=False)) == ["read before it is written"]
    assert findings_of(program(waits=False, begin=8)) == [], "other bytes of the same storage"
    assert findings_of(program(waits=False, begin=4)) == ["read before it is written"]


def test_a_write_behind_reads():
    def program(stream, other):
        values = torch.zeros(16)
        other.wait_stream(stream)
        with torch.cuda.stream(other):
            values.sum()
        values[3:].zero_()

    assert findings_of(program) == ["overwritten while it is read"]


def test_two_writes():
    def program(stream, other):
        values = torch.zeros(16)
        with torch.cuda.stream(other):
            torch.mul(torch.ones(16), 2.0, out=values)

    assert findings_of(program) == ["written twice in any order"]


def test_order_goes_over_a_third_stream():
    def program(stream, other):
        third = torch.cuda.Stream(priority=0)
        values = torch.zeros(16)
        third.wait_stream(stream)
        other.wait_event(third.record_event())
        with torch.cuda.stream(other):
            values.add_(1.0)
        third.wait_stream(stream)  # does not pass on what comes from elsewhere
        with torch.cuda.stream(third):
            values.sum()

    assert findings_of(program) == ["read before it is written"]


@pytest.mark.parametrize("waits", [False, True])
def test_memory_that_is_freed_and_reused(waits):
    def program(stream, other):
        values = torch.zeros(16)
        other.wait_stream(stream)
        with torch.cuda.stream(other):
            values.sum()
        if waits:
            stream.wait_stream(other)
        del values
        torch.zeros(3)

    assert findings_of(program) == ([] if waits else ["freed and reused"])


@pytest.mark.parametrize("answers", ["never", "always"])
def test_an_answer_is_no_order_but_the_host_may_read(answers):
    def program(stream, other):
        values = torch.zeros(16)
        pinned = torch.empty(16, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        event = stream.record_event()
        if event.query():
            assert pinned.tolist() == [0.0] * 16
            pinned.sum().item()
            with torch.cuda.stream(other):
                values.sum()

    assert findings_of(program, answers) == ([] if answers == "never" else ["read before it is written"])


@pytest.mark.parametrize("waits", [False, True])
def test_the_host_reads_what_it_has_not_waited_for(waits):
    def program(stream, other):
        pinned = torch.empty(16, pin_memory=True)
        pinned.copy_(torch.zeros(16), non_blocking=True)
        if waits:
            stream.record_event().synchronize()
        pinned[3:].tolist()
        pinned[0].item()

    assert findings_of(program) == ([] if waits else ["read by the host before it is written"])


def test_waits_of_the_host_are_counted_and_order_what_follows():
    device = Device()
    with watched(device):
        stream, other = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
        values = torch.zeros(16)
        assert not values.any().item() and values.tolist() == [0.0] * 16 and torch.equal(values, values)
        torch.empty(16, pin_memory=True).copy_(values)
        with torch.cuda.stream(other):
            values.add_(1.0)
        other.synchronize()
        values.sum()
        begin, end = torch.cuda.Event(enable_timing=True), stream.record_event()
        begin.elapsed_time(end)
        assert device.findings == {"timed before it is over: an event; others' code": 1}
        end.synchronize()
        begin.elapsed_time(end)
    assert set(device.findings.values()) == {1}
    assert device.waits == {
        "others' code: aten::_local_scalar_dense": 1,
        "others' code: tolist": 1,
        "others' code: aten::equal": 1,
        "others' code: copy": 1,
        "others' code: Stream.synchronize": 1,
        "others' code: Event.synchronize": 1,
    }
