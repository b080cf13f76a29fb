# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""A round that does not finish where the backend says nothing; on a device: tests/gpu."""

import logging
import threading
import time

import pytest

from deepspeed_acco.runtime.overdue import SHARE, Overdue

TIMEOUT_S = 0.5


class _Elsewhere:
    def of_others(self):
        return "Last seen: rank 1 at the start; this rank at COMMIT of window 7. "


@pytest.fixture
def told():
    """What the package's logger is told, line by line."""
    lines, ear = [], logging.Handler()
    ear.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("deepspeed_acco").addHandler(ear)
    yield lines
    logging.getLogger("deepspeed_acco").removeHandler(ear)


@pytest.fixture
def watch():
    made = Overdue(0, 2, TIMEOUT_S, _Elsewhere())
    yield made
    made.close()


def test_it_is_named_once_and_before_the_timeout(watch, told):
    begin = time.monotonic()
    watch.expect("COMMIT of window 7", lambda: False)
    while not told and time.monotonic() < begin + 10:
        time.sleep(0.01)
    assert time.monotonic() - begin >= SHARE * TIMEOUT_S
    time.sleep(TIMEOUT_S)
    (line,) = told
    assert line.startswith("ACCO: COMMIT of window 7 has not finished on rank 0 of 2 0.4 s after it was started")
    assert "comm_timeout_s = 0.5 s" in line and "Last seen: rank 1 at the start" in line


def test_one_that_finishes_and_one_that_follows_say_nothing(watch, told):
    watch.expect("COMMIT of window 7", lambda: False)
    time.sleep(0.5 * SHARE * TIMEOUT_S)
    watch.expect("ESTIMATE of window 8", lambda: True)  # begun in time: the one before is over
    time.sleep(2 * TIMEOUT_S)
    assert not told


def test_its_thread_ends(watch):
    watch.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "acco-overdue" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "acco-overdue" for thread in threading.enumerate())
