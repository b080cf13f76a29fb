# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: pictures and figures of what ``ds_acco compare`` measured."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import figures as pictures
from .figures import Bar, Line, Panel
from .html import (
    PART_COLOURS,
    UNIT_NAMES,
    Html,
    bytes_unit,
    chip,
    clock_unit,
    code,
    listed,
    model_words,
    name_words,
    number,
    pairs,
    paragraphs,
    percent,
    picture,
    points,
    section,
    table,
    thinned,
    thinning_words,
    time_unit,
    time_words,
    whole_page,
    with_interval,
)

_PART_NAMES = ("computation", "exposed communication", "overhead", "step time, not split")


_BOUND_WORDS = (
    "The bound is what a step takes at best: max(A, R) + max(B, R) for acco, max(C, R) for wp and dpu, C + R for sync."
)


_ADAPTIVE_BOUND = "With adaptive windows it is what the samples take when no rank ever waits."


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
            x, y = points(run["curve"] or [], key, "val_loss", factor)
            if x:
                lines.append(Line(config["name"], index, x, y))
    return lines


def step_bars(results: dict, unit: tuple[float, str]) -> list[Bar]:
    """Time of each measured configuration per nominal batch, split; in ``unit``."""
    bars = []
    for index, config in measured(results):
        step, scale = config["step_s"], to_nominal(results, config)
        factor = unit[0] * scale
        remark = f"{time_words(step['median'] * scale, unit)} {unit[1]}"
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
            remark = f"{number(max(peaks), 0 if unit[1] == 'MiB' else 2)} {unit[1]}"
            bars.append(Bar(config["name"], index, [max(peaks)], remark, dots=peaks))
    return bars


def comparison_page(results: dict) -> str:
    """The HTML of what :func:`~deepspeed_acco.tools.report.read_run.read_results` returned."""
    what = [Path(results["script"]).name, _ranks_words(results), results["network"], results["date"]]
    if results["emulated_ms"] is not None:
        what.append(f"emulated computation, {results['emulated_ms']:g} ms per micro-batch")
    return whole_page(
        "ACCO beside DeepSpeed's ZeRO",
        " · ".join(what),
        section("Verdict", paragraphs(results["verdict"] or ["results.json holds no verdict."]), kind="verdict"),
        _failures(results),
        section("Step time", _step_picture(results)),
        _batch_picture(results),
        section("Validation loss", _loss_picture(results)),
        section("Memory per rank", _memory_picture(results)),
        section("Figures", _figures_table(results)),
        section("Speed-up", _speedup_table(results)),
        section("What it is worth", _manager_table(results)),
        section("What was run", pairs(_what_was_run(results))),
        section("How to read this", pairs(_TERMS)),
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
    lines = [Html(f"<b>{html.escape(config['name'])}</b>: {html.escape(config['failed'])}") for config in failed]
    lines.append("They are in no picture, and no figure of theirs is used.")
    return section("Failed configurations", paragraphs(lines), kind="failed")


def _step_picture(results: dict) -> str:
    unit = time_unit([config["step_s"]["median"] for _, config in measured(results)])
    bars = step_bars(results, unit)
    if not bars:
        return paragraphs(["No configuration has a step time, so there is nothing to draw."])
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
        caption.append(f"The steps of {listed(adaptive)} differ in size, so all times are per nominal batch.")
        caption.append(_ADAPTIVE_BOUND)
    notes = dict.fromkeys(
        config["split"]["note"] for _, config in measured(results) if config["split"] and config["split"]["note"]
    )
    caption += [f"Exposed in DeepSpeed's own stages: {note.rstrip('.')}." for note in notes]
    if any(config["split"] and min(_split_parts(config)) < 0 for _, config in measured(results)):
        caption.append("A part that is negative in the table is drawn as nothing.")
    x_label = f"{UNIT_NAMES[unit[1]]} per {what}"
    figure = pictures.draw_bars(
        bars, _PART_NAMES, PART_COLOURS, x_label, interval_name="95 % interval", bound_name="bound"
    )
    return picture(figure, " ".join(words), " ".join(caption))


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
    longest = max((run["batch"] or [] for config in results["configs"] for run in config["runs"]), key=len)
    caption += thinning_words(longest)
    panel = Panel("optimizer step", "samples per step", lines, from_zero=True, level=level)
    return section("Batch size over steps", picture(pictures.draw_lines([panel], height=3.4), " ".join(words), caption))


def _split_parts(config: dict) -> list[float]:
    return [config["split"][key] for key in ("compute_s", "exposed_s", "overhead_s")]


def _loss_picture(results: dict) -> str:
    seconds = loss_lines(results, "seconds", 1.0)
    clock = clock_unit([line.x[-1] for line in seconds])
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
        f"No curve of {listed(without)}: the runs wrote no finite validation loss to metrics.jsonl." if without else ""
    )
    if not panels:
        return paragraphs([missing or "No configuration has a curve, so there is nothing to draw."])
    close = _close_up(panels)
    words = [f"Validation loss against training time and against {data}. Last values:"]
    words += [f"{line.label} {line.y[-1]:.4g} at {line.x[-1]:.4g};" for line in panels[0].lines]
    caption = ["Training time does not count the validations."]
    if results["passes"] > 1:
        caption.append("One line per pass.")
    caption += [missing] if missing else []
    if not close:
        return picture(pictures.draw_lines(panels), " ".join(words), " ".join(caption))
    whole = picture(pictures.draw_lines(panels, height=3.6, legend=False), " ".join(words))
    caption.insert(0, "Above the whole curves, below their lower end.")
    words = ["The same lines, only the lower end of the losses."]
    return whole + picture(pictures.draw_lines(close, height=3.8), words[0], " ".join(caption))


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
    unit = bytes_unit(peaks)
    bars = memory_bars(results, unit)
    without = [
        config["name"]
        for index, config in enumerate(results["configs"])
        if not config["failed"] and not any(bar.index == index for bar in bars)
    ]
    missing = f"Not measured for {listed(without)}." if without else ""
    if not bars:
        return paragraphs([missing or "No configuration has a figure, so there is nothing to draw."])
    words = [f"Peak memory in {unit[1]} of the highest rank.", *(f"{bar.label}: {bar.parts[0]:.4g}." for bar in bars)]
    measure = "torch.cuda.max_memory_allocated" if results["device"] == "cuda" else "peak resident memory"
    figure = pictures.draw_bars(bars, [""], [None], f"{unit[1]} per rank", dots_name="each rank")
    return picture(figure, " ".join(words), f"The highest rank, {measure}. {missing}".strip())


def _figures_table(results: dict) -> str:
    """Two tables, since one would be too wide for a narrow window or paper."""
    return _times_table(results) + _costs_table(results) + _pass_note(results)


def _row_name(index: int, config: dict) -> Html:
    """With what it is in small print."""
    setting = config["schedule"] or (None if config["stage"] is None else f"ZeRO-{config['stage']}")
    more = ["adaptive"] if is_adaptive(config) else []
    more += [config["estimate_comm"]] if config["estimate_comm"] not in (None, "full") else []
    detail = " · ".join(part for part in (config["optimizer"], setting, *more) if part)
    return Html(f"{chip(index, config['name'])}<small>{html.escape(detail)}</small>")


def _times_table(results: dict) -> str:
    unit = time_unit([config["step_s"]["median"] for _, config in measured(results)])
    head: list[object] = ["", f"step, {unit[1]}", Html(f"bound, {unit[1]}<small>step / bound</small>")]
    head += ["compute", "exposed", "overhead", Html("samples/s<small>samples / step</small>")]
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
                with_interval(config["step_s"], lambda value: time_words(value, unit)),
                Html(f"{time_words(config['bound_s'], unit)}<small>{_of_bound(config)}</small>"),
                *(time_words(part, unit) for part in split),
                Html(f"{number(speed, 1)}<small>{number(config['samples_per_step'], 0)}</small>"),
            ]
        )
    return table(head, rows)


def _costs_table(results: dict) -> str:
    peaks = [peak for config in results["configs"] for peak in config["peak_bytes"] or [] if peak is not None]
    memory = bytes_unit(peaks)
    sent = _wire_unit([config["sent_bytes"] for config in results["configs"] if config["sent_bytes"] is not None])
    head: list[object] = ["", "hidden", "idle", f"memory, {memory[1]}"]
    head += [Html(f"sent, {sent[1]}<small>step and rank</small>")] if sent else []
    head.append("final validation loss")
    rows: list[list[object]] = []
    for index, config in enumerate(results["configs"]):
        if config["failed"]:
            continue
        own = [peak for peak in config["peak_bytes"] or [] if peak is not None]
        row = [_row_name(index, config), percent(config["hidden_share"]), percent(config["idle_share"])]
        row.append(number(max(own, default=None), 0 if memory[1] == "MiB" else 2, memory[0]))
        row += [number(config["sent_bytes"], 1, sent[0])] if sent else []
        rows.append([*row, with_interval(config["final_val_loss"], lambda value: number(value, 4))])
    return table(head, rows) if rows else ""


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
        return paragraphs(["results.json compares no configuration of ACCO with one of DeepSpeed's own."])
    places = {config["name"]: index for index, config in enumerate(results["configs"])}
    baselines = list(dict.fromkeys(baseline for _, baseline in ratios))
    rows = []
    for name in dict.fromkeys(name for name, _ in ratios):
        cells = []
        for baseline in baselines:
            ratio = ratios.get((name, baseline))
            cell = with_interval(ratio and ratio["speedup"], number)
            cells.append(Html(cell + f"<small>{html.escape(ratio['verdict'])}</small>") if ratio else cell)
        rows.append([chip(places.get(name, 0), name), *cells])
    is_per_sample = any(is_adaptive(config) for _, config in measured(results))
    note = f"{'Time per sample' if is_per_sample else 'Step time'} of the configuration on top divided by that of the "
    note += "row, pass by pass: above 1 the row is faster."
    return (
        table(["", *(Html(f"over<br>{name_words(baseline)}") for baseline in baselines)], rows)
        + f'<p class="note">{note}</p>\n'
    )


def _manager_table(results: dict) -> str:
    if not results["manager"]:
        return paragraphs(["results.json has no such figures."])
    configs = {config["name"]: (index, config) for index, config in enumerate(results["configs"])}
    rows = []
    for line in results["manager"]:
        index, _ = configs.get(line["config"], (0, None))
        _, baseline = configs.get(line["baseline"], (0, None))
        rows.append(
            [
                chip(index, line["config"]),
                name_words(line["baseline"]),
                percent(line["idle_share"]),
                percent(baseline["idle_share"] if baseline else None),
                percent(line["hidden_share"]),
                percent(line["saved_share"]),
                number(line["saved_hours_per_1000_accelerator_hours"], 0),
            ]
        )
    head: list[object] = ["", "instead of", "accelerators idle", "idle before", "communication hidden", "time saved"]
    head.append(Html("accelerator-hours<br>saved of 1000"))
    is_per_sample = any(is_adaptive(config) for _, config in measured(results))
    note = f"For the same number of {'samples' if is_per_sample else 'steps'}. A negative figure is a loss."
    return table(head, rows) + f'<p class="note">{note}</p>\n'


def _what_was_run(results: dict) -> list[tuple[object, object]]:
    model, reference = results["model"] or {}, results["reference"] or {}
    compute, round_, micro = (reference.get(key) for key in ("compute_s", "round_s", "micro_batch_s"))
    unit = time_unit([value for value in (compute, round_) if value is not None])
    pairs: list[tuple[object, object]] = [
        ("command", code(results["command"])),
        ("script", code(" ".join([results["script"], *results["arguments"]]))),
        ("date", results["date"]),
        ("machine", results["machine"]),
        ("network", results["network"]),
        ("ranks", _ranks_words(results)),
    ]
    if results["emulated_ms"] is not None:
        emulated = f"emulated: each micro-batch waits {results['emulated_ms']:g} ms; the rest is real"
        pairs.append(("computation", emulated))
    pairs.append(("model", model_words(model)))
    batch = [f"n = {results['n']} micro-batches a step"] if results["n"] is not None else []
    batch += [f"{results['samples_per_step']:,} samples a step"] if results["samples_per_step"] is not None else []
    batch += [f"{results['tokens_per_sample']:g} tokens a sample"] if results["tokens_per_sample"] is not None else []
    pairs.append(("batch", ", ".join(batch) or "not known"))
    pairs.append(("passes", f"{results['passes']}, the configurations in alternation"))
    if compute is None or round_ is None:
        failure = reference.get("failed")
        pairs.append(("C and R", f"not measured: {failure}" if failure else "not measured"))
    else:
        words = f"C = {time_words(compute, unit)} {unit[1]}, R = {time_words(round_, unit)} {unit[1]}, "
        words += f"R/C = {number(round_ / compute) if compute > 0 else '–'}"
        words += "" if micro is None else f", one micro-batch C/n = {time_words(micro, unit)} {unit[1]}"
        pairs.append(("C and R", words))
    files = [f"{config['name']}: {config['file']}" for config in results["configs"] if config["file"]]
    pairs.append(("configurations", Html("<br>".join(code(file) for file in files)) if files else "not known"))
    return pairs


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
