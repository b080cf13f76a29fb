# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Puts numbers into words: one rounding and one unit for sentences, tables and pictures."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NOT_KNOWN = "–"
_LAYOUT = "\n\t"
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # classes of letters that turn others round
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@dataclass(frozen=True)
class Unit:
    """Describes a unit that values are shown in: ``factor`` times them, with ``digits`` behind the point."""

    name: str
    factor: float
    digits: int

    def number(self, value: float | None) -> str:
        """Returns the value without the unit's name, as under a heading that has it."""
        return number(value, self.digits, self.factor)

    def words(self, value: float | None) -> str:
        """Returns the value with the unit's name."""
        return self.number(value) if value is None else f"{self.number(value)} {self.name}"


def time_unit(seconds: Iterable[float | None]) -> Unit:
    """Returns the unit for steps: milliseconds where all are below a second."""
    return Unit("ms", 1e3, 1) if _largest(seconds) < 1 else Unit("s", 1.0, 3)


def clock_unit(seconds: Iterable[float | None]) -> Unit:
    """Returns the unit for the length of a training."""
    longest = _largest(seconds)
    if longest < 600:
        return Unit("s", 1.0, 1)
    return Unit("min", 1 / 60, 1) if longest < 36_000 else Unit("h", 1 / 3600, 2)


def memory_unit(sizes: Iterable[float | None]) -> Unit:
    """Returns the unit for memory, of bytes."""
    return Unit("MiB", 2**-20, 0) if _largest(sizes) < 2**30 else Unit("GiB", 2**-30, 2)


def wire_unit(sizes: Iterable[float | None]) -> Unit:
    """Returns the unit for what is sent, of bytes."""
    return Unit("MB", 1e-6, 1) if _largest(sizes) < 1e9 else Unit("GB", 1e-9, 1)


def _largest(values: Iterable[float | None]) -> float:
    return max((value for value in values if value is not None), default=0.0)


def number(value: float | None, digits: int = 3, factor: float = 1.0) -> str:
    """Returns ``factor`` times the value with so many digits behind the point."""
    return NOT_KNOWN if value is None else f"{value * factor:,.{digits}f}".replace("-", "\u2212")


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share in percent."""
    return NOT_KNOWN if share is None else f"{number(share, digits, 100)} %"


def loss(value: float | None) -> str:
    """Returns a loss."""
    return number(value, 4)


def listed(names: Sequence[str]) -> str:
    """Returns ``a, b and c``."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def counted(number: int, what: str) -> str:
    """Returns ``1 rank`` or ``2 ranks``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Returns the text with a replacement character for each that a page cannot hold, or that would steer a terminal:
    control characters but newline and tab, halves of surrogate pairs, what turns the direction of writing, and what is
    no character at all."""
    return "".join(letter if _is_printable(letter) else "\ufffd" for letter in text)


def _is_printable(letter: str) -> bool:
    if letter in _LAYOUT:
        return True
    is_character = unicodedata.category(letter) not in ("Cc", "Cs") and (ord(letter) & 0xFFFE) != 0xFFFE
    return is_character and unicodedata.bidirectional(letter) not in _TURNING


def shown(value: object) -> str:
    """Returns a value that was given, for a message: in one short line, however long or deep it is."""
    return _SHORT.repr(value)
