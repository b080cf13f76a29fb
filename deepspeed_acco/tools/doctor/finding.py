# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds what a check has found on one rank, and brings together what all ranks have found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...runtime.failures import CommFailed
from ..words import printable

OK, WARN, FAIL, NOT_APPLICABLE = "ok", "warn", "fail", "not applicable"
_WORST_FIRST = (FAIL, WARN, OK, NOT_APPLICABLE)
_SHOWN_RANKS = 4


@dataclass(frozen=True)
class Finding:
    """Holds the result of one check.

    Attributes:
        status: OK, WARN, FAIL or NOT_APPLICABLE.
        advice: what to do; empty where nothing is.
        figures: name: what was measured, for the JSON; names carry their unit.
        rows: more lines of the page, as (what, its value and what it means).
        is_consequence: it fails since another rank did not come.
    """

    status: str
    sentence: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[tuple[str, str], ...] = ()
    is_consequence: bool = False


def of_error(error: Exception) -> Finding:
    """Returns the finding of a check that ended with an error."""
    first_line = printable(str(error)).partition("\n")[0]
    is_consequence = any(isinstance(cause, CommFailed) for cause in _causes(error))
    return Finding(
        FAIL,
        f"{type(error).__name__}: {first_line}",
        "Look at the output of the ranks for the whole error",
        is_consequence=is_consequence,
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def together(of_ranks: Sequence[Finding]) -> Finding:
    """Returns the worst of what the ranks have found, in their order; its sentence names the ranks that found it. Of
    failures the causes count, and not the ranks that waited for them."""
    worst = min((finding.status for finding in of_ranks), key=_WORST_FIRST.index)
    found = {rank: finding for rank, finding in enumerate(of_ranks) if finding.status == worst}
    causes = {rank: finding for rank, finding in found.items() if not finding.is_consequence}
    found = causes or found
    first = next(iter(found.values()))
    if worst in (OK, NOT_APPLICABLE):
        return first
    ranks_with: dict[str, list[int]] = {}
    for rank, finding in found.items():
        ranks_with.setdefault(finding.sentence, []).append(rank)
    figures = {**first.figures, "ranks": list(found)}
    if len(ranks_with) == 1 and len(found) == len(of_ranks):
        return replace(first, figures=figures)
    told = [f"{_names(ranks)}: {sentence}" for sentence, ranks in list(ranks_with.items())[:_SHOWN_RANKS]]
    return replace(first, sentence=" ".join(told), figures=figures)


def _names(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN_RANKS]))}{more}"
