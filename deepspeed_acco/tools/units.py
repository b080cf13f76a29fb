# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the counts, rates, sizes and times that the options of ``ds_acco`` take, as argparse's ``type``.

A text that cannot be read raises ArgumentTypeError with what was given, what is allowed and an example.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial

from .words import shown

_NUMBER_AND_UNIT = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,2})?\s*([a-z/]*)", re.IGNORECASE)
_MOST = 10**18  # of a count: more of anything there is not, and products of a few of them are still floats
_LEAST, _LARGEST = Decimal("1e-30"), Decimal("1e30")  # likewise of what has a unit

_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BIT_RATES = {f"{prefix}bit": 10**power / 8 for prefix, power in (("", 0), ("k", 3), ("m", 6), ("g", 9), ("t", 12))}
_BYTE_RATES = {f"{prefix}B/s": 10.0**power for prefix, power in (("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12))}
_SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TIMES = {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}


def _split(text: str) -> tuple[Decimal, str] | None:
    """Returns the number, which is 0 or within 1e-30 and 1e30, and what stands behind it; None for anything else."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None:
        return None
    number = Decimal(match[1] + (match[2] or ""))
    return (number, match[3]) if number == 0 or _LEAST <= number <= _LARGEST else None


def _refusal(text: str, allowed: str, example: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{shown(text)} is not allowed; allowed: {allowed}, for example {example}")


def _quantity(text: str, units: Mapping[str, float | Decimal], example: str) -> float:
    """Reads a number > 0 in one of the units; the result is in that of which the factor is 1."""
    parts = _split(text)
    if parts is None or parts[1] not in units or parts[0] == 0:
        raise _refusal(text, f"a number > 0 and <= 1e30 with one of {', '.join(units)}", example)
    return float(Fraction(parts[0]) * Fraction(units[parts[1]]))


def count(text: str) -> int:
    """Reads a whole number >= 1: ``8``, ``7e9``, ``7B``, ``1.3B``, ``350M``."""
    return _count(text, _MOST)


def count_up_to(most: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers from 1 to ``most``."""
    return partial(_count, most=most)


def _count(text: str, most: int) -> int:
    parts = _split(text)
    factors = {unit.lower(): factor for unit, factor in _COUNTS.items()}
    if parts is not None and parts[1].lower() in factors:
        value = parts[0] * factors[parts[1].lower()]
        if 1 <= value <= most and value == int(value):
            return int(value)
    bound = f"{most:,}" if most < _MOST else "1e18"
    raise _refusal(text, f"a whole number >= 1 and <= {bound}, also with k, M, B (1e9) or T", "8, 7e9 or 1.3B")


def positive(text: str) -> float:
    """Reads a number > 0."""
    parts = _split(text)
    if parts is None or parts[1] or parts[0] == 0:
        raise _refusal(text, "a number > 0 and <= 1e30", "0.9")
    return float(parts[0])


def bandwidth(text: str) -> float:
    """Reads bytes/s: ``300mbit``, ``100Gbit``, ``25Gbit/s``, ``12.5GB/s``."""
    bits = text.strip().lower().removesuffix("/s")
    if bits.endswith("bit"):
        return _quantity(bits, _BIT_RATES, "25gbit")
    return _quantity(text, {**_BIT_RATES, **_BYTE_RATES}, "25gbit")


def link_rate(text: str) -> str:
    """Returns a rate as tc spells it, which has no ``/s`` behind its bits: ``25Gbit`` for ``25Gbit/s``."""
    return re.sub(r"(?<=bit)/s$", "", text.strip(), flags=re.IGNORECASE)


def size(text: str) -> float:
    """Reads bytes: ``80GB``, ``80GiB``."""
    return _quantity(text, _SIZES, "80GB")


def duration(text: str) -> float:
    """Reads seconds: ``10us``; ``0`` needs no unit."""
    parts = _split(text)
    return 0.0 if parts is not None and parts == (0, "") else _quantity(text, _TIMES, "10us")


def time_in(unit: str, *, or_zero: bool = False) -> Callable[[str], float]:
    """Returns a reader of times in ``unit``, which need not be written: in ``ms``, 300 for ``300`` and ``0.3s``.

    Args:
        unit: ``ns``, ``us``, ``ms`` or ``s``.
        or_zero: whether 0 is allowed.
    """

    def read(text: str) -> float:
        parts = _split(text)
        if parts is None or parts[1] not in ("", *_TIMES) or (parts[0] == 0 and not or_zero):
            bound = ">= 0" if or_zero else "> 0"
            raise _refusal(text, f"{unit} {bound} and <= 1e30, or with one of {', '.join(_TIMES)}", f"300 or 300{unit}")
        return float(parts[0] * _TIMES[parts[1] or unit] / _TIMES[unit])

    return read
