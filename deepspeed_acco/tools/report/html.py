# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The pieces that the pages of ``ds_acco report`` are made of: numbers in words, HTML, and the page around them.

The page needs nothing outside of itself, and its own policy forbids it to load anything.
"""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Sequence

from . import figures as pictures

# computation, exposed communication, the rest, a step that is not split
PART_COLOURS = ("#4C5B73", "#D55E00", "#C9CDD3", "#9AA3B0")
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds"}
_MOST_POINTS = 400


def time_unit(values: Sequence[float]) -> tuple[float, str]:
    """(what seconds are multiplied with, unit) for step times."""
    return (1e3, "ms") if max(values, default=0) < 1 else (1.0, "s")


def clock_unit(values: Sequence[float]) -> tuple[float, str]:
    """(what seconds are multiplied with, unit) for the length of a training."""
    longest = max(values, default=0)
    if longest < 600:
        return 1.0, "s"
    return (1 / 60, "min") if longest < 36_000 else (1 / 3600, "h")


def bytes_unit(values: Sequence[float]) -> tuple[float, str]:
    return (2**-20, "MiB") if max(values, default=0) < 2**30 else (2**-30, "GiB")


def number(value: float | None, digits: int = 3, factor: float = 1.0) -> str:
    return "–" if value is None else f"{value * factor:,.{digits}f}".replace("-", "\u2212")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %".replace("-", "\u2212")


def time_words(value: float | None, unit: tuple[float, str]) -> str:
    return number(value, 3 if unit[1] == "s" else 1, unit[0])


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def points(curve: Sequence[dict], x_key: str, y_key: str, factor: float) -> tuple[list[float], list[float]]:
    """(``factor`` times the values of x, values of y) where both are known."""
    known = [point for point in curve if point[x_key] is not None and point[y_key] is not None]
    return [point[x_key] * factor for point in known], [point[y_key] for point in known]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 400 points: medians of as many neighbours as that needs."""
    size = -(-len(x) // _MOST_POINTS)
    if size <= 1:
        return list(x), list(y)
    groups = range(0, len(x), size)
    return [statistics.median(x[i : i + size]) for i in groups], [statistics.median(y[i : i + size]) for i in groups]


def thinning_words(x: Sequence[float]) -> str:
    size = -(-len(x) // _MOST_POINTS)
    return f" Each point is the median of {size} windows." if size > 1 else ""


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def _html(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def _sentence(text: object) -> str:
    """With `code` in backticks as in this sentence."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _html(text))


def paragraphs(sentences: Sequence[object]) -> str:
    return "".join(f"<p>{_sentence(text)}</p>\n" for text in sentences)


def chip(index: int, name: str) -> Html:
    square = f'<i class="chip" style="background:{pictures.colour(index)}"></i>'
    return Html(f'<span class="name">{square}{html.escape(name)}</span>')


def name_words(name: str) -> Html:
    return Html(f'<span class="name">{html.escape(name)}</span>')


def with_interval(interval: dict | None, shown) -> Html:
    """The median, its interval in small print below."""
    if interval is None or interval["median"] is None:
        return Html("–")
    ends = "" if interval["low"] is None else f"{shown(interval['low'])} to {shown(interval['high'])}"
    return Html(f"{html.escape(shown(interval['median']))}<small>{html.escape(ends)}</small>")


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_html(row[0])}</th>{"".join(f"<td>{_html(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def picture(figure, words: str, caption: str = "") -> str:
    below = f"<figcaption>{_sentence(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{pictures.data_uri(figure)}" alt="{html.escape(words)}">{below}</figure>\n'


def pairs(pairs: Sequence[tuple[object, object]]) -> str:
    return "<dl>\n" + "".join(f"<dt>{_html(what)}</dt><dd>{_html(value)}</dd>\n" for what, value in pairs) + "</dl>\n"


def section(title: str, *pieces: str, kind: str = "") -> str:
    return f'<section class="{kind}">\n<h2>{html.escape(title)}</h2>\n{"".join(pieces)}</section>\n'


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2328; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; font-weight: 650; }
h2 { font-size: 19px; margin: 40px 0 10px; font-weight: 650; }
p { margin: 0 0 8px; }
.what, figcaption, .note { color: #57606a; }
.what { margin-bottom: 20px; }
.verdict { border-left: 4px solid #0072b2; background: #f3f7fa; padding: 14px 20px 8px; margin-top: 20px; }
.failed { border-left: 4px solid #b3261e; background: #fdf4f3; padding: 14px 20px 8px; margin-top: 14px; }
.verdict h2, .failed h2 { margin: 0 0 6px; font-size: 16px; }
.verdict p:first-of-type { font-size: 18px; font-weight: 600; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption, .note { font-size: 14px; margin-top: 6px; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: right; vertical-align: top; border-bottom: 1px solid #e2e5e9; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; color: #57606a; border-bottom: 1.5px solid #8c959f; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 140px; }
th small { white-space: nowrap; }
small { display: block; font-size: 12px; color: #57606a; font-weight: 400; }
.name { display: inline-flex; align-items: baseline; min-width: 90px; white-space: normal; overflow-wrap: anywhere; }
td .name, thead .name { justify-content: flex-end; }
.chip { flex: none; width: 10px; height: 10px; margin-right: 8px; border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
dl { display: grid; grid-template-columns: 190px 1fr; gap: 6px 16px; margin: 0; font-size: 15px; }
dt { color: #57606a; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13.5px/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, "Liberation Mono", monospace; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dt { margin-top: 6px; } }
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  table { font-size: 8.5pt; } th, td { padding: 4px 6px; } small { font-size: 7.5pt; }
  figure, tr, .verdict, .failed, dl { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
}
"""


def whole_page(title: str, what: str, *sections: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p class="what">{html.escape(what)}</p>
{"".join(sections)}</main>
</body>
</html>
"""


def code(text: str) -> Html:
    return Html(f"<code>{html.escape(text)}</code>")


def model_words(model: dict) -> str:
    if model.get("numel") is None:
        return "not known"
    words = f"{model['numel']:,} trainable parameters"
    words += f", weights of {model['weight_bytes']} bytes" if model.get("weight_bytes") else ""
    return words + (f", communicated in {model['comm_bytes']} bytes" if model.get("comm_bytes") else "")
