# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads JSON into dataclasses, which so are the declaration of a file, and writes them.

A field with a default may be null, missing or not finite (scripts that diverge write NaN): it then has its default. Any
other must be there, and a number must be finite. No number is negative unless the field's metadata say so. Keys that no
field declares are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from .words import shown

T = TypeVar("T")
# Metadata of a field: what its number, or those in its list, may be. A loss that explodes may be larger than any time.
SIGNED, ABOVE_ZERO = {"sign": "any"}, {"sign": "+"}
_LARGEST, _LARGEST_SIGNED, _SMALLEST = 1e30, 1e300, 1e-30
_WORDS = {str: "a text", float: "a number", int: "a whole number", bool: "true or false"}


def load(path: Path, **hooks: Any) -> Any:
    """Returns what a JSON file holds.

    Args:
        hooks: of ``json.loads``.

    Raises:
        ValueError: no regular file, unreadable, or no JSON; says why, without the path.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        return json.loads(path.read_text(encoding="utf-8"), **hooks)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of it is no UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(kind: type[T], value: Any, place: str = "") -> T:
    """Returns the ``kind``, a dataclass, that ``value`` describes.

    Args:
        value: as ``json.loads`` gives it.
        place: of ``value`` in its file, for messages.

    Raises:
        ValueError: names the place, what stands there, and what is allowed.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'it'} is {shown(value)}; allowed: an object")
    known = {}
    for field, hint in _declared(cast(Hashable, kind)):
        key = _key(field)
        if _is_missing(value.get(key)) and _has_default(field):
            continue
        if key not in value:
            raise ValueError(f"{place + ' has' if place else 'there is'} no key {key!r}")
        sign = field.metadata.get("sign", "")
        known[field.name] = _read_value(hint, sign, value[key], f"{place}.{key}" if place else key)
    return kind(**known)


def _read_value(hint: Any, sign: str, value: Any, place: str) -> Any:
    optional = NoneType in get_args(hint)
    if optional:
        if _is_missing(value):
            return None
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{place} is {shown(value)}; allowed: a list")
        (item,) = get_args(hint)
        return [_read_value(item, sign, part, f"{place}[{index}]") for index, part in enumerate(value)]
    if isinstance(hint, type) and is_dataclass(hint):
        return read(hint, value, place)
    if hint in (int, float):
        return _read_number(hint, sign, value, place)
    if type(value) is not hint:
        raise ValueError(f"{place} is {shown(value)}; allowed: {_WORDS[hint]}")
    return value


def _read_number(hint: Any, sign: str, value: Any, place: str) -> int | float:
    if type(value) is not int and (hint is int or type(value) is not float or not math.isfinite(value)):
        raise ValueError(f"{place} is {shown(value)}; allowed: {_WORDS[hint]}")
    least, most = {"any": (-_LARGEST_SIGNED, _LARGEST_SIGNED), "+": (_SMALLEST, _LARGEST)}.get(sign, (0.0, _LARGEST))
    if not least <= value <= most:
        raise ValueError(f"{place} is {shown(value)}; allowed: {_WORDS[hint]} from {least:g} to {most:g}")
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@cache
def _declared(kind: Any) -> list[tuple[Field, Any]]:
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind)]


def _key(field: Field) -> str:
    """Returns the key in the file: the field's name, or where that is a word of Python ``metadata={"key": ...}``."""
    return field.metadata.get("key", field.name)


def _has_default(field: Field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def written(value: Any) -> Any:
    """Returns what ``json.dumps`` takes: dataclasses become objects, in the order of their fields."""
    if is_dataclass(value):
        return {_key(field): written(getattr(value, field.name)) for field in fields(value)}
    return [written(item) for item in value] if isinstance(value, list) else value


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """Returns (place, value) of each line of JSON; a last one that its writer was killed in is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append((f"{path}, line {number}", json.loads(line)))
        except RecursionError as error:
            raise ValueError(f"{path}, line {number} is nested too deeply") from error
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from error
    return values


def read_line(kind: type[T], line: tuple[str, Any]) -> T:
    """Returns the ``kind`` that one line of :func:`read_lines` describes.

    Raises:
        ValueError: as :func:`read`, with the line's place.
    """
    place, value = line
    try:
        return read(kind, value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
