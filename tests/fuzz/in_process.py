# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs ``ds_acco`` in this process, so that hundreds of command lines take seconds, and says what went wrong."""

import contextlib
import io
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from unittest import mock

from deepspeed_acco.tools import cli
from deepspeed_acco.tools.report import comparison_page, html, run_page

CPU_LIMIT_S, WAIT_LIMIT_S = 5.0, 20.0  # the second also ends what waits, and has room for other processes
NO_NUMBER = re.compile(r"(?<![\w/.-])-?(nan|inf|infinity)(?![\w/.-])", re.IGNORECASE)
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
STATUSES = (0, 1, 2)
INTERRUPTED = 130


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def _limit(seconds: float, timer: int, number: int) -> Iterator[None]:
    """Raises _TooLong inside when the timer runs out; one that was running (pytest-timeout's) goes on afterwards."""

    def stop(number, frame):
        raise _TooLong

    handler, begin = signal.signal(number, stop), time.monotonic()
    left_s, _ = signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, handler)
        if left_s:
            signal.setitimer(timer, max(0.01, left_s - (time.monotonic() - begin)))


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Lets reports draw nothing inside, which takes them most of their time; words and tables are as ever."""

    def picture(draw, words, caption=""):
        return html.Picture("data:,", "data:,", words, caption)

    with mock.patch.object(comparison_page, "picture", picture), mock.patch.object(run_page, "picture", picture):
        yield


def problem(arguments: Sequence[str]) -> tuple[str, int | None]:
    """Runs one command line; returns what went wrong, empty where nothing did, and the exit status."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _limit(WAIT_LIMIT_S, signal.ITIMER_REAL, signal.SIGALRM),
            _limit(CPU_LIMIT_S, signal.ITIMER_PROF, signal.SIGPROF),
        ):
            status = cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    except _TooLong:
        return f"did not end within {CPU_LIMIT_S:g} s of computing or {WAIT_LIMIT_S:g} s of waiting", None
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({frame.filename}:{frame.lineno})", None
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status not in STATUSES:
        return f"exit status {status!r}", None
    if "Traceback" in err.getvalue():
        return f"a traceback: {err.getvalue()[-300:]!r}", status
    if status and "ds_acco" not in err.getvalue():
        return f"exit status {status} without a word", status
    steering = STEERING.search(out.getvalue() + err.getvalue())
    if steering:
        return f"{steering[0]!r} is printed", status
    files = {word.rpartition("=")[2] for word in arguments}  # report prints the path of its page
    figures = [line for line in out.getvalue().splitlines() if line not in files and NO_NUMBER.search(line)]
    return (f"no number is printed as a figure: {figures[0].strip()!r}" if figures else ""), status
