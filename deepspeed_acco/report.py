# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco report``: one HTML file with the pictures and figures of a comparison, or of one run.

The file needs nothing outside of itself: pictures are SVG in data URIs, and its own policy forbids it to load anything.
"""

from __future__ import annotations

import argparse
import html
import itertools
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import pictures
from .pictures import Bar, Line, Panel
from .report_data import Run, read_results, read_run

_PART_NAMES = ("computation", "exposed communication", "overhead", "step time, not split")
_PART_COLOURS = ("#4C5B73", "#D55E00", "#C9CDD3", "#9AA3B0")
_BOUND_WORDS = (
    "The bound is what a step takes at best: max(A, R) + max(B, R) for acco, max(C, R) for wp and dpu, C + R for sync."
)
_ADAPTIVE_BOUND = "With adaptive windows it is what the samples take when no rank ever waits."
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds"}
_WARM_UP_STEPS = 2
_MOST_POINTS = 400
_MOST_RANKS = 32


def add_command(commands) -> None:
    """Adds ``report`` to the object of ``ArgumentParser.add_subparsers``."""
    parser = commands.add_parser("report", help="one HTML file with the pictures of a comparison or of one run")
    parser.add_argument(
        "source",
        metavar="RUN",
        type=Path,
        help="results.json of `ds_acco compare` or its folder; or the folder of one run with metrics.jsonl, "
        "rank*.jsonl or the CSV files of DeepSpeed's monitor",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in that folder")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    source, out = options.source, options.out
    try:
        pictures.require_matplotlib()
        if not source.exists():
            raise ValueError(f"{source} does not exist; give a results.json, its folder, or the folder of one run")
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out} is not allowed; allowed: a file in a folder that exists")
        if source.is_dir() and not (source / "results.json").is_file():
            written = write_run(source, out)
        else:
            written = write(source / "results.json" if source.is_dir() else source, out)
    except (ValueError, OSError) as error:
        print(f"ds_acco report: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"ds_acco report: {error}", file=sys.stderr)
        return 1
    print(written)
    return 0


def write(results: Path, out: Path | None = None) -> Path:
    """Writes the report of a comparison and returns its path.

    Args:
        results: the ``results.json`` of ``ds_acco compare``.
        out: the HTML file; default: ``report.html`` beside ``results``.

    Raises:
        ValueError: ``results`` cannot be read; says why and what to do.
        ModuleNotFoundError: there is no matplotlib; says how to install it.
    """
    pictures.require_matplotlib()
    page = comparison_page(read_results(results))
    return _written(page, out or results.parent / "report.html")


def write_run(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of one run and returns its path.

    Args:
        folder: has metrics.jsonl, rank*.jsonl and/or the CSV files of DeepSpeed's monitor.
        out: the HTML file; default: ``report.html`` in ``folder``.

    Raises:
        ValueError, ModuleNotFoundError: as :func:`write`.
    """
    pictures.require_matplotlib()
    return _written(run_page(read_run(folder)), out or folder / "report.html")


def _written(page: str, path: Path) -> Path:
    path.write_text(page, encoding="utf-8")
    return path


# ---- units and words


def _time_unit(values: Sequence[float]) -> tuple[float, str]:
    """(what seconds are multiplied with, unit) for step times."""
    return (1e3, "ms") if max(values, default=0) < 1 else (1.0, "s")


def _clock_unit(values: Sequence[float]) -> tuple[float, str]:
    """(what seconds are multiplied with, unit) for the length of a training."""
    longest = max(values, default=0)
    if longest < 600:
        return 1.0, "s"
    return (1 / 60, "min") if longest < 36_000 else (1 / 3600, "h")


def _bytes_unit(values: Sequence[float]) -> tuple[float, str]:
    return (2**-20, "MiB") if max(values, default=0) < 2**30 else (2**-30, "GiB")


def _figure(value: float | None, digits: int = 3, factor: float = 1.0) -> str:
    return "–" if value is None else f"{value * factor:,.{digits}f}".replace("-", "\u2212")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %".replace("-", "\u2212")


def _time(value: float | None, unit: tuple[float, str]) -> str:
    return _figure(value, 3 if unit[1] == "s" else 1, unit[0])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


# ---- what the pictures of a comparison show


def measured(results: dict) -> list[tuple[int, dict]]:
    """(index, configuration) of those that did not fail and have a step time."""
    configs = enumerate(results["configs"])
    return [(index, config) for index, config in configs if not config["failed"] and config["step_s"]]


def is_adaptive(config: dict) -> bool:
    """Whether its steps differ in size."""
    return config["accumulation"] == "adaptive"


def to_nominal(results: dict, config: dict) -> float:
    """What a time per step is multiplied with to be one per nominal batch, as every fixed step has: 1 but for adaptive
    windows."""
    own, nominal = config["samples_per_step"], results["samples_per_step"]
    return nominal / own if is_adaptive(config) and own and nominal else 1.0


def batch_lines(results: dict) -> list[Line]:
    """Samples of each optimizer step, one line per pass of each adaptive configuration that did not fail."""
    lines = []
    for index, config in enumerate(results["configs"]):
        for run in [] if config["failed"] else config["runs"]:
            if run["batch"]:
                steps = range(1, len(run["batch"]) + 1)
                lines.append(Line(config["name"], index, *thinned(steps, run["batch"])))
    return lines


def loss_lines(results: dict, key: str, factor: float) -> list[Line]:
    """One line per pass of each configuration that did not fail: ``val_loss`` against ``factor`` times ``key``
    ("seconds" or "samples"). Points without one of both are left out."""
    lines = []
    for index, config in enumerate(results["configs"]):
        for run in [] if config["failed"] else config["runs"]:
            x, y = _points(run["curve"] or [], key, "val_loss", factor)
            if x:
                lines.append(Line(config["name"], index, x, y))
    return lines


def _points(curve: Sequence[dict], x_key: str, y_key: str, factor: float) -> tuple[list[float], list[float]]:
    points = [point for point in curve if point[x_key] is not None and point[y_key] is not None]
    return [point[x_key] * factor for point in points], [point[y_key] for point in points]


def step_bars(results: dict, unit: tuple[float, str]) -> list[Bar]:
    """Time of each measured configuration per nominal batch, split; in ``unit``."""
    bars = []
    for index, config in measured(results):
        step, scale = config["step_s"], to_nominal(results, config)
        factor = unit[0] * scale
        remark = f"{_time(step['median'] * scale, unit)} {unit[1]}"
        if config["of_bound"] is not None:
            remark += f"   {config['of_bound']:.3f} × bound"
        low, high, bound = (
            None if value is None else value * factor for value in (step["low"], step["high"], config["bound_s"])
        )
        parts = [part * factor for part in drawn_parts(config)]
        bars.append(Bar(config["name"], index, parts, remark, low, high, bound))
    return bars


def drawn_parts(config: dict) -> list[float]:
    """Seconds of compute, exposed communication, overhead and, where they are not known, of the step as a whole.

    Together they are the step time, so a negative part (a step shorter than the reference's compute) is drawn as 0 and
    shortens the part before it.
    """
    split = config["split"]
    if split is None:
        return [0.0, 0.0, 0.0, config["step_s"]["median"]]
    rest = 0.0
    parts: list[float] = []
    for key in ("overhead_s", "exposed_s", "compute_s"):
        parts.insert(0, max(0.0, split[key] + rest))
        rest = min(0.0, split[key] + rest)
    return [*parts, 0.0]


def memory_bars(results: dict, unit: tuple[float, str]) -> list[Bar]:
    """Peak memory of each configuration that did not fail, in ``unit``: the bar is the highest rank, dots are all."""
    bars = []
    for index, config in enumerate(results["configs"]):
        peaks = [peak * unit[0] for peak in config["peak_bytes"] or [] if peak is not None]
        if peaks and not config["failed"]:
            remark = f"{_figure(max(peaks), 0 if unit[1] == 'MiB' else 2)} {unit[1]}"
            bars.append(Bar(config["name"], index, [max(peaks)], remark, dots=peaks))
    return bars


# ---- pieces of HTML


class _Html(str):
    """Text that is HTML already; everything else is escaped."""


def _html(value: object) -> str:
    return value if isinstance(value, _Html) else html.escape(str(value))


def _sentence(text: object) -> str:
    """With `code` in backticks as in this sentence."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _html(text))


def _paragraphs(sentences: Sequence[object]) -> str:
    return "".join(f"<p>{_sentence(text)}</p>\n" for text in sentences)


def _chip(index: int, name: str) -> _Html:
    square = f'<i class="chip" style="background:{pictures.colour(index)}"></i>'
    return _Html(f'<span class="name">{square}{html.escape(name)}</span>')


def _name(name: str) -> _Html:
    return _Html(f'<span class="name">{html.escape(name)}</span>')


def _with_interval(interval: dict | None, shown) -> _Html:
    """The median, its interval in small print below."""
    if interval is None or interval["median"] is None:
        return _Html("–")
    ends = "" if interval["low"] is None else f"{shown(interval['low'])} to {shown(interval['high'])}"
    return _Html(f"{html.escape(shown(interval['median']))}<small>{html.escape(ends)}</small>")


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_html(row[0])}</th>{"".join(f"<td>{_html(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _picture(figure, words: str, caption: str = "") -> str:
    below = f"<figcaption>{_sentence(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{pictures.data_uri(figure)}" alt="{html.escape(words)}">{below}</figure>\n'


def _pairs(pairs: Sequence[tuple[object, object]]) -> str:
    return "<dl>\n" + "".join(f"<dt>{_html(what)}</dt><dd>{_html(value)}</dd>\n" for what, value in pairs) + "</dl>\n"


def _section(title: str, *pieces: str, kind: str = "") -> str:
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
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 110px; }
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


def _page(title: str, what: str, *sections: str) -> str:
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


# ---- the page of a comparison


def comparison_page(results: dict) -> str:
    """The HTML of what :func:`~deepspeed_acco.report_data.read_results` returned."""
    what = [Path(results["script"]).name, _ranks_words(results), results["network"], results["date"]]
    if results["emulated_ms"] is not None:
        what.append(f"emulated computation, {results['emulated_ms']:g} ms per micro-batch")
    return _page(
        "ACCO beside DeepSpeed's ZeRO",
        " · ".join(what),
        _section("Verdict", _paragraphs(results["verdict"] or ["results.json holds no verdict."]), kind="verdict"),
        _failures(results),
        _section("Step time", _step_picture(results)),
        _batch_picture(results),
        _section("Validation loss", _loss_picture(results)),
        _section("Memory per rank", _memory_picture(results)),
        _section("Figures", _figures_table(results)),
        _section("Speed-up", _speedup_table(results)),
        _section("What it is worth", _manager_table(results)),
        _section("What was run", _pairs(_what_was_run(results))),
        _section("How to read this", _pairs(_TERMS)),
    )


def _ranks_words(results: dict) -> str:
    if results["world_size"] is None:
        return "number of ranks not known"
    words = f"{results['world_size']} rank{'s' if results['world_size'] != 1 else ''}"
    return words if results["device"] is None else f"{words} on {results['device']}"


def _failures(results: dict) -> str:
    failed = [config for config in results["configs"] if config["failed"]]
    if not failed:
        return ""
    lines = [_Html(f"<b>{html.escape(config['name'])}</b>: {html.escape(config['failed'])}") for config in failed]
    lines.append("They are in no picture, and no figure of theirs is used.")
    return _section("Failed configurations", _paragraphs(lines), kind="failed")


def _step_picture(results: dict) -> str:
    unit = _time_unit([config["step_s"]["median"] for _, config in measured(results)])
    bars = step_bars(results, unit)
    if not bars:
        return _paragraphs(["No configuration has a step time, so there is nothing to draw."])
    adaptive = [config["name"] for _, config in measured(results) if is_adaptive(config)]
    what = "optimizer step" if not adaptive else f"{results['samples_per_step']:,} samples"
    words = [f"Time per {what} in {unit[1]} of each configuration."]
    for bar in bars:
        parts = [f"{name} {part:.4g}" for name, part in zip(_PART_NAMES, bar.parts) if part]
        bound = "" if bar.bound is None else f", bound {bar.bound:.4g}"
        words.append(f"{bar.label}: {sum(bar.parts):.4g} ({', '.join(parts)}{bound}).")
    caption = ["Medians; shorter is better."]
    if any(bar.bound is not None for bar in bars):
        caption.append(_BOUND_WORDS)
    if adaptive:
        caption.append(f"The steps of {_listed(adaptive)} differ in size, so all times are per nominal batch.")
        caption.append(_ADAPTIVE_BOUND)
    notes = dict.fromkeys(
        config["split"]["note"] for _, config in measured(results) if config["split"] and config["split"]["note"]
    )
    caption += [f"Exposed in DeepSpeed's own stages: {note.rstrip('.')}." for note in notes]
    if any(config["split"] and min(_split_parts(config)) < 0 for _, config in measured(results)):
        caption.append("A part that is negative in the table is drawn as nothing.")
    x_label = f"{_UNIT_NAMES[unit[1]]} per {what}"
    figure = pictures.draw_bars(
        bars, _PART_NAMES, _PART_COLOURS, x_label, interval_name="95 % interval", bound_name="bound"
    )
    return _picture(figure, " ".join(words), " ".join(caption))


def _batch_picture(results: dict) -> str:
    """Empty where no configuration is adaptive."""
    lines = batch_lines(results)
    if not lines:
        return ""
    nominal = results["samples_per_step"]
    level = None if nominal is None else (float(nominal), f"nominal, {nominal:,}")
    words = ["Samples per optimizer step. Median and last:"]
    words += [f"{line.label} {statistics.median(line.y):,.0f}, {line.y[-1]:,.0f};" for line in lines]
    caption = "All ranks together. A window grows until the round behind it is finished, on each rank by itself."
    caption += " One line per pass." if results["passes"] > 1 else ""
    panel = Panel("optimizer step", "samples per step", lines, from_zero=True, level=level)
    return _section(
        "Batch size over steps", _picture(pictures.draw_lines([panel], height=3.4), " ".join(words), caption)
    )


def _split_parts(config: dict) -> list[float]:
    return [config["split"][key] for key in ("compute_s", "exposed_s", "overhead_s")]


def _loss_picture(results: dict) -> str:
    seconds = loss_lines(results, "seconds", 1.0)
    clock = _clock_unit([line.x[-1] for line in seconds])
    tokens = results["tokens_per_sample"]
    data = "samples" if tokens is None else "tokens"
    panels = [
        Panel(f"training time in {clock[1]}", "validation loss", loss_lines(results, "seconds", clock[0])),
        Panel(f"{data} seen", "validation loss", loss_lines(results, "samples", tokens or 1.0)),
    ]
    panels = [panel for panel in panels if panel.lines]
    without = [
        config["name"]
        for index, config in enumerate(results["configs"])
        if not config["failed"] and not any(line.index == index for panel in panels for line in panel.lines)
    ]
    missing = (
        f"No curve of {_listed(without)}: the runs wrote no finite validation loss to metrics.jsonl." if without else ""
    )
    if not panels:
        return _paragraphs([missing or "No configuration has a curve, so there is nothing to draw."])
    close = _close_up(panels)
    words = [f"Validation loss against training time and against {data}. Last values:"]
    words += [f"{line.label} {line.y[-1]:.4g} at {line.x[-1]:.4g};" for line in panels[0].lines]
    caption = ["Training time does not count the validations."]
    if results["passes"] > 1:
        caption.append("One line per pass.")
    caption += [missing] if missing else []
    if not close:
        return _picture(pictures.draw_lines(panels), " ".join(words), " ".join(caption))
    whole = _picture(pictures.draw_lines(panels, height=3.6, legend=False), " ".join(words))
    caption.insert(0, "Above the whole curves, below their lower end.")
    words = ["The same lines, only the lower end of the losses."]
    return whole + _picture(pictures.draw_lines(close, height=3.8), words[0], " ".join(caption))


def _close_up(panels: Sequence[Panel]) -> list[Panel]:
    """The panels cut off above the highest last loss; none where that shows no more than they do."""
    losses = [loss for panel in panels for line in panel.lines for loss in line.y]
    last = [line.y[-1] for panel in panels for line in panel.lines]
    top = max(last) + 0.1 * (max(losses) - min(losses))
    if top - min(losses) > 0.6 * (max(losses) - min(losses)):
        return []
    return [replace(panel, top=top) for panel in panels]


def _memory_picture(results: dict) -> str:
    peaks = [peak for config in results["configs"] for peak in config["peak_bytes"] or [] if peak is not None]
    unit = _bytes_unit(peaks)
    bars = memory_bars(results, unit)
    without = [
        config["name"]
        for index, config in enumerate(results["configs"])
        if not config["failed"] and not any(bar.index == index for bar in bars)
    ]
    missing = f"Not measured for {_listed(without)}." if without else ""
    if not bars:
        return _paragraphs([missing or "No configuration has a figure, so there is nothing to draw."])
    words = [f"Peak memory in {unit[1]} of the highest rank.", *(f"{bar.label}: {bar.parts[0]:.4g}." for bar in bars)]
    measure = "torch.cuda.max_memory_allocated" if results["device"] == "cuda" else "peak resident memory"
    figure = pictures.draw_bars(bars, [""], [None], f"{unit[1]} per rank", dots_name="each rank")
    return _picture(figure, " ".join(words), f"The highest rank, {measure}. {missing}".strip())


def _figures_table(results: dict) -> str:
    """Two tables, since one would be too wide for a narrow window or paper."""
    return _times_table(results) + _costs_table(results) + _pass_note(results)


def _row_name(index: int, config: dict) -> _Html:
    """With what it is in small print."""
    setting = config["schedule"] or (None if config["stage"] is None else f"ZeRO-{config['stage']}")
    more = ["adaptive"] if is_adaptive(config) else []
    more += [config["estimate_comm"]] if config["estimate_comm"] not in (None, "full") else []
    detail = " · ".join(part for part in (config["optimizer"], setting, *more) if part)
    return _Html(f"{_chip(index, config['name'])}<small>{html.escape(detail)}</small>")


def _times_table(results: dict) -> str:
    unit = _time_unit([config["step_s"]["median"] for _, config in measured(results)])
    head: list[object] = ["", f"step, {unit[1]}", _Html(f"bound, {unit[1]}<small>step / bound</small>")]
    head += ["compute", "exposed", "overhead", _Html("samples/s<small>samples / step</small>")]
    rows: list[list[object]] = []
    for index, config in enumerate(results["configs"]):
        if config["failed"]:
            rows.append([_row_name(index, config), "failed", *["–"] * (len(head) - 2)])
            continue
        split = _split_parts(config) if config["split"] else [None] * 3
        speed = config["samples_per_s"] and config["samples_per_s"]["median"]
        rows.append(
            [
                _row_name(index, config),
                _with_interval(config["step_s"], lambda value: _time(value, unit)),
                _Html(f"{_time(config['bound_s'], unit)}<small>{_of_bound(config)}</small>"),
                *(_time(part, unit) for part in split),
                _Html(f"{_figure(speed, 1)}<small>{_figure(config['samples_per_step'], 0)}</small>"),
            ]
        )
    return _table(head, rows)


def _costs_table(results: dict) -> str:
    peaks = [peak for config in results["configs"] for peak in config["peak_bytes"] or [] if peak is not None]
    memory = _bytes_unit(peaks)
    sent = _wire_unit([config["sent_bytes"] for config in results["configs"] if config["sent_bytes"] is not None])
    head: list[object] = ["", "hidden", "idle", f"memory, {memory[1]}"]
    head += [_Html(f"sent, {sent[1]}<small>step and rank</small>")] if sent else []
    head.append("final validation loss")
    rows: list[list[object]] = []
    for index, config in enumerate(results["configs"]):
        if config["failed"]:
            continue
        own = [peak for peak in config["peak_bytes"] or [] if peak is not None]
        row = [_row_name(index, config), _share(config["hidden_share"]), _share(config["idle_share"])]
        row.append(_figure(max(own, default=None), 0 if memory[1] == "MiB" else 2, memory[0]))
        row += [_figure(config["sent_bytes"], 1, sent[0])] if sent else []
        rows.append([*row, _with_interval(config["final_val_loss"], lambda value: _figure(value, 4))])
    return _table(head, rows) if rows else ""


def _wire_unit(values: Sequence[float]) -> tuple[float, str] | None:
    """(what bytes are multiplied with, unit); None without any: it was not counted."""
    if not values:
        return None
    return (1e-6, "MB") if max(values) < 1e9 else (1e-9, "GB")


def _of_bound(config: dict) -> str:
    return "" if config["of_bound"] is None else f"{config['of_bound']:.3f}"


def _pass_note(results: dict) -> str:
    text = f"Below a median: its 95 % interval over {results['passes']} alternating passes."
    if results["passes"] == 1:
        text = "Below a median: its 95 % interval. There was one pass only, so how much passes differ is not in it."
    return f'<p class="note">{text}</p>\n'


def _speedup_table(results: dict) -> str:
    ratios = {(ratio["config"], ratio["baseline"]): ratio for ratio in results["ratios"]}
    if not ratios:
        return _paragraphs(["results.json compares no configuration of ACCO with one of DeepSpeed's own."])
    places = {config["name"]: index for index, config in enumerate(results["configs"])}
    baselines = list(dict.fromkeys(baseline for _, baseline in ratios))
    rows = []
    for name in dict.fromkeys(name for name, _ in ratios):
        cells = []
        for baseline in baselines:
            ratio = ratios.get((name, baseline))
            cell = _with_interval(ratio and ratio["speedup"], _figure)
            cells.append(_Html(cell + f"<small>{html.escape(ratio['verdict'])}</small>") if ratio else cell)
        rows.append([_chip(places.get(name, 0), name), *cells])
    is_per_sample = any(is_adaptive(config) for _, config in measured(results))
    note = f"{'Time per sample' if is_per_sample else 'Step time'} of the configuration on top divided by that of the "
    note += "row, pass by pass: above 1 the row is faster."
    return (
        _table(["", *(_Html(f"over<br>{_name(baseline)}") for baseline in baselines)], rows)
        + f'<p class="note">{note}</p>\n'
    )


def _manager_table(results: dict) -> str:
    if not results["manager"]:
        return _paragraphs(["results.json has no such figures."])
    configs = {config["name"]: (index, config) for index, config in enumerate(results["configs"])}
    rows = []
    for line in results["manager"]:
        index, _ = configs.get(line["config"], (0, None))
        _, baseline = configs.get(line["baseline"], (0, None))
        rows.append(
            [
                _chip(index, line["config"]),
                _name(line["baseline"]),
                _share(line["idle_share"]),
                _share(baseline["idle_share"] if baseline else None),
                _share(line["hidden_share"]),
                _share(line["saved_share"]),
                _figure(line["saved_hours_per_1000_accelerator_hours"], 0),
            ]
        )
    head: list[object] = ["", "instead of", "accelerators idle", "idle before", "communication hidden", "time saved"]
    head.append(_Html("accelerator-hours<br>saved of 1000"))
    is_per_sample = any(is_adaptive(config) for _, config in measured(results))
    note = f"For the same number of {'samples' if is_per_sample else 'steps'}. A negative figure is a loss."
    return _table(head, rows) + f'<p class="note">{note}</p>\n'


def _what_was_run(results: dict) -> list[tuple[object, object]]:
    model, reference = results["model"] or {}, results["reference"] or {}
    compute, round_, micro = (reference.get(key) for key in ("compute_s", "round_s", "micro_batch_s"))
    unit = _time_unit([value for value in (compute, round_) if value is not None])
    pairs: list[tuple[object, object]] = [
        ("command", _code(results["command"])),
        ("script", _code(" ".join([results["script"], *results["arguments"]]))),
        ("date", results["date"]),
        ("machine", results["machine"]),
        ("network", results["network"]),
        ("ranks", _ranks_words(results)),
    ]
    if results["emulated_ms"] is not None:
        emulated = f"emulated: each micro-batch waits {results['emulated_ms']:g} ms; the rest is real"
        pairs.append(("computation", emulated))
    pairs.append(("model", _model_words(model)))
    batch = [f"n = {results['n']} micro-batches a step"] if results["n"] is not None else []
    batch += [f"{results['samples_per_step']:,} samples a step"] if results["samples_per_step"] is not None else []
    batch += [f"{results['tokens_per_sample']:g} tokens a sample"] if results["tokens_per_sample"] is not None else []
    pairs.append(("batch", ", ".join(batch) or "not known"))
    pairs.append(("passes", f"{results['passes']}, the configurations in alternation"))
    if compute is None or round_ is None:
        failure = reference.get("failed")
        pairs.append(("C and R", f"not measured: {failure}" if failure else "not measured"))
    else:
        words = f"C = {_time(compute, unit)} {unit[1]}, R = {_time(round_, unit)} {unit[1]}, "
        words += f"R/C = {_figure(round_ / compute) if compute > 0 else '–'}"
        words += "" if micro is None else f", one micro-batch C/n = {_time(micro, unit)} {unit[1]}"
        pairs.append(("C and R", words))
    files = [f"{config['name']}: {config['file']}" for config in results["configs"] if config["file"]]
    pairs.append(("configurations", _Html("<br>".join(_code(file) for file in files)) if files else "not known"))
    return pairs


def _code(text: str) -> _Html:
    return _Html(f"<code>{html.escape(text)}</code>")


def _model_words(model: dict) -> str:
    if model.get("numel") is None:
        return "not known"
    words = f"{model['numel']:,} trainable parameters"
    words += f", weights of {model['weight_bytes']} bytes" if model.get("weight_bytes") else ""
    return words + (f", communicated in {model['comm_bytes']} bytes" if model.get("comm_bytes") else "")


_TERMS: list[tuple[object, object]] = [
    ("C", "computation of one optimizer step (its n micro-batches) on one rank while nothing communicates."),
    ("R", "one round with nothing beside it: reduce-scatter of the gradients, update, all-gather of the weights."),
    (
        "A, B",
        "computation of the step's two phases, of a and b of its n micro-batches: A = a/n C, B = b/n C, A + B = C.",
    ),
    (
        "bound",
        "what a step takes at best. acco runs one round behind each phase: max(A, R) + max(B, R). wp and dpu run one "
        "behind the whole step: max(C, R). sync hides nothing: C + R. For DeepSpeed's own stages none is given. The R "
        "of a quantised ESTIMATE (int8, int4) is its own, measured in the runs of that configuration. With adaptive "
        "windows: what a step's samples take when every rank computes all the time at its own speed.",
    ),
    (
        "computation",
        "C, measured in a run of the schedule sync; the same for every configuration, but in adaptive ones of "
        "as many samples as the step has.",
    ),
    ("exposed", "how long training stood waiting for communication; for DeepSpeed's own stages all of the step but C."),
    ("overhead", "what remains: the step without computation and exposed communication."),
    ("hidden", "part of the rounds' time that cost training nothing."),
    ("idle", "part of the step in which the accelerator does not compute the model: 1 \u2212 C / step."),
    ("interval", "95 %, by bootstrap over passes and steps. Where it contains 1, a speed-up is not shown."),
    ("time saved", "1 \u2212 step / step of the configuration it replaces; times 1000 for accelerator-hours."),
]


# ---- the page of one run


def windows(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Per window of rank 0, name -> (samples, values): ``exposed_wait_ms``, ``round_ms``, ``hidden_share``,
    ``estimate_error`` and whatever else the monitor wrote.

    The monitor's are taken as they are; the recorder's fill in what it did not write.
    """
    series = {name: values for name, values in run.events.items() if values[0]}
    if run.headers:
        samples = samples_so_far(run)
        lines = [step for step in run.steps[0] if step["round_s"] and step["exposed_s"] is not None]
        recorded = {
            "exposed_wait_ms": [1e3 * step["exposed_s"] for step in lines],
            "round_ms": [1e3 * step["round_s"] for step in lines],
            "hidden_share": [max(0.0, 1 - step["exposed_s"] / step["round_s"]) for step in lines],
        }
        for name, values in recorded.items():
            if lines:
                series.setdefault(name, ([samples[step["step"]] for step in lines], values))
    return series


def batch_sizes(run: Run) -> list[int]:
    """Samples of each recorded step, all ranks together; empty unless windows are adaptive and every rank is there."""
    own = [[step["samples"] for step in steps] for steps in run.steps]
    is_whole = run.headers and len(own) == (run.headers[0]["world_size"] or len(own))
    if not is_whole or any(None in samples for samples in own):
        return []
    return [sum(of_step) for of_step in zip(*own)]


def samples_so_far(run: Run) -> dict[int, float]:
    """Step number -> samples trained at its end, as recorded or, with fixed windows, as the batch size says."""
    per_step, sizes = run.headers[0]["samples_per_step"], batch_sizes(run)
    steps = [step["step"] for step in run.steps[0]]
    if len(sizes) < len(steps):
        return {step: float(step * per_step) for step in steps}
    return dict(zip(steps, map(float, itertools.accumulate(sizes))))


def timed_steps(run: Run) -> list[list[dict]]:
    """Per rank, the steps whose time counts: not the first two, which load and build, and none that an evaluation or a
    checkpoint fell into."""
    return [
        [step for step in steps[_WARM_UP_STEPS:] if step["step_s"] is not None and not step["looked"]]
        for steps in run.steps
    ]


def run_step_bars(run: Run, unit: tuple[float, str]) -> list[Bar]:
    """Median step of each rank, in ``unit``: for ACCO (all but the exposed wait, exposed wait, 0, 0), for another
    optimizer (0, 0, outside of ``engine.step()``, inside)."""
    bars = []
    for header, steps in zip(run.headers, timed_steps(run)):
        if not steps:
            continue
        whole = statistics.median(step["step_s"] for step in steps)
        exposed = [step["exposed_s"] for step in steps if step["exposed_s"] is not None]
        inside = [step["inside_s"] for step in steps if step["inside_s"] is not None]
        if exposed:
            wait = min(whole, statistics.median(exposed))
            parts = [whole - wait, wait, 0.0, 0.0]
        else:
            within = min(whole, statistics.median(inside)) if inside else 0.0
            parts = [0.0, 0.0, whole - within, within]
        parts = [part * unit[0] for part in parts]
        bars.append(Bar(f"rank {header['rank']}", 0, parts, f"{_time(whole, unit)} {unit[1]}"))
    return bars


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 400 points: medians of as many neighbours as that needs."""
    size = -(-len(x) // _MOST_POINTS)
    if size <= 1:
        return list(x), list(y)
    groups = range(0, len(x), size)
    return [statistics.median(x[i : i + size]) for i in groups], [statistics.median(y[i : i + size]) for i in groups]


def run_page(run: Run) -> str:
    """The HTML of what :func:`~deepspeed_acco.report_data.read_run` returned."""
    series = windows(run)
    header = run.headers[0] if run.headers else {}
    return _page(
        f"One training run: {run.folder.resolve().name}",
        _optimizer_words(header) if header else "No recorder file tells its optimizer and batch.",
        _section("What it shows", _paragraphs(_run_words(run, series)), kind="verdict"),
        _section("Loss", _run_loss_picture(run)),
        _section("Rounds, window by window", _rounds_picture(series)),
        _section("Step time", _run_step_picture(run)),
        _run_batch_picture(run),
        _section("Error of the estimate", _error_picture(series)),
        _section("Memory per rank", _run_memory_picture(run)),
        _section("Figures", _run_table(run, series)),
        _section("What was read", _pairs(_what_was_read(run, header))),
        _section("How to read this", _pairs(_RUN_TERMS)),
    )


def _optimizer_words(header: dict) -> str:
    schedule = f", schedule {header['schedule']}" if header["schedule"] else ""
    words = [f"{header['optimizer'] or 'optimizer not known'}{schedule}"]
    words += [f"ZeRO stage {header['stage']}"] if header["stage"] is not None else []
    words += [f"{header['world_size']} ranks"] if header["world_size"] is not None else []
    words += [f"on {header['device']}"] if header["device"] else []
    return " · ".join(words)


def _run_words(run: Run, series: dict) -> list[str]:
    words = []
    if "exposed_wait_ms" in series and "round_ms" in series:
        hidden = _hidden_share(series)
        wait = statistics.median(series["exposed_wait_ms"][1])
        words.append(
            f"{_share(hidden)} of the communication was hidden; in a median window training waited "
            f"{_figure(wait, 1)} ms for rounds of {_figure(statistics.median(series['round_ms'][1]), 1)} ms."
        )
    else:
        words.append("How much communication was hidden is not known: nothing here holds the times of ACCO's rounds.")
    losses = [line for line in run.metrics if line["val_loss"] is not None]
    if losses:
        steps = "" if losses[-1]["step"] is None else f" after {losses[-1]['step']:,} steps"
        words.append(f"Last validation loss: {losses[-1]['val_loss']:.4f}{steps}.")
    skipped = series.get("skipped_commits")
    if skipped and skipped[1][-1] > 0:
        words.append(f"{skipped[1][-1]:.0f} steps were skipped for a non-finite gradient.")
    words.append("Whether ACCO pays cannot be seen in one run; `ds_acco compare` measures it.")
    return words


def _hidden_share(series: dict) -> float:
    """Of all windows together."""
    rounds = sum(series["round_ms"][1])
    return max(0.0, 1 - sum(series["exposed_wait_ms"][1]) / rounds) if rounds else 0.0


def _run_loss_picture(run: Run) -> str:
    panels = []
    seconds = [line["seconds"] for line in run.metrics if line["seconds"] is not None]
    clock = _clock_unit(seconds)
    for key, factor, x_label in (
        ("seconds", clock[0], f"training time in {clock[1]}"),
        ("samples", 1.0, "samples seen"),
    ):
        lines = []
        for index, (loss, label) in enumerate((("val_loss", "validation loss"), ("loss", "training loss"))):
            x, y = _points(run.metrics, key, loss, factor)
            if x:
                lines.append(Line(label, index, *thinned(x, y)))
        if lines:
            panels.append(Panel(x_label, "loss", lines))
    if not panels:
        return _paragraphs(["No loss: there is no metrics.jsonl with one (examples/train_gpt.py --out writes it)."])
    words = [
        f"{line.label} against {panels[0].x_label}: {line.y[0]:.4g} to {line.y[-1]:.4g}." for line in panels[0].lines
    ]
    missing = "" if seconds else "metrics.jsonl has no seconds, so there is no picture against time. "
    caption = missing + "The training loss is the mean since the validation before; time is without validations."
    return _picture(pictures.draw_lines(panels), " ".join(words), caption)


def _rounds_picture(series: dict) -> str:
    if "round_ms" not in series or "exposed_wait_ms" not in series:
        return _paragraphs(
            [
                "No rounds: there are neither CSV files of DeepSpeed's monitor (csv_monitor in the JSON) nor recorder "
                "files with them."
            ]
        )
    times = [
        Line("rounds", 0, *thinned(*series["round_ms"])),
        Line("exposed wait", 1, *thinned(*series["exposed_wait_ms"])),
    ]
    panels = [Panel("samples seen", "ms per window", times, from_zero=True)]
    if "hidden_share" in series:
        share = Line("hidden share", 2, *thinned(*series["hidden_share"]))
        panels.append(Panel("samples seen", "hidden share", [share], from_zero=True))
    words = f"Over samples: rounds, median {statistics.median(times[0].y):.4g} ms a window; exposed wait, median "
    words += f"{statistics.median(times[1].y):.4g} ms; hidden share of all {_share(_hidden_share(series))}."
    caption = "Rank 0." + _thinning_words(series["round_ms"][0])
    return _picture(pictures.draw_lines(panels, stacked=True, height=5.4), words, caption)


def _thinning_words(x: Sequence[float]) -> str:
    size = -(-len(x) // _MOST_POINTS)
    return f" Each point is the median of {size} windows." if size > 1 else ""


def _run_step_picture(run: Run) -> str:
    unit = _time_unit([step["step_s"] for steps in timed_steps(run) for step in steps])
    bars = run_step_bars(run, unit)
    if not bars:
        return _paragraphs(["No step times: there are no recorder files (rank*.jsonl) with timed steps."])
    names = ("computation and all else", "exposed communication", "outside engine.step()", "inside engine.step()")
    colours = (_PART_COLOURS[0], _PART_COLOURS[1], _PART_COLOURS[0], _PART_COLOURS[1])
    words = [f"Median step in {unit[1]}.", *(f"{bar.label}: {bar.remark}." for bar in bars[:_MOST_RANKS])]
    caption = "The bound needs C and R, which `ds_acco compare` measures." + _rank_words(len(bars))
    if any(bar.parts[3] for bar in bars):
        caption = (
            "What happens inside of engine.step() is communication and update; what the engine communicates during "
            "backward is outside. " + caption
        )
    x_label = f"{_UNIT_NAMES[unit[1]]} per optimizer step"
    figure = pictures.draw_bars(bars[:_MOST_RANKS], names, colours, x_label)
    return _picture(figure, " ".join(words), caption)


def _run_batch_picture(run: Run) -> str:
    """Empty unless windows are adaptive."""
    sizes = batch_sizes(run)
    if not sizes:
        return ""
    nominal = run.headers[0]["samples_per_step"]
    line = Line("samples per step", 0, *thinned([step["step"] for step in run.steps[0]], sizes))
    level = (float(nominal), f"nominal, {nominal:,}")
    panel = Panel("optimizer step", "samples per step", [line], from_zero=True, level=level)
    words = f"Samples per optimizer step: median {statistics.median(sizes):,.0f}, last {sizes[-1]:,}."
    caption = "All ranks together. A window grows until the round behind it is finished, on each rank by itself."
    return _section("Batch size over steps", _picture(pictures.draw_lines([panel], height=3.4), words, caption))


def _rank_words(count: int) -> str:
    return f" The first {_MOST_RANKS} of {count} ranks." if count > _MOST_RANKS else ""


def _error_picture(series: dict) -> str:
    if "estimate_error" not in series:
        return _paragraphs(["Not known: the monitor wrote no Train/ACCO/estimate_error (`sync` has none)."])
    x, y = series["estimate_error"]
    line = Line("error of the estimate", 0, *thinned(x, y))
    panel = Panel("samples seen", "error of the estimate", [line], from_zero=True, level=(1.0, "weights one step old"))
    words = f"Error of the estimate over samples: median {statistics.median(y):.4g}, last {y[-1]:.4g}."
    caption = "0 is a perfect estimate, 1 as good as the weights one step old." + _thinning_words(x)
    return _picture(pictures.draw_lines([panel], height=3.4), words, caption)


def _run_memory_picture(run: Run) -> str:
    peaks = []
    for header, steps in zip(run.headers, run.steps):
        known = [step["peak_bytes"] for step in steps[_WARM_UP_STEPS:] if step["peak_bytes"] is not None]
        if known:
            peaks.append((header["rank"], max(known)))
    if not peaks:
        return _paragraphs(["Not known: there are no recorder files (rank*.jsonl) with it."])
    unit = _bytes_unit([peak for _, peak in peaks])
    bars = []
    for rank, peak in peaks:
        remark = f"{_figure(peak, 0 if unit[1] == 'MiB' else 2, unit[0])} {unit[1]}"
        bars.append(Bar(f"rank {rank}", 0, [peak * unit[0]], remark))
    words = ["Peak memory.", *(f"{bar.label}: {bar.remark}." for bar in bars[:_MOST_RANKS])]
    figure = pictures.draw_bars(bars[:_MOST_RANKS], [""], [None], f"{unit[1]} per rank")
    return _picture(figure, " ".join(words), _rank_words(len(bars)).strip())


def _run_table(run: Run, series: dict) -> str:
    """Medians and the range that four of five windows lie in."""
    named = [
        ("exposed wait, ms per window", "exposed_wait_ms", 2),
        ("rounds, ms per window", "round_ms", 2),
        ("hidden share of a window", "hidden_share", 3),
        ("micro-batches per window", "micro_batches", 0),
        ("error of the estimate", "estimate_error", 3),
    ]
    kinds = [(what, series[name][1], digits) for what, name, digits in named if name in series]
    timed = timed_steps(run)[0] if run.steps else []
    if timed:
        kinds.insert(0, ("optimizer step of rank 0, ms", [1e3 * step["step_s"] for step in timed], 1))
    recorded = run.steps[0] if run.steps else []
    for what, key in (
        ("sent by rank 0, MB per step", "sent_bytes"),
        ("received by rank 0, MB per step", "received_bytes"),
    ):
        counted = [1e-6 * step[key] for step in recorded[_WARM_UP_STEPS:] if step[key] is not None]
        kinds += [(what, counted, 1)] if counted else []
    if batch_sizes(run):
        kinds.append(("samples per step, all ranks", batch_sizes(run), 0))
    rows: list[list[object]] = []
    for what, values, digits in kinds:
        tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
        spread = f"{_figure(tenths[0], digits)} to {_figure(tenths[-1], digits)}"
        rows.append([what, _figure(statistics.median(values), digits), spread, f"{len(values):,}"])
    if "round_ms" in series and "exposed_wait_ms" in series:
        rows.append(["hidden share of all windows together", _figure(_hidden_share(series)), "", ""])
    if "skipped_commits" in series:
        rows.append(["skipped steps", _figure(series["skipped_commits"][1][-1], 0), "", ""])
    for what, key in (("last validation loss", "val_loss"), ("last training loss", "loss")):
        known = [line[key] for line in run.metrics if line[key] is not None]
        if known:
            rows.append([what, _figure(known[-1], 4), "", ""])
    if not rows:
        return _paragraphs(["The files hold no figure yet."])
    return _table(["", "median, or the figure", "80 % of the windows lie in", "windows"], rows)


def _what_was_read(run: Run, header: dict) -> list[tuple[object, object]]:
    shown = [str(path.relative_to(run.folder)) for path in run.sources]
    more = f" and {len(shown) - 40} more" if len(shown) > 40 else ""
    pairs: list[tuple[object, object]] = [
        ("folder", _code(str(run.folder.resolve()))),
        ("files", _Html("<br>".join(_code(name) for name in shown[:40]) + more)),
    ]
    if header:
        pairs.append(("model", _model_words(header)))
        phases = "" if header["a"] is None else f", {header['a']} of them in phase A"
        pairs.append(
            ("batch", f"n = {header['n']} micro-batches a step{phases}; {header['samples_per_step']:,} samples")
        )
        pairs.append(("versions", f"torch {header['torch'] or '?'}, DeepSpeed {header['deepspeed'] or '?'}"))
    return pairs


_RUN_TERMS: list[tuple[object, object]] = [
    ("window", "one optimizer step and its micro-batches."),
    ("rounds", "reduce-scatter, update and all-gather of a window, summed: two in acco, else one."),
    ("exposed wait", "how long training stood waiting for the rounds that finished in the window."),
    ("hidden share", "1 \u2212 exposed wait / rounds: the part that cost training nothing."),
    (
        "error of the estimate",
        "distance from the weights trained on to the true ones, over the length of the last step.",
    ),
]
