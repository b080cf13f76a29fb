# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Defines THE ALGORITHM: which round runs behind which computation (ACCO, arXiv 2406.02613, sections 3 and 4).

A *window* is one optimizer step: the micro-batches of phase A, then those of phase B. A *round* is one background job:
reduce-scatter the gradients, update this rank's shard, all-gather the weights. At every boundary the same happens, in
this order: finish the running round, install the weights it gathered, start the next round.

``acco``: phase A at the estimated weights, phase B at the true ones; each round hides behind one phase::

              window t                          window t+1
    compute | A at estimate[t] | B at true[t]  | A at estimate[t+1] | B at true[t+1] |
    rounds  |    COMMIT t-1    |   ESTIMATE t  |     COMMIT t       |  ESTIMATE t+1  |
                               ^               ^                    ^
                    installs true[t]   installs estimate[t+1]   installs true[t+1]

The others have one round. ``dpu`` (delayed update) computes window t at true[t-1] over COMMIT t-1; ``local`` (local
prediction) likewise, but each rank goes on from true[t-1] by the step that it predicts alone, of the momentum and of
its own gradient of window t-1; ``wp`` (weight prediction) computes window t at prediction[t] over PREDICT t-1, which is
COMMIT t-1 followed by a discarded second step; ``sync`` waits for COMMIT t::

    compute |        window t         |       window t+1        |       compute | window t |          | window t+1 |
    rounds  | COMMIT t-1 (dpu, local) |  COMMIT t (dpu, local)  |       rounds             | COMMIT t |  (sync)
            |    PREDICT t-1 (wp)     |     PREDICT t (wp)      |

A phase ends after a fixed number of micro-batches or, with adaptive windows, when its rank has a least number of them
and the round behind it is finished. Every rank decides for itself; all run the same rounds in the same order, and a
round begins when the last rank has come to it::

    slow rank |    A        A    |    B        B    |    A        A    |
    rounds    | COMMIT t-1 |     | ESTIMATE t |     |  COMMIT t  |
    fast rank   A  A  A  A  A  |  B  B  B  B  B  B |  A  A  A  A  A  A |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum


class Phase(Enum):
    """Names the part of the window that is being computed."""

    A = "A"
    B = "B"


class Place(Enum):
    """Says where the newest true weights are in full, once the running round is finished."""

    LIVE = "live"  # the model's own parameters
    COMM = "comm"  # the communication buffer, not installed yet
    SHARDS = "shards"  # nowhere: only the ranks' master shards together have them


@dataclass(frozen=True)
class Round:
    """Describes one background job: what it reduces, what it writes, and which weights are installed after it."""

    name: str
    reduces: Phase | None  # gradients of this phase only; None: of the whole window
    writes_state: bool  # master, exp_avg, exp_avg_sq and step
    predicts: bool  # gathers the result of a second, discarded step instead of the true weights
    leaves_true_weights: Place  # where the true weights are between its end and the installation
    predicts_locally: bool = False  # while it runs, each rank trains at what it alone predicts of its result


ESTIMATE = Round("ESTIMATE", reduces=Phase.A, writes_state=False, predicts=False, leaves_true_weights=Place.LIVE)
COMMIT = Round("COMMIT", reduces=None, writes_state=True, predicts=False, leaves_true_weights=Place.COMM)
COMMIT_FORESEEN = replace(COMMIT, predicts_locally=True)
PREDICT = Round("PREDICT", reduces=None, writes_state=True, predicts=True, leaves_true_weights=Place.SHARDS)


@dataclass(frozen=True)
class Schedule:
    """Names the rounds of one window: one that starts when phase B begins (or none), one at the window's end."""

    name: str
    at_phase_b: Round | None
    at_window_end: Round
    blocks: bool  # the round at the window's end is finished and installed at once

    @property
    def has_two_phases(self) -> bool:
        """Tells whether phase A makes an estimate, so that a window needs a micro-batch for each phase."""
        return self.at_phase_b is not None

    @property
    def overlaps(self) -> bool:
        """Tells whether rounds run behind computation."""
        return not self.blocks

    @property
    def least_micro_batches(self) -> int:
        """Returns the micro-batches that a window has at least."""
        return 2 if self.has_two_phases else 1

    @property
    def looks_together(self) -> bool:
        """Tells whether looking at the true weights gathers them, so that all ranks must look."""
        return self.at_window_end.leaves_true_weights is Place.SHARDS

    @property
    def predicts_locally(self) -> bool:
        """Tells whether each rank trains at weights of its own, which it predicts alone."""
        return self.at_window_end.predicts_locally


# The one table: a new schedule is a row here and its lines in reference.py. All others ask for properties of the row.
SCHEDULES = {
    "acco": Schedule("acco", at_phase_b=ESTIMATE, at_window_end=COMMIT, blocks=False),
    "local": Schedule("local", at_phase_b=None, at_window_end=COMMIT_FORESEEN, blocks=False),
    "wp": Schedule("wp", at_phase_b=None, at_window_end=PREDICT, blocks=False),
    "dpu": Schedule("dpu", at_phase_b=None, at_window_end=COMMIT, blocks=False),
    "sync": Schedule("sync", at_phase_b=None, at_window_end=COMMIT, blocks=True),
}
DEFAULT = SCHEDULES["acco"]  # of windows with room for its phases
DEFAULT_OF_ONE = SCHEDULES["local"]  # of windows of one micro-batch
AUTO = "auto"  # the name that stands for one of both
BLOCKING = SCHEDULES["sync"]  # ZeRO-1 itself: for the windows of a warm-up, and to measure C and R


def chosen(name: str, n: int) -> str:
    """Returns the schedule that ``name`` stands for in windows of n micro-batches: itself, unless it is AUTO."""
    if name != AUTO:
        return name
    return (DEFAULT if n >= DEFAULT.least_micro_batches else DEFAULT_OF_ONE).name


def schedule_of_window(name: str, window: int, overlap_warmup_steps: int) -> Schedule:
    """Returns the schedule that window number ``window`` (from 0) follows: the first ones may run as ``sync``."""
    return BLOCKING if window < overlap_warmup_steps else SCHEDULES[name]


def blocks_at_end(schedule: Schedule, phase: Phase) -> bool:
    """Tells whether the window's last round must be installed at once: always in ``sync``, and for a window of a
    two-phase schedule that ended before its phase B, so that there is no estimate to compute the next phase A at."""
    return schedule.blocks or (schedule.has_two_phases and phase is Phase.A)


def names_of(fits: Callable[[Schedule], bool]) -> str:
    """Lists the schedules that ``fits`` accepts, for messages: ``"wp", "dpu" or "sync"``."""
    names = [f'"{name}"' for name, schedule in SCHEDULES.items() if fits(schedule)]
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
