# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lets a process end that an exception, or Ctrl-C, has ended, although a round of it waits for a rank that does not
come. The interpreter joins the thread of that round before it ends: for as long as the group's timeout."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time

from . import owners
from .log import logger

GRACE_S = 5.0  # for a round whose ranks are all there
_POLL_S = 0.02


def install() -> None:
    """Puts itself behind what ``sys.excepthook`` is now."""
    sys.excepthook = functools.partial(_after_exception, sys.excepthook)


def _after_exception(previous, kind, error, traceback) -> None:
    """Shows the exception as before, and watches what follows. torch calls this inside a hook of its own, which shows
    the text only afterwards; so nothing may end here."""
    previous(kind, error, traceback)
    watch(kind.__name__, 130 if issubclass(kind, KeyboardInterrupt) else 1)


def watch(name: str, code: int) -> None:
    """Ends the process with that code, unless it ends by itself: the exception of that name has ended it."""
    threading.Thread(target=_end_unless_finished, args=(name, code), daemon=True).start()


def _end_unless_finished(name: str, code: int) -> None:
    """Ends the process as the exception would, where a round is not finished in time. What the launcher sees is the
    same, and it ends the other ranks."""
    deadline = time.monotonic() + GRACE_S
    while owners.any_round_in_flight():
        if time.monotonic() > deadline:
            logger().error(
                f"ACCO: a round still waits for another rank {GRACE_S:g} s after the {name} above; this process ends "
                "without it"
            )
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        time.sleep(_POLL_S)
