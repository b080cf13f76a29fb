# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the page of a comparison: pictures and figures of what ``ds_acco compare`` measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .. import palette
from ..compare.results import Configuration, Interval, LossInterval, Point, Results
from ..compare.verdict import ONE_SEED, one_phase, schedules, step_unit, two_phases, verdict
from ..words import (
    NOT_KNOWN,
    Unit,
    clock_unit,
    counted,
    listed,
    loss,
    memory_unit,
    number,
    percent,
    wire_unit,
)
from .figures import Bar, Line, Panel, Part, draw_bars, draw_lines
from .html import Cell, Pairs, Paragraphs, Picture, Piece, Section, Table, Text, picture, whole_page
from .series import LONG_UNITS, model_words, points, thinned, thinning_words

_PARTS = (
    Part("computation", palette.PARTS["compute"]),
    Part("exposed communication", palette.PARTS["exposed"]),
    Part("overhead", palette.PARTS["overhead"]),
    Part("step time, not split", palette.PARTS["compute"]),
)
_ADAPTIVE_BOUND = "With adaptive windows it is what the samples take when no rank ever waits."


@dataclass(frozen=True)
class _Look:
    """Holds the look of a configuration's lines and chips, everywhere on the page. Neighbors differ in their dashes,
    and so do configurations that share a color: coinciding lines stay visible."""

    color: str
    dash: int


def looks_of(results: Results) -> dict[str, _Look]:
    """Returns the look of each configuration, by name."""
    colors = palette.colors_of([config.name for config in results.configs])
    looks: dict[str, _Look] = {}
    for place, (name, color) in enumerate(colors.items()):
        same = sum(look.color == color for look in looks.values())
        looks[name] = _Look(color, place + same)
    return looks


def comparison_page(results: Results) -> str:
    """Returns the HTML of a comparison's results."""
    what = [Path(results.script).name, _ranks_words(results), results.network, results.date]
    if results.emulated_ms is not None:
        what.append(f"emulated computation, {results.emulated_ms:g} ms per micro-batch")
    return whole_page(
        "ACCO beside DeepSpeed's ZeRO",
        " · ".join(what),
        [
            # Not the file's own sentences: those of an earlier version have other units than the pictures.
            Section("Verdict", [Paragraphs(verdict(results))], look="verdict"),
            _failures(results),
            Section("Step time", [_step_picture(results)]),
            _batch_section(results),
            Section("Validation loss", _loss_pictures(results)),
            Section("Memory per rank", [_memory_picture(results)]),
            Section("Figures", [*_times_table(results), *_costs_table(results), _pass_note(results)]),
            Section("Speed-up", _speedup_table(results)),
            Section("What it is worth", _manager_table(results)),
            Section("What was run", [Pairs(_what_was_run(results))]),
            Section("How to read this", [Pairs(_terms())]),
        ],
    )


def _ranks_words(results: Results) -> str:
    if results.world_size is None:
        return "number of ranks not known"
    words = counted(results.world_size, "rank")
    return words if results.device is None else f"{words} on {results.device}"


def _failures(results: Results) -> Section | None:
    failed = [(config.name, config.failed) for config in results.configs if config.failed]
    if not failed:
        return None
    note = Paragraphs(["They are in no picture, and no figure of theirs is used."], is_note=True)
    return Section("Failed configurations", [Pairs(failed), note], look="failed")


def _nothing(words: str) -> Paragraphs:
    return Paragraphs([f"{words}, so there is nothing to draw."])


# ---- step time


def to_nominal(results: Results, config: Configuration) -> float:
    """Returns what a time per step is multiplied with to be one per nominal batch, as every fixed step has: 1 but for
    adaptive windows."""
    own, nominal = config.samples_per_step, results.samples_per_step
    return nominal / own if config.is_adaptive and own and nominal else 1.0


def step_bars(results: Results, unit: Unit) -> list[Bar]:
    """Returns the time of each measured configuration per nominal batch, split; in ``unit``."""
    looks, bars = looks_of(results), []
    for config, step_s in results.measured:
        scale = to_nominal(results, config)
        factor = unit.factor * scale
        remark = unit.words(step_s.median * scale)
        if config.of_bound is not None:
            remark += f"   {number(config.of_bound)} × bound"
        low, high, bound = (
            None if value is None else value * factor for value in (step_s.low, step_s.high, config.bound_s)
        )
        parts = [part * factor for part in drawn_parts(config, step_s)]
        bars.append(Bar(config.name, looks[config.name].color, parts, remark, low, high, bound))
    return bars


def drawn_parts(config: Configuration, step_s: Interval) -> list[float]:
    """Returns seconds of compute, exposed communication, overhead and, where they are not known, of the whole step.

    Together they are the step time, so a negative part (a step shorter than the reference's compute) is drawn as 0 and
    shortens the part before it.
    """
    if config.split is None:
        return [0.0, 0.0, 0.0, step_s.median]
    rest = 0.0
    parts: list[float] = []
    for part_s in reversed(config.split.parts):
        parts.insert(0, max(0.0, part_s + rest))
        rest = min(0.0, part_s + rest)
    return [*parts, 0.0]


def _step_picture(results: Results) -> Picture | Paragraphs:
    unit = step_unit(results)
    bars = step_bars(results, unit)
    if not bars:
        return _nothing("No configuration has a step time")
    adaptive = [config.name for config, _ in results.measured if config.is_adaptive]
    what = "optimizer step" if not adaptive else f"{number(results.samples_per_step, 0)} samples"
    words = [f"Time per {what} of each configuration, in {unit.name}."]
    shown = replace(unit, factor=1.0)  # of what is in the unit already
    for bar in bars:
        parts = [f"{part.name} {shown.number(length)}" for part, length in zip(_PARTS, bar.parts) if length]
        bound = "" if bar.bound is None else f", bound {shown.number(bar.bound)}"
        words.append(f"{bar.label}: {shown.number(sum(bar.parts))} ({', '.join(parts)}{bound}).")
    caption = ["Medians; shorter is better."]
    if any(bar.bound is not None for bar in bars):
        caption.append(f"The bound is what a step takes at best: {_laws()}.")
    if adaptive:
        caption.append(f"The steps of {listed(adaptive)} differ in size, so all times are per nominal batch.")
        caption.append(_ADAPTIVE_BOUND)
    splits = [config.split for config, _ in results.measured if config.split]
    notes = dict.fromkeys(split.note for split in splits if split.note)
    caption += [f"Exposed in DeepSpeed's own stages: {note.rstrip('.')}." for note in notes]
    if any(min(split.parts) < 0 for split in splits):
        caption.append("A part that is negative in the table is drawn as nothing.")
    draw = partial(
        draw_bars,
        bars,
        _PARTS,
        f"{LONG_UNITS[unit.name]} per {what}",
        interval_name="95 % interval",
        bound_name="bound",
    )
    return picture(draw, " ".join(words), " ".join(caption))


def _laws() -> str:
    """Returns in words the law of a step's time under each schedule (algorithm/step_time.py)."""
    laws = (
        ("max(A, R) + max(B, R)", two_phases()),
        ("max(C, R)", one_phase()),
        ("C + R", schedules(lambda row: row.blocks)),
    )
    return ", ".join(f"{law} for {listed(names)}" for law, names in laws if names)


# ---- lines


def batch_lines(results: Results) -> list[Line]:
    """Returns the samples of each optimizer step, one line per pass of each adaptive configuration."""
    return _lines(results, lambda curve, batch: thinned(range(1, len(batch) + 1), batch))


def loss_lines(results: Results, of_point: Callable[[Point], float | None], factor: float) -> list[Line]:
    """Returns one line per pass of each configuration that did not fail: ``val_loss`` against ``factor`` times
    ``of_point``. Points without one of both are left out."""
    return _lines(results, lambda curve, batch: points(curve, of_point, lambda point: point.val_loss, factor))


def _lines(
    results: Results, of_run: Callable[[Sequence[Point], Sequence[int]], tuple[list[float], list[float]]]
) -> list[Line]:
    looks, lines = looks_of(results), []
    for config in results.running:
        for run in config.runs:
            x, y = of_run(run.curve, run.batch or [])
            if x:
                lines.append(Line(config.name, looks[config.name].color, looks[config.name].dash, x, y))
    return lines


def _batch_section(results: Results) -> Section | None:
    """Returns the section on batch sizes; None where no configuration is adaptive."""
    lines = batch_lines(results)
    if not lines:
        return None
    nominal = results.samples_per_step
    level = None if nominal is None else (float(nominal), f"nominal, {nominal:,}")
    words = ["Samples per optimizer step. Median and last:"]
    words += [f"{line.label} {number(statistics.median(line.y), 0)}, {number(line.y[-1], 0)};" for line in lines]
    caption = "All ranks together. A window grows until the round behind it is finished, on each rank by itself."
    caption += " One line per pass." if results.passes > 1 else ""
    caption += thinning_words(max(len(run.batch or []) for config in results.configs for run in config.runs))
    panel = Panel("optimizer step", "samples per step", lines, from_zero=True, level=level)
    draw = partial(draw_lines, [panel], height=3.4)
    return Section("Batch size over steps", [picture(draw, " ".join(words), caption)])


def _loss_pictures(results: Results) -> list[Piece]:
    clock = clock_unit(point.seconds for config in results.running for run in config.runs for point in run.curve)
    tokens = results.tokens_per_sample
    data = "samples" if tokens is None else "tokens"
    panels = [
        Panel(
            f"training time in {clock.name}",
            "validation loss",
            loss_lines(results, lambda point: point.seconds, clock.factor),
        ),
        Panel(f"{data} seen", "validation loss", loss_lines(results, lambda point: point.samples, tokens or 1.0)),
    ]
    panels = [panel for panel in panels if panel.lines]
    drawn = {line.label for panel in panels for line in panel.lines}
    without = [config.name for config in results.running if config.name not in drawn]
    missing = (
        f"No curve of {listed(without)}: the runs wrote no finite validation loss to metrics.jsonl." if without else ""
    )
    if not panels:
        return [Paragraphs([missing]) if missing else _nothing("No configuration has a curve")]
    words = [f"Validation loss against training time and against {data}. Last values:"]
    words += [f"{line.label} {loss(line.y[-1])} at {number(line.x[-1], clock.digits)};" for line in panels[0].lines]
    caption = ["Training time does not count the validations."]
    caption += ["One line per pass."] if results.passes > 1 else []
    caption += [f"Each line is of {ONE_SEED}.", missing]
    close = _close_up(panels)
    if not close:
        return [picture(partial(draw_lines, panels), " ".join(words), " ".join(filter(None, caption)))]
    caption.insert(0, "Above the whole curves, below their lower end.")
    return [
        picture(partial(draw_lines, panels, height=3.6, legend=False), " ".join(words)),
        picture(
            partial(draw_lines, close, height=3.8),
            "The same lines, only the lower end of the losses.",
            " ".join(filter(None, caption)),
        ),
    ]


def _close_up(panels: Sequence[Panel]) -> list[Panel]:
    """Returns the panels cut off above the highest last loss; none where that shows no more than they do."""
    losses = [value for panel in panels for line in panel.lines for value in line.y]
    last = [line.y[-1] for panel in panels for line in panel.lines]
    top = max(last) + 0.1 * (max(losses) - min(losses))
    if top - min(losses) > 0.6 * (max(losses) - min(losses)):
        return []
    return [replace(panel, top=top) for panel in panels]


# ---- memory


def _memory_unit(results: Results) -> Unit:
    return memory_unit(peak for config in results.running for peak in config.peaks)


def memory_bars(results: Results, unit: Unit) -> list[Bar]:
    """Returns the peak memory of each configuration that did not fail: the bar is the highest rank, dots are all."""
    looks, bars = looks_of(results), []
    for config in results.running:
        if config.peaks:
            peaks = [peak * unit.factor for peak in config.peaks]
            remark = unit.words(max(config.peaks))
            bars.append(Bar(config.name, looks[config.name].color, [max(peaks)], remark, dots=peaks))
    return bars


def _memory_picture(results: Results) -> Picture | Paragraphs:
    unit = _memory_unit(results)
    bars = memory_bars(results, unit)
    without = [config.name for config in results.running if not config.peaks]
    missing = f"Not measured for {listed(without)}." if without else ""
    if not bars:
        return Paragraphs([missing]) if missing else _nothing("No configuration has a figure")
    words = ["Peak memory of the highest rank.", *(f"{bar.label}: {bar.remark}." for bar in bars)]
    measure = "torch.cuda.max_memory_allocated" if results.device == "cuda" else "peak resident memory"
    draw = partial(draw_bars, bars, [Part("", None)], f"{unit.name} per rank", dots_name="each rank")
    return picture(draw, " ".join(words), f"The highest rank, {measure}. {missing}".strip())


# ---- tables


def with_interval(interval: Interval | LossInterval | None, shown: Callable[[float | None], str]) -> Cell:
    """Returns the median, its interval in small print below."""
    if interval is None:
        return Cell(NOT_KNOWN)
    ends = "" if interval.low is None else f"{shown(interval.low)} to {shown(interval.high)}"
    return Cell(shown(interval.median), [ends])


def _row_name(results: Results, config: Configuration) -> Cell:
    """Returns the configuration's name with what it is in small print."""
    setting = config.schedule or (None if config.stage is None else f"ZeRO-{config.stage}")
    detail = [config.optimizer, setting, "adaptive" if config.is_adaptive else None]
    detail += [config.estimate_comm] if config.has_quantized_estimate else []
    detail += [f"COMMIT {config.commit_comm}"] if config.has_quantized_commit else []
    return Cell(config.name, [" · ".join(filter(None, detail))], color=looks_of(results)[config.name].color)


def _times_table(results: Results) -> list[Piece]:
    """Returns the table of times; one with the other figures would be too wide for a narrow window or paper."""
    unit = step_unit(results)
    head: list[Text] = ["", f"step, {unit.name}", Cell(f"bound, {unit.name}", ["step / bound"])]
    head += ["compute", "exposed", "overhead", Cell("samples/s", ["samples / step"])]
    rows: list[list[Text]] = []
    for config in results.configs:
        row: list[Text] = [_row_name(results, config)]
        if config.failed:
            rows.append([*row, "failed", *[NOT_KNOWN] * (len(head) - 2)])
            continue
        split: Sequence[float | None] = config.split.parts if config.split else [None] * 3
        speed = config.samples_per_s.median if config.samples_per_s else None
        of_bound = "" if config.of_bound is None else number(config.of_bound)
        row += [with_interval(config.step_s, unit.number), Cell(unit.number(config.bound_s), [of_bound])]
        row += [unit.number(part_s) for part_s in split]
        rows.append([*row, Cell(number(speed, 1), [number(config.samples_per_step, 0)])])
    return [Table(head, rows)]


def _costs_table(results: Results) -> list[Piece]:
    memory = _memory_unit(results)
    sent = [config.sent_bytes for config in results.running if config.sent_bytes is not None]
    of_hosts = [config.interface_bytes for config in results.running if config.interface_bytes is not None]
    wire = wire_unit([*sent, *of_hosts])
    head: list[Text] = ["", "hidden", "idle", f"memory, {memory.name}"]
    head += [Cell(f"sent, {wire.name}", ["step and rank"])] if sent else []
    head += [Cell(f"{wire.name} sent by a host", ["step, with headers"])] if of_hosts else []
    head.append(Cell("final validation loss", ["one seed"]))
    rows: list[list[Text]] = []
    for config in results.running:
        row: list[Text] = [_row_name(results, config), percent(config.hidden_share), percent(config.idle_share)]
        row.append(memory.number(max(config.peaks, default=None)))
        row += [wire.number(config.sent_bytes)] if sent else []
        row += [wire.number(config.interface_bytes)] if of_hosts else []
        rows.append([*row, with_interval(config.final_val_loss, loss)])
    return [Table(head, rows)] if rows else []


def _pass_note(results: Results) -> Paragraphs:
    text = f"Below a median: its 95 % interval over {results.passes} alternating passes."
    if results.passes == 1:
        text = "Below a median: its 95 % interval. There was one pass only, so how much passes differ is not in it."
    return Paragraphs([text], is_note=True)


def _is_per_sample(results: Results) -> bool:
    return any(config.is_adaptive for config, _ in results.measured)


def _name(results: Results, name: str) -> Cell:
    look = looks_of(results).get(name)
    return Cell(name, color=None if look is None else look.color)


def _speedup_table(results: Results) -> list[Piece]:
    ratios = {(ratio.config, ratio.baseline): ratio for ratio in results.ratios}
    if not ratios:
        return [Paragraphs(["results.json compares no configuration of ACCO with one of DeepSpeed's own."])]
    baselines = list(dict.fromkeys(ratio.baseline for ratio in results.ratios))
    rows: list[list[Text]] = []
    for name in dict.fromkeys(ratio.config for ratio in results.ratios):
        row: list[Text] = [_name(results, name)]
        for baseline in baselines:
            ratio = ratios.get((name, baseline))
            cell = with_interval(ratio.speedup if ratio else None, number)
            row.append(replace(cell, small=[*cell.small, ratio.verdict]) if ratio else cell)
        rows.append(row)
    note = f"{'Time per sample' if _is_per_sample(results) else 'Step time'} of the configuration on top divided by "
    note += "that of the row, pass by pass: above 1 the row is faster."
    head = ["", *(f"over {baseline}" for baseline in baselines)]
    return [Table(head, rows), Paragraphs([note], is_note=True)]


def _manager_table(results: Results) -> list[Piece]:
    if not results.manager:
        return [Paragraphs(["results.json has no such figures."])]
    idle = {config.name: config.idle_share for config in results.configs}
    rows: list[list[Text]] = [
        [
            _name(results, saving.config),
            saving.baseline,
            percent(saving.idle_share),
            percent(idle.get(saving.baseline)),
            percent(saving.hidden_share),
            percent(saving.saved_share),
            number(saving.saved_hours_per_1000_accelerator_hours, 0),
        ]
        for saving in results.manager
    ]
    head = ["", "instead of", "accelerators idle", "idle before", "communication hidden", "time saved"]
    head.append("accelerator-hours saved of 1000")
    note = f"For the same number of {'samples' if _is_per_sample(results) else 'steps'}. A negative figure is a loss."
    return [Table(head, rows), Paragraphs([note], is_note=True)]


# ---- in words


def _what_was_run(results: Results) -> list[tuple[Text, Text | Sequence[Text]]]:
    pairs: list[tuple[Text, Text | Sequence[Text]]] = [
        ("command", Cell(results.command, is_code=True)),
        ("script", Cell(" ".join([results.script, *results.arguments]), is_code=True)),
        ("date", results.date),
        ("machine", results.machine),
        ("network", results.network),
        ("ranks", _ranks_words(results)),
    ]
    if results.emulated_ms is not None:
        emulated = f"emulated: each micro-batch waits {results.emulated_ms:g} ms; the rest is real"
        pairs.append(("computation", emulated))
    model = results.model
    pairs.append(("model", model_words(model.numel, model.weight_bytes, model.comm_bytes)))
    batch = [f"n = {results.n} micro-batches a step"] if results.n is not None else []
    batch += [f"{results.samples_per_step:,} samples a step"] if results.samples_per_step is not None else []
    batch += [f"{results.tokens_per_sample:g} tokens a sample"] if results.tokens_per_sample is not None else []
    pairs.append(("batch", ", ".join(batch) or "not known"))
    pairs.append(("passes", f"{results.passes}, the configurations in alternation"))
    pairs.append(("C and R", _reference_words(results)))
    files = [Cell(f"{config.name}: {config.file}", is_code=True) for config in results.configs if config.file]
    pairs.append(("configurations", files or "not known"))
    return pairs


def _reference_words(results: Results) -> str:
    reference, unit = results.reference, step_unit(results)
    if reference.times is None:
        return f"not measured: {reference.failed}" if reference.failed else "not measured"
    compute_s, round_s = reference.times
    words = f"C = {unit.words(compute_s)}, R = {unit.words(round_s)}, "
    words += f"R/C = {number(round_s / compute_s)}"
    micro_batch_s = reference.micro_batch_s
    return words if micro_batch_s is None else f"{words}, one micro-batch C/n = {unit.words(micro_batch_s)}"


def _terms() -> list[tuple[Text, Text | Sequence[Text]]]:
    return [
        ("C", "computation of one optimizer step (its n micro-batches) on one rank while nothing communicates."),
        ("R", "one round with nothing beside it: reduce-scatter of the gradients, update, all-gather of the weights."),
        (
            "A, B",
            "computation of the step's two phases, of a and b of its n micro-batches: A = a/n C, B = b/n C, A + B = C.",
        ),
        (
            "bound",
            f"what a step takes at best: {_laws()}. Two rounds run behind a phase each, one behind the whole step, and "
            "C + R hides nothing. For DeepSpeed's own stages none is given. The R of a quantized round (estimate_comm, "
            "commit_comm) is its own, measured in the runs of that configuration. With adaptive windows: what a step's "
            "samples take when every rank computes all the time at its own speed.",
        ),
        (
            "computation",
            "C, measured in a run of the schedule sync; the same for every configuration, but in adaptive ones of "
            "as many samples as the step has.",
        ),
        (
            "exposed",
            "how long training stood waiting for communication; for DeepSpeed's own stages all of the step but C.",
        ),
        ("overhead", "what remains: the step without computation and exposed communication."),
        ("hidden", "part of the rounds' time that cost training nothing."),
        ("idle", "part of the step in which the accelerator does not compute the model: 1 \u2212 C / step."),
        ("interval", "95 %, by bootstrap over passes and steps. Where it contains 1, a speed-up is not shown."),
        (
            "one seed",
            "all passes run the same command, so their losses tell how a training repeats, not how seeds differ.",
        ),
        ("time saved", "1 \u2212 step / step of the configuration it replaces; times 1000 for accelerator-hours."),
    ]
