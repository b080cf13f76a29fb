# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Adds to a backend's error, which says what broke on the wire, what that means for the user."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .whereabouts import Whereabouts


class CommFailed(RuntimeError):
    """Says that a collective did not complete; the cause is chained."""


@dataclass(frozen=True)
class Guard:
    """Names the rank and the timeout in the errors of what runs inside ``with guard(name of the collective)``."""

    rank: int
    world_size: int
    timeout_s: float
    whereabouts: Whereabouts

    @contextmanager
    def __call__(self, collective: str) -> Iterator[None]:
        """Raises CommFailed for a RuntimeError of what runs inside: backends raise no other."""
        try:
            yield
        except RuntimeError as cause:
            raise self._failed(collective, cause) from cause

    @contextmanager
    def around(self, work: str) -> Iterator[None]:
        """Does the same for work with collectives of torch.distributed in it; what raises beside them passes."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CommFailed) or not _is_of_collective(error):
                raise
            raise self._failed(work, error) from error

    def _failed(self, collective: str, cause: Exception) -> CommFailed:
        return CommFailed(
            f"{collective} failed on rank {self.rank} of {self.world_size}: another rank has ended, or did not answer "
            f"within comm_timeout_s = {self.timeout_s:g} s ({cause}). {self.whereabouts.of_others()}Look at the other "
            "ranks' output"
        )


def _is_of_collective(error: Exception) -> bool:
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").startswith("torch.distributed.")
