# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares the pieces that the pages of ``ds_acco report`` are made of, and fills the page around them (templates/).

The page needs nothing outside of itself, and its own policy forbids it to load anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..words import printable
from . import figures as pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """Holds a text with lines in small print below it; with a chip of that color before it, or in the font of code."""

    text: str
    small: Sequence[str] = ()
    color: str | None = None
    is_code: bool = False

    @property
    def dark_color(self) -> str | None:
        """Returns the color of the chip on a dark page."""
        return pictures.DARK.get(self.color or "", self.color)


Text: TypeAlias = "str | Cell"


@dataclass(frozen=True)
class Paragraphs:
    """Holds sentences, each a paragraph; what stands between `backticks` is code."""

    sentences: Sequence[str]
    is_note: bool = False
    kind: ClassVar = "paragraphs"


@dataclass(frozen=True)
class Table:
    """Holds a table that scrolls in its own box; the first cell of a row is its heading."""

    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]
    kind: ClassVar = "table"


@dataclass(frozen=True)
class Pairs:
    """Holds names, each with its value or values, one below the other."""

    pairs: Sequence[tuple[Text, Text | Sequence[Text]]]
    kind: ClassVar = "pairs"


@dataclass(frozen=True)
class Picture:
    """Holds one picture, drawn for a screen and for a phone.

    Attributes:
        words: what it shows, for who does not see it.
    """

    wide: str
    narrow: str
    words: str
    caption: str = ""
    kind: ClassVar = "picture"


Piece: TypeAlias = Paragraphs | Table | Pairs | Picture


@dataclass(frozen=True)
class Section:
    """Holds a heading and what stands below it; ``look`` is a class of the style sheet."""

    title: str
    pieces: Sequence[Piece]
    look: str = ""


def picture(draw: Callable[[bool], Figure] | partial[Figure], words: str, caption: str = "") -> Picture:
    """Draws a picture for a screen and for a phone; ``draw`` is told whether for a phone."""
    return Picture(pictures.data_uri(draw(False)), pictures.data_uri(draw(True)), words, caption)


def whole_page(title: str, what: str, sections: Sequence[Section | None]) -> str:
    """Returns the HTML of a page.

    Args:
        what: a line below the title.
        sections: from top to bottom; None is left out.
    """
    template = _templates().get_template("page.html")
    return printable(template.render(title=title, what=what, sections=[one for one in sections if one is not None]))


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["with_code"] = _with_code
    return templates


def _with_code(text: str) -> Markup:
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
