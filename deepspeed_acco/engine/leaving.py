# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Lets a process end that an exception, or Ctrl-C, has ended, although a round of it waits for a rank that does not
come. The interpreter joins the thread of that round before it ends: for as long as the group's timeout."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time

from . import owners
from .log import logger

GRACE_S = 5.0  # for a round whose ranks are all there
_POLL_S = 0.02


def install() -> None:
    """Puts itself behind what ``sys.excepthook`` is now."""
    sys.excepthook = functools.partial(_after_exception, sys.excepthook)


def _after_exception(previous, kind, error, traceback) -> None:
    """Shows the exception as before; then ends the process as that exception would, where a round is not finished in
    time. What the launcher sees is the same, and it ends the other ranks."""
    previous(kind, error, traceback)
    deadline = time.monotonic() + GRACE_S
    while owners.any_round_in_flight():
        if time.monotonic() > deadline:
            logger().error(
                f"ACCO: a round still waits for another rank {GRACE_S:g} s after the {kind.__name__} above; this "
                "process ends without it"
            )
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)
        time.sleep(_POLL_S)
