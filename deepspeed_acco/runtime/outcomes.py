# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps what finished rounds told: one log, and readers that each go through it at their own pace.

On CUDA the host learns a round's values later than it finishes the round, so every reader takes what is known and comes
again; nobody waits for the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from .round import ReportedCounts, RoundOutcome


class OutcomeLog:
    """Keeps each outcome until all its readers have taken it.

    Attributes:
        last_commit: the newest COMMIT, or None.
        last_counts: what the newest round of an adaptive window reported, or None.
        wire_bytes: payload that this rank sent in all rounds so far, and as much received.
    """

    def __init__(self):
        self.last_commit: RoundOutcome | None = None
        self.last_counts: ReportedCounts | None = None
        self.wire_bytes = 0
        self._entries: deque[RoundOutcome] = deque()
        self._first = 0  # number of the first entry
        self._readers: list[OutcomeReader] = []

    def enter(self, outcome: RoundOutcome) -> None:
        """Appends what the round that has just finished told."""
        if outcome.round.writes_state:
            self.last_commit = outcome
        if outcome.counts is not None:
            self.last_counts = outcome.counts
        self.wire_bytes += outcome.wire_bytes
        self._entries.append(outcome)
        self._drop_read()

    def reader(self) -> OutcomeReader:
        """Makes a reader of what is entered from now on."""
        self._readers.append(OutcomeReader(self, self._first + len(self._entries)))
        return self._readers[-1]

    def forget(self) -> None:
        """Drops everything that nobody has taken yet, and the newest COMMIT: the run goes on elsewhere."""
        self.last_commit = None
        for reader in self._readers:
            reader.following = self._first + len(self._entries)
        self._drop_read()

    def from_number(self, number: int) -> list[RoundOutcome]:
        """Returns the entries from that number on, oldest first."""
        return list(self._entries)[number - self._first :]

    def _drop_read(self):
        end = self._first + len(self._entries)
        while self._first < min((reader.following for reader in self._readers), default=end):
            self._entries.popleft()
            self._first += 1


class OutcomeReader:
    """Goes through a log once; :meth:`OutcomeLog.reader` makes it.

    Attributes:
        following: number of the entry that it takes next.
    """

    def __init__(self, log: OutcomeLog, following: int):
        self._log = log
        self.following = following

    def take(self, is_known: Callable[[RoundOutcome], bool] = lambda outcome: True) -> list[RoundOutcome]:
        """Returns the outcomes not taken yet, oldest first, up to the first that is not known; never waits."""
        taken = []
        for outcome in self._log.from_number(self.following):
            if not is_known(outcome):
                break
            taken.append(outcome)
        self.following += len(taken)
        return taken

    def wait(self) -> None:
        """Waits until the host knows of each outcome not taken yet whether its step was skipped."""
        for outcome in self._log.from_number(self.following):
            outcome.is_finite.wait()

    def take_skipped(self) -> int:
        """Returns how many COMMITs are newly known to have been skipped for a non-finite gradient."""
        known = self.take(lambda outcome: outcome.is_finite.is_known())
        return sum(1 for outcome in known if outcome.round.writes_state and not outcome.is_finite.value())

    def take_estimate_errors(self) -> list[float]:
        """Returns the errors, oldest first, of the COMMITs of which they are newly known: |where training stood
        meanwhile - the new true weights| / |step|, L2 norms over all parameters. Skipped COMMITs and steps of length 0
        have none."""
        known = self.take(lambda outcome: outcome.estimate_error is None or outcome.estimate_error.is_known())
        errors = [outcome.estimate_error.value() for outcome in known if outcome.estimate_error is not None]
        return [error for error in errors if math.isfinite(error)]

    def take_grad_norms(self) -> list[tuple[int, float]]:
        """Returns window and norm of the COMMITs of which they are newly known, oldest first; as ZeRO-1 tells, the norm
        of a skipped one is infinite."""
        known = self.take(lambda outcome: outcome.grad_norm.is_known() and outcome.is_finite.is_known())
        return [
            (outcome.window, outcome.grad_norm.value() if outcome.is_finite.value() else math.inf)
            for outcome in known
            if outcome.round.writes_state and outcome.window is not None
        ]

    def take_counts(self) -> list[ReportedCounts]:
        """Returns what the adaptive windows' rounds reported."""
        return [outcome.counts for outcome in self.take() if outcome.counts is not None]

    def take_whether_sound(self) -> tuple[bool, bool]:
        """Tells, as far as it is newly known, whether all ranks were in the same rounds, and whether nobody had written
        their live weights."""
        known = self.take(lambda outcome: outcome.is_same_round.is_known() and outcome.is_untouched.is_known())
        values = [(outcome.is_same_round.value(), outcome.is_untouched.value()) for outcome in known]
        return all(in_step for in_step, _ in values), all(untouched for _, untouched in values)
