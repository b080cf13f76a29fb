# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the page of one run: what its metrics, recorder files and DeepSpeed's csv_monitor hold."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ...algorithm.step_time import WARM_UP_STEPS
from ...engine.recorder_format import RankHeader, RankStep
from ...settings import is_adaptive
from .. import palette
from ..compare.results import Point
from ..words import Unit, clock_unit, counted, loss, memory_unit, number, percent, time_unit, wire_unit
from .figures import Bar, Line, Panel, Part, draw_bars, draw_lines
from .html import Cell, Pairs, Paragraphs, Picture, Section, Table, Text, picture, whole_page
from .read_run import RunFiles, Series
from .series import LONG_UNITS, model_words, points, thinned, thinning_words

_PARTS = (
    Part("computation and all else", palette.PARTS["compute"]),
    Part("exposed communication", palette.PARTS["exposed"]),
    Part("outside engine.step()", palette.PARTS["compute"]),
    Part("inside engine.step()", palette.PARTS["overhead"]),
)
_MAIN, _SECOND = palette.SERIES["acco"], palette.SERIES["wp"]  # no configuration is meant: the page has one run
_EXPOSED = palette.PARTS["exposed"]
_MOST_RANKS, _MOST_FILES = 32, 40


def windows(run: RunFiles) -> dict[str, Series]:
    """Returns by name the values per window of rank 0: ``exposed_wait_ms``, ``round_ms``, ``hidden_share``,
    ``estimate_error`` and whatever else the monitor wrote.

    The monitor's are taken as they are; the recorder's fill in what it did not write.
    """
    series = {name: values for name, values in run.events.items() if values[0]}
    if not run.ranks:
        return series
    samples = samples_so_far(run)
    rounds = [
        (samples[step.step], step.round_s, step.exposed_s)
        for step in run.ranks[0].steps
        if step.round_s and step.exposed_s is not None
    ]
    if rounds:
        at = [sample for sample, _, _ in rounds]
        series.setdefault("exposed_wait_ms", (at, [1e3 * exposed_s for _, _, exposed_s in rounds]))
        series.setdefault("round_ms", (at, [1e3 * round_s for _, round_s, _ in rounds]))
        hidden = [max(0.0, 1 - exposed_s / round_s) for _, round_s, exposed_s in rounds]
        series.setdefault("hidden_share", (at, hidden))
    return series


def batch_sizes(run: RunFiles) -> list[int]:
    """Returns the samples of each recorded step, all ranks together; none unless windows are adaptive and every rank is
    there."""
    if not run.ranks or len(run.ranks) != (run.ranks[0].header.world_size or len(run.ranks)):
        return []
    sizes = []
    for of_step in zip(*(rank.steps for rank in run.ranks)):
        known = [step.samples for step in of_step if step.samples is not None]
        if len(known) < len(of_step):
            return []
        sizes.append(sum(known))
    return sizes


def samples_so_far(run: RunFiles) -> dict[int, float]:
    """Returns the samples trained at the end of each step, by its number: as recorded or, with fixed windows, as the
    batch size says."""
    per_step, sizes = run.ranks[0].header.samples_per_step, batch_sizes(run)
    steps = [step.step for step in run.ranks[0].steps]
    if len(sizes) < len(steps):
        return {step: float(step * per_step) for step in steps}
    return dict(zip(steps, map(float, itertools.accumulate(sizes))))


def timed_steps(run: RunFiles) -> list[list[tuple[RankStep, float]]]:
    """Returns the steps of each rank whose time counts, with it: not the first ones, which load and build, and none
    that an evaluation or a checkpoint fell into."""
    return [
        [(step, step.step_s) for step in rank.steps[WARM_UP_STEPS:] if step.step_s is not None and not step.looked]
        for rank in run.ranks
    ]


def run_step_bars(run: RunFiles, unit: Unit) -> list[Bar]:
    """Returns the median step of each rank, in ``unit``: for ACCO (all but the exposed wait, exposed wait, 0, 0), for
    another optimizer (0, 0, outside of ``engine.step()``, inside)."""
    bars = []
    for rank, steps in zip(run.ranks, timed_steps(run)):
        if not steps:
            continue
        whole = statistics.median(step_s for _, step_s in steps)
        exposed = [step.exposed_s for step, _ in steps if step.exposed_s is not None]
        inside = [step.inside_s for step, _ in steps if step.inside_s is not None]
        if exposed:
            wait = min(whole, statistics.median(exposed))
            parts = [whole - wait, wait, 0.0, 0.0]
        else:
            within = min(whole, statistics.median(inside)) if inside else 0.0
            parts = [0.0, 0.0, whole - within, within]
        parts = [part * unit.factor for part in parts]
        bars.append(Bar(f"rank {rank.header.rank}", _MAIN, parts, unit.words(whole)))
    return bars


def run_page(run: RunFiles) -> str:
    """Returns the HTML of one run's files."""
    series = windows(run)
    header = run.ranks[0].header if run.ranks else None
    return whole_page(
        f"One training run: {_name_of(run.folder.resolve())}",
        _optimizer_words(header) if header else "No recorder file tells its optimizer and batch.",
        [
            Section("What it shows", [Paragraphs(_run_words(run, series))], look="verdict"),
            Section("Loss", [_loss_picture(run)]),
            Section("Rounds, window by window", [_rounds_picture(series)]),
            Section("Step time", [_step_picture(run)]),
            _batch_section(run),
            Section("Error of the estimate", [_error_picture(series)]),
            Section("Memory per rank", [_memory_picture(run)]),
            Section("Figures", [_figures_table(run, series)]),
            Section("What was read", [Pairs(_what_was_read(run, header))]),
            Section("How to read this", [Pairs(_TERMS)]),
        ],
    )


def _name_of(folder: Path) -> str:
    """Returns the last part of the path; the last two where that is only a number, as in a comparison's folder."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdecimal() else folder.name


def _optimizer_words(header: RankHeader) -> str:
    schedule = f", schedule {header.schedule}" if header.schedule else ""
    words = [f"{header.optimizer or 'optimizer not known'}{schedule}"]
    words += ["adaptive windows"] if is_adaptive(header.accumulation) else []
    words += [f"ESTIMATE {header.estimate_comm}"] if header.estimate_comm not in (None, "full") else []
    words += [f"COMMIT {header.commit_comm}"] if header.commit_comm not in (None, "full") else []
    words += [f"ZeRO stage {header.stage}"] if header.stage is not None else []
    words += [counted(header.world_size, "rank")] if header.world_size is not None else []
    words += [f"on {header.device}"] if header.device else []
    return " · ".join(words)


def _run_words(run: RunFiles, series: dict[str, Series]) -> list[str]:
    words = []
    if "exposed_wait_ms" in series and "round_ms" in series:
        wait = statistics.median(series["exposed_wait_ms"][1])
        words.append(
            f"{percent(_hidden_share(series))} of the communication was hidden; in a median window training waited "
            f"{number(wait, 1)} ms for rounds of {number(statistics.median(series['round_ms'][1]), 1)} ms."
        )
    else:
        words.append("How much communication was hidden is not known: nothing here holds the times of ACCO's rounds.")
    last = next((point for point in reversed(run.metrics) if point.val_loss is not None), None)
    if last is not None:
        steps = "" if last.step is None else f" after {counted(last.step, 'step')}"
        words.append(f"Last validation loss: {loss(last.val_loss)}{steps}.")
    skipped = series.get("skipped_commits")
    if skipped and skipped[1][-1] > 0:
        words.append(f"{number(skipped[1][-1], 0)} steps were skipped for a non-finite gradient.")
    words.append("Whether ACCO pays cannot be seen in one run; `ds_acco compare` measures it.")
    return words


def _hidden_share(series: dict[str, Series]) -> float:
    """Returns the hidden part of the rounds' time, of all windows together."""
    rounds = sum(series["round_ms"][1])
    return max(0.0, 1 - sum(series["exposed_wait_ms"][1]) / rounds) if rounds else 0.0


# ---- pictures


def _loss_picture(run: RunFiles) -> Picture | Paragraphs:
    clock = clock_unit(point.seconds for point in run.metrics)
    axes: list[tuple[Callable[[Point], float | None], float, str]] = [
        (lambda point: point.seconds, clock.factor, f"training time in {clock.name}"),
        (lambda point: point.samples, 1.0, "samples seen"),
    ]
    panels = []
    for x, factor, x_label in axes:
        curves = [
            Line("validation loss", _MAIN, 0, *thinned(*points(run.metrics, x, lambda point: point.val_loss, factor))),
            Line("training loss", _SECOND, 1, *thinned(*points(run.metrics, x, lambda point: point.loss, factor))),
        ]
        lines = [line for line in curves if line.x]
        if lines:
            panels.append(Panel(x_label, "loss", lines))
    if not panels:
        return Paragraphs(["No loss: there is no metrics.jsonl with one (examples/train_gpt.py --out writes it)."])
    words = [
        f"{line.label} against {panels[0].x_label}: {loss(line.y[0])} to {loss(line.y[-1])}."
        for line in panels[0].lines
    ]
    has_seconds = any(point.seconds is not None for point in run.metrics)
    missing = "" if has_seconds else "metrics.jsonl has no seconds, so there is no picture against time. "
    caption = missing + "The training loss is the mean since the validation before; time is without validations."
    return picture(partial(draw_lines, panels), " ".join(words), caption)


def _rounds_picture(series: dict[str, Series]) -> Picture | Paragraphs:
    if "round_ms" not in series or "exposed_wait_ms" not in series:
        return Paragraphs(
            [
                "No rounds: there are neither CSV files of DeepSpeed's monitor (csv_monitor in the JSON) nor recorder "
                "files with them."
            ]
        )
    times = [
        Line("rounds", _SECOND, 0, *thinned(*series["round_ms"])),
        Line("exposed wait", _EXPOSED, 1, *thinned(*series["exposed_wait_ms"])),
    ]
    panels = [Panel("samples seen", "ms per window", times, from_zero=True)]
    if "hidden_share" in series:
        samples, shares = thinned(*series["hidden_share"])
        hidden = Line("hidden share", _MAIN, 2, samples, [100 * share for share in shares])
        panels.append(Panel("samples seen", "hidden share, %", [hidden], from_zero=True))
    medians = [number(statistics.median(line.y), 1) for line in times]
    words = (
        f"Over samples: rounds, median {medians[0]} ms a window; exposed wait, median {medians[1]} ms; hidden share "
    )
    words += f"of all {percent(_hidden_share(series))}."
    caption = "Rank 0." + thinning_words(len(series["round_ms"][0]))
    return picture(partial(draw_lines, panels, stacked=True, height=5.4), words, caption)


def _step_picture(run: RunFiles) -> Picture | Paragraphs:
    unit = time_unit(step_s for steps in timed_steps(run) for _, step_s in steps)
    bars = run_step_bars(run, unit)
    if not bars:
        return Paragraphs(["No step times: there are no recorder files (rank*.jsonl) with timed steps."])
    words = ["Median step.", *(f"{bar.label}: {bar.remark}." for bar in bars[:_MOST_RANKS])]
    caption = "The bound needs C and R, which `ds_acco compare` measures." + _rank_words(len(bars))
    if any(bar.parts[3] for bar in bars):
        caption = (
            "What happens inside of engine.step() is communication and update; what the engine communicates during "
            "backward is outside. " + caption
        )
    draw = partial(draw_bars, bars[:_MOST_RANKS], _PARTS, f"{LONG_UNITS[unit.name]} per optimizer step")
    return picture(draw, " ".join(words), caption)


def _batch_section(run: RunFiles) -> Section | None:
    """Returns the section on batch sizes; None unless windows are adaptive."""
    sizes = batch_sizes(run)
    if not sizes:
        return None
    nominal = run.ranks[0].header.samples_per_step
    steps = [step.step for step in run.ranks[0].steps[: len(sizes)]]
    line = Line("samples per step", _MAIN, 0, *thinned(steps, sizes))
    level = (float(nominal), f"nominal, {nominal:,}")
    panel = Panel("optimizer step", "samples per step", [line], from_zero=True, level=level)
    words = f"Samples per optimizer step: median {number(statistics.median(sizes), 0)}, last {sizes[-1]:,}."
    caption = "All ranks together. A window grows until the round behind it is finished, on each rank by itself."
    caption += thinning_words(len(sizes))
    return Section("Batch size over steps", [picture(partial(draw_lines, [panel], height=3.4), words, caption)])


def _rank_words(count: int) -> str:
    return f" The first {_MOST_RANKS} of {count} ranks." if count > _MOST_RANKS else ""


def _error_picture(series: dict[str, Series]) -> Picture | Paragraphs:
    if "estimate_error" not in series:
        return Paragraphs(["Not known: the monitor wrote no Train/ACCO/estimate_error (`sync` has none)."])
    x, y = series["estimate_error"]
    line = Line("error of the estimate", _MAIN, 0, *thinned(x, y))
    panel = Panel("samples seen", "error of the estimate", [line], from_zero=True, level=(1.0, "weights one step old"))
    words = f"Error of the estimate over samples: median {number(statistics.median(y))}, last {number(y[-1])}."
    caption = "0 is a perfect estimate, 1 as good as the weights one step old." + thinning_words(len(x))
    return picture(partial(draw_lines, [panel], height=3.4), words, caption)


def _memory_picture(run: RunFiles) -> Picture | Paragraphs:
    peaks = []
    for rank in run.ranks:
        known = [step.peak_bytes for step in rank.steps[WARM_UP_STEPS:] if step.peak_bytes is not None]
        if known:
            peaks.append((rank.header.rank, max(known)))
    if not peaks:
        return Paragraphs(["Not known: there are no recorder files (rank*.jsonl) with it."])
    unit = memory_unit(peak for _, peak in peaks)
    bars = [Bar(f"rank {rank}", _MAIN, [peak * unit.factor], unit.words(peak)) for rank, peak in peaks]
    words = ["Peak memory.", *(f"{bar.label}: {bar.remark}." for bar in bars[:_MOST_RANKS])]
    draw = partial(draw_bars, bars[:_MOST_RANKS], [Part("", None)], f"{unit.name} per rank")
    return picture(draw, " ".join(words), _rank_words(len(bars)).strip())


# ---- in words


def _figures_table(run: RunFiles, series: dict[str, Series]) -> Table | Paragraphs:
    """Returns a table of medians and the range that four of five windows lie in."""
    rows: list[list[Text]] = [
        _spread_row(what, values, digits) for what, values, digits in _figures(run, series) if values
    ]
    if "round_ms" in series and "exposed_wait_ms" in series:
        rows.append(["hidden share of all windows together", percent(_hidden_share(series)), "", ""])
    if "skipped_commits" in series:
        rows.append(["skipped steps", number(series["skipped_commits"][1][-1], 0), "", ""])
    for what, losses in (
        ("last validation loss", [point.val_loss for point in run.metrics if point.val_loss is not None]),
        ("last training loss", [point.loss for point in run.metrics if point.loss is not None]),
    ):
        if losses:
            rows.append([what, loss(losses[-1]), "", ""])
    if not rows:
        return Paragraphs(["The files hold no figure yet."])
    return Table(["", "median, or the figure", "80 % of the windows lie in", "windows"], rows)


def _figures(run: RunFiles, series: dict[str, Series]) -> list[tuple[str, Sequence[float], int]]:
    """Returns (what, values, digits) of each figure; no value where it was not measured."""
    steps = run.ranks[0].steps[WARM_UP_STEPS:] if run.ranks else []
    timed = timed_steps(run)[0] if run.ranks else []
    sent = [step.sent_bytes for step in steps if step.sent_bytes is not None]
    received = [step.received_bytes for step in steps if step.received_bytes is not None]
    of_host = [step.interface_bytes for step in steps if step.interface_bytes is not None]
    time, wire = time_unit(step_s for _, step_s in timed), wire_unit([*sent, *received, *of_host])

    def of(name: str) -> list[float]:
        return series[name][1] if name in series else []

    return [
        (f"optimizer step of rank 0, {time.name}", [time.factor * step_s for _, step_s in timed], time.digits),
        ("exposed wait, ms per window", of("exposed_wait_ms"), 1),
        ("rounds, ms per window", of("round_ms"), 1),
        ("hidden share of a window, %", [100 * share for share in of("hidden_share")], 1),
        ("micro-batches per window", of("micro_batches"), 0),
        ("error of the estimate", of("estimate_error"), 3),
        (f"sent by rank 0, {wire.name} per step", [wire.factor * size for size in sent], wire.digits),
        (f"received by rank 0, {wire.name} per step", [wire.factor * size for size in received], wire.digits),
        (f"sent by rank 0's host, {wire.name} per step", [wire.factor * size for size in of_host], wire.digits),
        ("samples per step, all ranks", batch_sizes(run), 0),
    ]


def _spread_row(what: str, values: Sequence[float], digits: int) -> list[Text]:
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    spread = f"{number(tenths[0], digits)} to {number(tenths[-1], digits)}"
    return [what, number(statistics.median(values), digits), spread, f"{len(values):,}"]


def _what_was_read(run: RunFiles, header: RankHeader | None) -> list[tuple[Text, Text | Sequence[Text]]]:
    names = [str(path.relative_to(run.folder)) for path in run.sources]
    shown: list[Text] = [Cell(name, is_code=True) for name in names[:_MOST_FILES]]
    shown += [f"and {len(names) - _MOST_FILES} more"] if len(names) > _MOST_FILES else []
    pairs: list[tuple[Text, Text | Sequence[Text]]] = [
        ("folder", Cell(str(run.folder.resolve()), is_code=True)),
        ("files", shown),
    ]
    if header is not None:
        pairs.append(("model", model_words(header.numel, header.weight_bytes, header.comm_bytes)))
        phases = "" if header.a is None else f", {header.a} of them in phase A"
        batch = f"n = {header.n} micro-batches a step{phases}; {header.samples_per_step:,} samples"
        pairs.append(("batch", batch))
        pairs.append(("versions", f"torch {header.torch or '?'}, DeepSpeed {header.deepspeed or '?'}"))
    return pairs


_TERMS: list[tuple[Text, Text | Sequence[Text]]] = [
    ("window", "one optimizer step and its micro-batches."),
    (
        "rounds",
        "reduce-scatter, update and all-gather of a window, summed: two where it has two phases, else one.",
    ),
    ("exposed wait", "how long training stood waiting for the rounds that finished in the window."),
    ("hidden share", "1 \u2212 exposed wait / rounds: the part that cost training nothing."),
    (
        "error of the estimate",
        "distance from the weights trained on to the true ones, over the length of the last step.",
    ),
]
