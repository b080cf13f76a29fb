# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says which round does not finish where the backend says nothing: NCCL waits, until its watchdog ends the process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .whereabouts import Whereabouts

SHARE = 0.8  # of the timeout: then there is time to say it before the process is ended
_LOOKS = 20  # in that time


class Overdue:
    """Tells that a round takes too long, by one error, from a thread of its own that looks at the newest one.

    Args:
        timeout_s: seconds after which the watchdog ends the process.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, whereabouts: Whereabouts):
        self._rank, self._world_size = rank, world_size
        self._timeout_s = timeout_s
        self._whereabouts = whereabouts
        self._newest: tuple[str, Callable[[], bool], float] | None = None
        self._is_closed = threading.Event()
        threading.Thread(target=self._look, name="acco-overdue", daemon=True).start()

    def expect(self, name: str, is_finished: Callable[[], bool]) -> None:
        """Takes the round ``name`` for the newest; ``is_finished`` is asked from another thread and never waits."""
        self._newest = (name, is_finished, time.monotonic() + SHARE * self._timeout_s)

    def _look(self):
        told = None
        while not self._is_closed.wait(SHARE * self._timeout_s / _LOOKS):
            newest = self._newest
            if newest is None or newest is told or time.monotonic() < newest[2] or newest[1]():
                continue
            told = newest
            logging.getLogger("deepspeed_acco").error(
                f"ACCO: {newest[0]} has not finished on rank {self._rank} of {self._world_size} "
                f"{SHARE * self._timeout_s:g} s after it was started; when comm_timeout_s = {self._timeout_s:g} s are "
                f"over, NCCL ends this process. {self._whereabouts.of_others()}Look at the other ranks' output"
            )

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
