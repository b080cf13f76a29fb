# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The page of one run: what its metrics, recorder files and DeepSpeed's csv_monitor hold."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from . import figures as pictures
from .figures import Bar, Line, Panel
from .html import (
    PART_COLOURS,
    UNIT_NAMES,
    Html,
    bytes_unit,
    clock_unit,
    code,
    model_words,
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
)
from .read_run import Run

_WARM_UP_STEPS = 2


_MOST_RANKS = 32


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
        bars.append(Bar(f"rank {header['rank']}", 0, parts, f"{time_words(whole, unit)} {unit[1]}"))
    return bars


def run_page(run: Run) -> str:
    """The HTML of what :func:`~deepspeed_acco.tools.report.read_run.read_run` returned."""
    series = windows(run)
    header = run.headers[0] if run.headers else {}
    return whole_page(
        f"One training run: {_name_of(run.folder.resolve())}",
        _optimizer_words(header) if header else "No recorder file tells its optimizer and batch.",
        section("What it shows", paragraphs(_run_words(run, series)), kind="verdict"),
        section("Loss", _run_loss_picture(run)),
        section("Rounds, window by window", _rounds_picture(series)),
        section("Step time", _run_step_picture(run)),
        _run_batch_picture(run),
        section("Error of the estimate", _error_picture(series)),
        section("Memory per rank", _run_memory_picture(run)),
        section("Figures", _run_table(run, series)),
        section("What was read", pairs(_what_was_read(run, header))),
        section("How to read this", pairs(_RUN_TERMS)),
    )


def _name_of(folder: Path) -> str:
    """The last part of the path; the last two where that is only a number, as in a comparison's folder."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdecimal() else folder.name


def _optimizer_words(header: dict) -> str:
    schedule = f", schedule {header['schedule']}" if header["schedule"] else ""
    words = [f"{header['optimizer'] or 'optimizer not known'}{schedule}"]
    words += ["adaptive windows"] if header["accumulation"] == "adaptive" else []
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
            f"{percent(hidden)} of the communication was hidden; in a median window training waited "
            f"{number(wait, 1)} ms for rounds of {number(statistics.median(series['round_ms'][1]), 1)} ms."
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
    clock = clock_unit(seconds)
    for key, factor, x_label in (
        ("seconds", clock[0], f"training time in {clock[1]}"),
        ("samples", 1.0, "samples seen"),
    ):
        lines = []
        for index, (loss, label) in enumerate((("val_loss", "validation loss"), ("loss", "training loss"))):
            x, y = points(run.metrics, key, loss, factor)
            if x:
                lines.append(Line(label, index, *thinned(x, y)))
        if lines:
            panels.append(Panel(x_label, "loss", lines))
    if not panels:
        return paragraphs(["No loss: there is no metrics.jsonl with one (examples/train_gpt.py --out writes it)."])
    words = [
        f"{line.label} against {panels[0].x_label}: {line.y[0]:.4g} to {line.y[-1]:.4g}." for line in panels[0].lines
    ]
    missing = "" if seconds else "metrics.jsonl has no seconds, so there is no picture against time. "
    caption = missing + "The training loss is the mean since the validation before; time is without validations."
    return picture(pictures.draw_lines(panels), " ".join(words), caption)


def _rounds_picture(series: dict) -> str:
    if "round_ms" not in series or "exposed_wait_ms" not in series:
        return paragraphs(
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
    words += f"{statistics.median(times[1].y):.4g} ms; hidden share of all {percent(_hidden_share(series))}."
    caption = "Rank 0." + thinning_words(series["round_ms"][0])
    return picture(pictures.draw_lines(panels, stacked=True, height=5.4), words, caption)


def _run_step_picture(run: Run) -> str:
    unit = time_unit([step["step_s"] for steps in timed_steps(run) for step in steps])
    bars = run_step_bars(run, unit)
    if not bars:
        return paragraphs(["No step times: there are no recorder files (rank*.jsonl) with timed steps."])
    names = ("computation and all else", "exposed communication", "outside engine.step()", "inside engine.step()")
    colours = (PART_COLOURS[0], PART_COLOURS[1], PART_COLOURS[0], PART_COLOURS[1])
    words = [f"Median step in {unit[1]}.", *(f"{bar.label}: {bar.remark}." for bar in bars[:_MOST_RANKS])]
    caption = "The bound needs C and R, which `ds_acco compare` measures." + _rank_words(len(bars))
    if any(bar.parts[3] for bar in bars):
        caption = (
            "What happens inside of engine.step() is communication and update; what the engine communicates during "
            "backward is outside. " + caption
        )
    x_label = f"{UNIT_NAMES[unit[1]]} per optimizer step"
    figure = pictures.draw_bars(bars[:_MOST_RANKS], names, colours, x_label)
    return picture(figure, " ".join(words), caption)


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
    caption += thinning_words(sizes)
    return section("Batch size over steps", picture(pictures.draw_lines([panel], height=3.4), words, caption))


def _rank_words(count: int) -> str:
    return f" The first {_MOST_RANKS} of {count} ranks." if count > _MOST_RANKS else ""


def _error_picture(series: dict) -> str:
    if "estimate_error" not in series:
        return paragraphs(["Not known: the monitor wrote no Train/ACCO/estimate_error (`sync` has none)."])
    x, y = series["estimate_error"]
    line = Line("error of the estimate", 0, *thinned(x, y))
    panel = Panel("samples seen", "error of the estimate", [line], from_zero=True, level=(1.0, "weights one step old"))
    words = f"Error of the estimate over samples: median {statistics.median(y):.4g}, last {y[-1]:.4g}."
    caption = "0 is a perfect estimate, 1 as good as the weights one step old." + thinning_words(x)
    return picture(pictures.draw_lines([panel], height=3.4), words, caption)


def _run_memory_picture(run: Run) -> str:
    peaks = []
    for header, steps in zip(run.headers, run.steps):
        known = [step["peak_bytes"] for step in steps[_WARM_UP_STEPS:] if step["peak_bytes"] is not None]
        if known:
            peaks.append((header["rank"], max(known)))
    if not peaks:
        return paragraphs(["Not known: there are no recorder files (rank*.jsonl) with it."])
    unit = bytes_unit([peak for _, peak in peaks])
    bars = []
    for rank, peak in peaks:
        remark = f"{number(peak, 0 if unit[1] == 'MiB' else 2, unit[0])} {unit[1]}"
        bars.append(Bar(f"rank {rank}", 0, [peak * unit[0]], remark))
    words = ["Peak memory.", *(f"{bar.label}: {bar.remark}." for bar in bars[:_MOST_RANKS])]
    figure = pictures.draw_bars(bars[:_MOST_RANKS], [""], [None], f"{unit[1]} per rank")
    return picture(figure, " ".join(words), _rank_words(len(bars)).strip())


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
        spread = f"{number(tenths[0], digits)} to {number(tenths[-1], digits)}"
        rows.append([what, number(statistics.median(values), digits), spread, f"{len(values):,}"])
    if "round_ms" in series and "exposed_wait_ms" in series:
        rows.append(["hidden share of all windows together", number(_hidden_share(series)), "", ""])
    if "skipped_commits" in series:
        rows.append(["skipped steps", number(series["skipped_commits"][1][-1], 0), "", ""])
    for what, key in (("last validation loss", "val_loss"), ("last training loss", "loss")):
        known = [line[key] for line in run.metrics if line[key] is not None]
        if known:
            rows.append([what, number(known[-1], 4), "", ""])
    if not rows:
        return paragraphs(["The files hold no figure yet."])
    return table(["", "median, or the figure", "80 % of the windows lie in", "windows"], rows)


def _what_was_read(run: Run, header: dict) -> list[tuple[object, object]]:
    shown = [str(path.relative_to(run.folder)) for path in run.sources]
    more = f" and {len(shown) - 40} more" if len(shown) > 40 else ""
    pairs: list[tuple[object, object]] = [
        ("folder", code(str(run.folder.resolve()))),
        ("files", Html("<br>".join(code(name) for name in shown[:40]) + more)),
    ]
    if header:
        pairs.append(("model", model_words(header)))
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
