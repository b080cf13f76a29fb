# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Adds to a backend's error, which says what broke on the wire, what that means for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class CommFailed(RuntimeError):
    """Says that a collective did not complete; the cause is chained."""


@dataclass(frozen=True)
class Guard:
    """Names the rank and the timeout in the errors of what runs inside ``with guard(name of the collective)``."""

    rank: int
    world_size: int
    timeout_s: float

    @contextmanager
    def __call__(self, collective: str) -> Iterator[None]:
        """Raises CommFailed for a RuntimeError of what runs inside: backends raise no other."""
        try:
            yield
        except RuntimeError as cause:
            raise CommFailed(
                f"{collective} failed on rank {self.rank} of {self.world_size}: another rank has ended, or did not "
                f"answer within comm_timeout_s = {self.timeout_s:g} s ({cause}). Look at the other ranks' output"
            ) from cause
