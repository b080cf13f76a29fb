# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco report``: the page is well formed and needs nothing from outside, its pictures show the data, and what it
cannot read is refused."""

import base64
import copy
import csv
import html.parser
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import escape
from matplotlib.colors import to_hex

from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.tools import cli, palette
from deepspeed_acco.tools.compare.results import read_results
from deepspeed_acco.tools.report import command as report
from deepspeed_acco.tools.report import comparison_page, run_page
from deepspeed_acco.tools.report import figures as pictures
from deepspeed_acco.tools.report.read_run import read_run

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "source"}
NASTY = "acco <b>&\"'$x_1$"
KILLED = "rank 1 ended with exit code 9 <killed> & nothing else"


def _config(name, **values):
    config = {"name": name, "file": f"{name}.json", "optimizer": "AdamW", "schedule": None, "stage": 1, "step_s": None}
    config |= {"bound_s": None, "of_bound": None, "split": None, "hidden_share": None, "idle_share": None}
    config |= {"peak_bytes": [], "failed": None, "runs": [], "final_val_loss": None}
    return config | values


def _split(compute_s, exposed_s, overhead_s, **more):
    return {"compute_s": compute_s, "exposed_s": exposed_s, "overhead_s": overhead_s} | more


def _run(*points):
    keys = ("step", "samples", "seconds", "val_loss", "loss")
    return {"pass": 1, "folder": "runs/1", "steps": 4, "step_s": 1.5, "curve": [dict(zip(keys, p)) for p in points]}


def _results():
    configs = [
        _config(
            NASTY,
            optimizer="ACCO",
            schedule="acco",
            step_s={"median": 1.5, "low": 1.4375, "high": 1.5625},
            bound_s=1.25,
            of_bound=1.2,
            split=_split(1.25, 0.125, 0.125),
            hidden_share=0.9375,
            idle_share=1 / 6,
            peak_bytes=[3 * 2**30, 2 * 2**30],
            runs=[_run([0, 0, 0.0, 5.5, None], [2, 32, 3.0, None, 4.5], [4, 64, 6.0, 2.25, 3.0])],
            final_val_loss={"median": 2.25, "low": 2.125, "high": 2.375},
        ),
        _config("exploded", failed=KILLED, step_s=None),
        _config(
            "_zero1",
            step_s={"median": 2.0, "low": None, "high": None},
            split=_split(1.25, 0.75, 0.0, note="all but C"),
            idle_share=0.375,
            peak_bytes=[2**30, None],
            runs=[_run([0, 0, 0.0, 5.5, None], [4, 64, 8.0, 2.5, 3.5])],
        ),
        _config(
            "sync",
            optimizer="ACCO",
            schedule="sync",
            step_s={"median": 1.0, "low": 0.9, "high": 1.1},
            bound_s=1.75,
            split=_split(1.25, 0.25, -0.5),
            runs=[{"pass": 1, "curve": None}, _run([0, 0, 0.0, None, None])],
        ),
        _config("unsplit", step_s={"median": 3.0, "low": 3.0, "high": 3.0}),
    ]
    speedup = {"median": 1.3333, "low": 0.9, "high": 1.5}
    manager = {"config": NASTY, "baseline": "_zero1", "saved_share": 0.25, "idle_share": 1 / 6, "hidden_share": 0.9375}
    return {
        "version": 1,
        "command": "ds_acco compare 'a<b>.json' && true",
        "date": "2026-11-24",
        "machine": "2 cores & <no> GPU",
        "script": "dir/train.py",
        "arguments": ["--out", "{out}"],
        "world_size": 2,
        "network": "2 hosts, 300mbit",
        "emulated_ms": 250.0,
        "device": "cpu",
        "model": {"numel": 1234567, "weight_bytes": 2, "comm_bytes": 4},
        "n": 5,
        "samples_per_step": 16,
        "tokens_per_sample": 128,
        "passes": 1,
        "reference": {"compute_s": 1.25, "round_s": 0.5, "micro_batch_s": 0.25},
        "configs": configs,
        "ratios": [{"config": NASTY, "baseline": "_zero1", "speedup": speedup, "verdict": "no difference shown"}],
        "manager": [manager | {"saved_hours_per_1000_accelerator_hours": -250.0}],
        "verdict": ["What an earlier version said in its own units."],
    }


class _Page(html.parser.HTMLParser):
    """Fails where tags do not match; keeps the text, the sources and the ids."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.sources, self.ids, self.alts, self.links = [], [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        self.sources += [values[key] for key in ("src", "srcset") if key in values]
        self.ids += [values["id"]] if "id" in values else []
        self.alts += [values["alt"]] if tag == "img" else []
        self.links += [values["href"]] if "href" in values else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are drawn for a screen, not those for a phone."""
    drawn = []
    draw = pictures.data_uri

    def note(figure):
        if figure.get_size_inches()[0] < 9:
            return "data:image/svg+xml;base64,PHN2Zy8+"  # an empty picture: saving one is what takes time
        drawn.append(figure)
        return draw(figure)

    monkeypatch.setattr(pictures, "data_uri", note)
    return drawn


def _written(folder, results):
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return path


def _lines(axes):
    """label place -> points, of the lines with data coordinates."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def _assert_self_contained(page):
    assert page.sources and not page.links and len(set(page.ids)) == len(page.ids)
    for source in page.sources:
        assert source.startswith("data:image/svg+xml;base64,")
        svg = base64.b64decode(source.partition(",")[2]).decode()
        for element in ElementTree.fromstring(svg).iter():
            for name, value in element.attrib.items():
                assert "http" not in value, f"{element.tag} {name}={value}"
                assert not name.endswith("href") or value.startswith("#")
    assert all(len(alt) > 20 for alt in page.alts) and 2 * len(page.alts) == len(page.sources)


def test_the_page_of_a_comparison(tmp_path):
    path = report.write(_written(tmp_path, _results()))
    assert path == tmp_path / "report.html"
    text = path.read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    page = _Page(text)
    _assert_self_contained(page)
    for words in (
        f"No difference shown between {NASTY} and _zero1, the fastest of DeepSpeed's own here: 1.500 s a step against "
        "2.000 s, 1.333 times (95 % interval 0.900 to 1.500).",
        f"exploded failed: {KILLED}.",
        NASTY,
        f"exploded {KILLED}",
        "ds_acco compare 'a<b>.json' && true",
        "dir/train.py --out {out}",
        "2 cores & <no> GPU",
        "2 hosts, 300mbit",
        "2026-11-24",
        "each micro-batch waits 250 ms",
        "1,234,567 trainable parameters, weights of 2 bytes, communicated in 4 bytes",
        "C = 1.250 s, R = 0.500 s, R/C = 0.400, one micro-batch C/n = 0.250 s",
        "1.500 1.438 to 1.562",  # the interval of acco's step
        "1.250 1.200",  # bound and step / bound
        "1.250 0.125 0.125 – –",  # its parts; samples are not known
        "93.8 % 16.7 % 3.00 2.2500 2.1250 to 2.3750",
        "1.250 0.250 −0.500",
        "1.333 0.900 to 1.500 no difference shown",
        "_zero1 16.7 % 37.5 % 93.8 % 25.0 % −250",
        "There was one pass only",
        "all but C.",
        "No curve of sync and unsplit",
        "Not measured for sync and unsplit.",
        "max(A, R) + max(B, R)",
    ):
        assert words in page.text.replace(" ,", ","), words
    assert "sent," not in page.text and "sent by a host" not in page.text and "Batch size" not in page.text
    assert "<code>ds_acco compare &#39;a&lt;b&gt;.json&#39;" in text
    assert "nan" not in page.text.lower() and "None" not in page.text and "in its own units" not in page.text


@pytest.mark.full
def test_the_same_results_give_the_same_bytes(tmp_path):
    path = _written(tmp_path, _results())
    assert report.write(path).read_bytes() == report.write(path, tmp_path / "again.html").read_bytes()


@pytest.mark.filterwarnings("error")
def test_pictures_of_a_comparison_show_the_data(tmp_path, figures):
    report.write(_written(tmp_path, _results()))
    steps, losses, close, memory = figures
    (axes,) = steps.axes
    widths = [[patch.get_width() for patch in container] for container in axes.containers]
    # Rows: acco, _zero1, sync (whose negative overhead shortens what is before it), unsplit; the failed one is in none.
    assert widths == [[1.25, 1.25, 1.0, 0.0], [0.125, 0.75, 0.0, 0.0], [0.125, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]
    begins = [[patch.get_x() for patch in container] for container in axes.containers]
    assert begins[1:] == [[1.25, 1.25, 1.0, 0.0], [1.375, 2.0, 1.0, 0.0], [1.5, 2.0, 1.0, 0.0]]
    assert [label.get_text().strip("\u200b") for label in axes.get_yticklabels()] == [
        NASTY,
        "_zero1",
        "sync",
        "unsplit",
    ]
    lines = _lines(axes)
    assert ([1.4375, 1.5625], [0, 0]) in lines and ([0.9, 1.1], [2, 2]) in lines
    assert ([1.25, 1.25], [-0.4, 0.4]) in lines and ([1.75, 1.75], [1.6, 2.4]) in lines
    assert [text.get_text() for text in axes.texts][:2] == ["1.500 s   1.200 × bound", "2.000 s"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top

    for figure in (losses, close):
        clock, data = figure.axes
        assert _lines(clock) == [([0.0, 6.0], [5.5, 2.25]), ([0.0, 8.0], [5.5, 2.5])]
        assert _lines(data) == [([0, 64 * 128], [5.5, 2.25]), ([0, 64 * 128], [5.5, 2.5])]
        assert "time in s" in clock.get_xlabel() and "tokens" in data.get_xlabel()
    assert close.axes[0].get_ylim()[1] == pytest.approx(2.5 + 0.1 * 3.25)

    (axes,) = memory.axes
    assert [patch.get_width() for patch in axes.containers[0]] == [3.0, 1.0]
    assert ([3.0, 2.0], [0, 0]) in _lines(axes) and ([1.0], [1]) in _lines(axes)
    assert "GiB" in axes.get_xlabel()


def test_adaptive_steps_are_shown_per_nominal_batch(tmp_path, figures):
    """Of the nominal 16 samples its median step has 32: its times count half."""
    results = _results() | {"passes": 2}
    acco = results["configs"][0]
    acco |= {"accumulation": "adaptive", "samples_per_step": 32.0, "sent_bytes": 123_456_789.0}
    acco |= {"estimate_comm": "int4", "commit_comm": "int8"}
    acco["samples_per_s"] = {"median": 21.25, "low": 20.0, "high": 22.0}
    for place, sent in ((0, 250_000_000.0), (2, 62_500_000.0)):
        results["configs"][place]["interface_bytes"] = sent
    acco["runs"] = [acco["runs"][0] | {"batch": [16, 32, 48]}, acco["runs"][0] | {"batch": [16, 40]}]
    results["configs"][2] |= {"samples_per_step": 16.0, "samples_per_s": {"median": 8.0, "low": 8.0, "high": 8.0}}
    page = _Page(report.write(_written(tmp_path, results)).read_text())
    steps, batch, *_ = figures
    (axes,) = steps.axes
    assert axes.get_xlabel() == "seconds per 16 samples"
    widths = [[patch.get_width() for patch in container] for container in axes.containers]
    assert [part[:2] for part in widths[:2]] == [[0.625, 1.25], [0.0625, 0.75]]
    assert ([0.625, 0.625], [-0.4, 0.4]) in _lines(axes) and ([0.71875, 0.78125], [0, 0]) in _lines(axes)
    assert axes.texts[0].get_text() == "0.750 s   1.200 × bound"
    (axes,) = batch.axes
    assert _lines(axes)[:2] == [([1, 2, 3], [16, 32, 48]), ([1, 2], [16, 40])]
    assert [text.get_text() for text in batch.legends[0].get_texts()] == [NASTY, "nominal, 16"]
    assert _lines(axes)[2][1] == [16, 16] and axes.get_ylim()[0] == 0
    for words in (
        "Batch size over steps",
        "1.500 1.438 to 1.562 1.250 1.200 1.250 0.125 0.125 21.2 32",  # the table keeps the times of its own steps
        "0.750 0.000 8.0 16",
        "ACCO · acco · adaptive · int4 · COMMIT int8",
        "sent, MB step and rank MB sent by a host step, with headers",
        "3.00 123.5 250.0 2.2500",
        "1.00 – 62.5 –",
        "so all times are per nominal batch.",
        "For the same number of samples.",
        "Time per sample of the configuration",
    ):
        assert words in page.text, words
    assert comparison_page.batch_lines(read_results(_written(tmp_path, _results()))) == []


def test_a_configuration_has_one_color(tmp_path, figures):
    page = report.write(_written(tmp_path, _results())).read_text()
    steps, losses, _, memory = figures
    colors = palette.colors_of([NASTY, "exploded", "_zero1", "sync", "unsplit"])
    assert colors["sync"] == palette.SERIES["sync"]
    for row, name in enumerate((NASTY, "_zero1")):
        color = colors[name]
        assert to_hex(losses.axes[0].get_lines()[row].get_color()) == color.lower()
        assert to_hex(memory.axes[0].containers[0][row].get_facecolor()) == color.lower()
        chips = [line for line in steps.axes[0].get_lines() if line.get_marker() == "s"]
        assert to_hex(chips[row].get_color()) == color.lower()
        assert page.count(f'--light:{color};--dark:{pictures.DARK[color]}"></i>{escape(name)}') >= 1
    texts = figures[2].legends[0].get_texts()
    assert [text.get_text().strip("\u200b") for text in texts] == [NASTY, "_zero1"]  # "_" is not taken for a secret
    for text in [*texts, *steps.axes[0].get_yticklabels()]:
        assert not text.get_parse_math()  # nor "$" for a formula
    # No color of a part is one of a configuration's, so that none has two meanings in one picture.
    parts = {to_hex(container[0].get_facecolor()) for container in steps.axes[0].containers}
    assert parts.isdisjoint(color.lower() for color in colors.values())


def test_samples_where_tokens_are_not_known_and_several_passes(tmp_path, figures):
    results = _results() | {"tokens_per_sample": None, "passes": 2, "emulated_ms": None, "reference": None, "n": None}
    results["configs"][0]["runs"] *= 2
    page = _Page(report.write(_written(tmp_path, results)).read_text())
    data = figures[1].axes[1]
    assert "samples" in data.get_xlabel() and _lines(data)[:2] == [([0, 64], [5.5, 2.25])] * 2
    assert len(figures[2].legends[0].get_texts()) == 2
    assert "One line per pass." in page.text and "C and R not measured" in page.text and "emulated" not in page.text


def test_nothing_but_failures(tmp_path, figures):
    failed = [_config("a", failed="no"), _config("b", failed="neither")]
    reference = {"compute_s": None, "round_s": None, "micro_batch_s": None, "failed": "killed <9>"}
    results = _results() | {"configs": failed, "ratios": [], "manager": [], "verdict": [], "reference": reference}
    results |= {"world_size": None, "device": None, "samples_per_step": None, "model": {"numel": None}}
    page = _Page(report.write(_written(tmp_path, results)).read_text())
    assert not figures and "a no b neither" in page.text
    assert "not measured: killed <9>" in page.text and "None" not in page.text
    assert page.text.count("nothing to draw") == 3 and "Nothing is compared" in page.text


def test_a_run_that_diverged(tmp_path, figures):
    results = _results()
    results["configs"][2]["final_val_loss"] = dict.fromkeys(("median", "low", "high"), float("nan"))
    results["configs"][2]["runs"][0]["curve"][1]["val_loss"] = float("nan")
    page = _Page(report.write(_written(tmp_path, results)).read_text())
    assert _lines(figures[1].axes[0])[1] == ([0.0], [5.5]) and "nan" not in page.text.lower()


@pytest.mark.full
def test_many_configurations_stay_apart(tmp_path, figures, monkeypatch):
    everything, draw = [], pictures.data_uri
    monkeypatch.setattr(pictures, "data_uri", lambda figure: everything.append(figure) or draw(figure))
    results = _results()
    results["configs"] = [_results()["configs"][0] | {"name": f"{'long' * 12}{i}"} for i in range(11)]
    report.write(_written(tmp_path, results))
    lines = comparison_page.loss_lines(read_results(tmp_path / "results.json"), lambda point: point.seconds, 1.0)
    looks = {(line.color, line.dash % 4) for line in lines}
    assert len(looks) == 11
    for figure in everything:  # nothing is drawn outside of the picture
        figure.draw_without_rendering()
        size = figure.get_size_inches() * figure.dpi
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= size[0] + 1, "the legend is cut"
        for axes in figure.axes:
            for text in [*axes.texts, *axes.get_yticklabels()]:
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.x1 <= size[0] + 1, text.get_text()


CONTROL = "zero\x001\x1b[31m \x7f\ud800\uffff\nred"


def test_control_characters_blank_no_picture(tmp_path):
    """XML has none of them: a browser would show a broken picture instead of the whole."""
    results = _results()
    results["configs"][2]["name"] = results["ratios"][0]["baseline"] = results["manager"][0]["baseline"] = CONTROL
    for key in ("script", "machine", "network", "command"):
        results[key] = CONTROL
    text = report.write(_written(tmp_path, results)).read_text(encoding="utf-8")
    page = _Page(text)
    _assert_self_contained(page)  # parses every picture
    assert not set(text) & set("\x00\x1b\x7f\ud800\uffff")
    assert "zero\ufffd1\ufffd[31m \ufffd\ufffd\ufffd red" in page.text


def test_pictures_can_be_read_on_a_phone_and_in_the_dark(tmp_path):
    """400 pixels wide, less the page's margins of 16, the narrow ones have letters of 11 pixels at least."""
    page = _Page(report.write(_written(tmp_path, _results())).read_text())
    narrow, wide = page.sources[::2], page.sources[1::2]
    for sources, shown_px in ((narrow, 400 - 2 * 16), (wide, 960)):
        for source in sources:
            svg = base64.b64decode(source.partition(",")[2]).decode()
            width_pt = float(re.search(r'width="([\d.]+)pt"', svg)[1])
            assert pictures.FONT_PT * shown_px / width_pt >= 11
            style = re.search(r":root\{(.*?)\}@media \(prefers-color-scheme:dark\)\{:root\{(.*?)\}", svg)
            light, dark = (dict(pair.split(":") for pair in part.split(";") if pair) for part in style.groups())
            assert light.keys() == dark.keys() >= {f"--c{pictures.INK[1:]}"} and light != dark
            assert set(re.findall(r"var\((--c\w+)\)", svg)) == light.keys()
            rest = svg.replace(style[0], "")
            assert not re.search("#[0-9a-f]{6}", rest), "no color stays the same"


def test_a_new_row_of_schedules_has_its_page(tmp_path, figures, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "twin", replace(SCHEDULES["acco"], name="twin"))
    results = _results()
    results["configs"][0]["schedule"] = "twin"
    page = _Page(report.write(_written(tmp_path, results)).read_text())
    assert "max(A, R) + max(B, R) for acco and twin, max(C, R) for local, wp and dpu, C + R for sync." in page.text
    assert "ACCO · twin" in page.text and f"Why {NASTY} is not faster" in page.text
    assert figures[0].axes[0].containers[1][0].get_width() == 0.125


def test_words_tables_and_pictures_round_alike(tmp_path, figures):
    """Of a real comparison, whose file has sentences in other units."""
    page = _Page(
        report.write(ROOT / "benchmarks" / "results" / "compare_real_small.json", tmp_path / "x.html").read_text()
    )
    sentence, table, remark = "272.7 ms a step against 274.6 ms", "acco ACCO · acco 272.7", "272.7 ms   1.013 × bound"
    assert sentence in page.text and table in page.text
    assert figures[0].axes[0].texts[0].get_text() == remark
    assert "0.273 s" not in page.text
    assert "acco needs at most 542 MiB a rank, zero1 556 MiB." in page.text
    assert figures[3].axes[0].texts[0].get_text() == "542 MiB"
    for percentage in re.findall(r"[^ ]*\([+−-][\d.]+ ?%[^)]*\)", page.text):
        assert "one seed" in percentage


def _broken(change):
    results = copy.deepcopy(_results())
    change(results)
    return json.dumps(results)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no results.json that can be read"),
        ("[1]", r"it holds \[1\]; allowed: an object"),
        ("{}", "its version is None; allowed: 1"),
        (
            _broken(lambda r: r.update(version=2)),
            r"has version 2; this deepspeed_acco reads version 1. Update it \(pip",
        ),
        (_broken(lambda r: r.update(version="1")), "its version is '1'; allowed: 1"),
        (_broken(lambda r: r.pop("configs")), "there is no key 'configs'"),
        (_broken(lambda r: r["configs"][2].pop("name")), r"configs\[2\] has no key 'name'"),
        (
            _broken(lambda r: r["configs"][0]["step_s"].update(median="1")),
            r"configs\[0\].step_s.median is '1'; allowed: a",
        ),
        (
            _broken(lambda r: r["configs"][0]["step_s"].update(median=float("nan"))),
            r"configs\[0\].step_s.median is nan; allowed: a number",
        ),
        (
            _broken(lambda r: r["configs"][0]["step_s"].update(median=-1.0)),
            r"configs\[0\].step_s.median is -1.0; allowed: a number from 1e-30 to 1e\+30",
        ),
        (
            _broken(lambda r: r.update(passes=10**400)),
            r"passes is 1000.*0000; allowed: a whole number from 0 to 1e\+30",
        ),
        ("[" * 5000 + "]" * 5000, "it is nested too deeply"),
        (_broken(lambda r: r.update(verdict="fine")), "verdict is 'fine'; allowed: a list"),
        (_broken(lambda r: r.update(passes=True)), "passes is True; allowed: a whole number"),
    ],
)
def test_a_results_json_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_results(path)
    assert str(path) in str(caught.value) and not (tmp_path / "report.html").exists()
    assert "ds_acco compare" in str(caught.value) or "pip install" in str(caught.value)


# ---- one run


def _write_csv(folder, name, *rows):
    """As DeepSpeed's csv_monitor does: the heading at each start of the job."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"Train_ACCO_{name}.csv", "a+") as file:
        writer = csv.writer(file)
        writer.writerow(["step", name])
        writer.writerows(rows)


def _write_jsonl(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _metrics(step, samples, loss, val_loss, seconds):
    values = {"step": step, "samples": samples, "loss": loss, "val_loss": val_loss, "seconds": seconds}
    return values | {"grad_norm": None, "lr": 0.1}


def _recorded(folder, rank, schedule="acco"):
    header = {"rank": rank, "world_size": 2, "optimizer": "ACCO", "schedule": schedule, "stage": 1, "numel": 1000}
    header |= {"samples_per_step": 8, "n": 4, "a": 2, "device": "cpu", "weight_bytes": 2, "comm_bytes": 2}
    header |= {"micro_batch": 1, "estimate_comm": "full", "commit_comm": "int8"}
    keys = ("step", "step_s", "inside_s", "round_s", "exposed_s", "rounds", "peak_bytes", "looked", "loss")
    steps = [
        [1, None, 0.5, 0.5, 0.125, 2, 2**30, False, None],  # the first two load and build
        [2, 50.0, 0.5, 0.5, 0.125, 2, 2**30, False, None],
        [3, 2.0, 0.5, 1.0, 0.25, 2, (rank + 5) * 2**20, False, None],
        [4, 9.0, 0.5, 1.0, 0.25, 2, 2**20, True, None],
        [5, 3.0, 0.25, 2.0, 1.0, 2, 2**20, False, None],
    ]
    if schedule is None:
        steps = [[*step[:3], None, None, None, *step[6:]] for step in steps]
    _write_jsonl(folder / f"rank{rank}.jsonl", header, *(dict(zip(keys, step)) for step in steps))


def test_the_page_of_one_run(tmp_path, figures):
    _write_jsonl(tmp_path / "metrics.jsonl", _metrics(0, 0, None, 5.0, 0.0), _metrics(2, 16, 4.5, 4.0, 2.5))
    for rank in (0, 1):
        _recorded(tmp_path, rank)
    monitor = tmp_path / "logs" / "acco"
    _write_csv(monitor, "estimate_error", [8, 0.9], [16, 0.7], [24, 0.3])
    _write_csv(monitor, "estimate_error", [16, 0.5], [24, "nan"], [32, 0.25])  # started again from a checkpoint
    _write_csv(monitor, "skipped_commits", [8, 0], [16, 3])
    page = _Page(report.write_run(tmp_path).read_text())
    _assert_self_contained(page)
    losses, rounds, steps, error, memory = figures
    assert _lines(losses.axes[0]) == [([0.0, 2.5], [5.0, 4.0]), ([2.5], [4.5])]
    assert _lines(losses.axes[1]) == [([0, 16], [5.0, 4.0]), ([16], [4.5])]
    times, hidden = rounds.axes
    samples = [8, 16, 24, 32, 40]
    assert _lines(times) == [(samples, [500, 500, 1000, 1000, 2000]), (samples, [125, 125, 250, 250, 1000])]
    assert _lines(hidden) == [(samples, [75, 75, 75, 75, 50])]
    # Steps 3 and 5 count: medians 2.5 s with 0.625 s exposed.
    widths = [[patch.get_width() for patch in container] for container in steps.axes[0].containers]
    assert widths == [[1.875] * 2, [0.625] * 2, [0.0] * 2, [0.0] * 2]
    assert _lines(error.axes[0])[0] == ([8, 16, 32], [0.9, 0.5, 0.25])
    assert [patch.get_width() for patch in memory.axes[0].containers[0]] == [5.0, 6.0]
    for words in (
        "65.0 % of the communication was hidden",  # 1 - 1.75 / 5
        "Last validation loss: 4.0000 after 2 steps.",
        "3 steps were skipped",
        "ACCO, schedule acco · COMMIT int8 · ZeRO stage 1 · 2 ranks · on cpu",
        "optimizer step of rank 0, s 2.500 2.100 to 2.900 2",
        "logs/acco/Train_ACCO_estimate_error.csv",
        "n = 4 micro-batches a step, 2 of them in phase A",
    ):
        assert words in page.text, words


def test_the_page_of_an_adaptive_run(tmp_path, figures):
    for rank, samples in enumerate(((8, 8, 24, 40, 16), (8, 8, 8, 8, 8))):
        _recorded(tmp_path, rank)
        path = tmp_path / f"rank{rank}.jsonl"
        header, *steps = (json.loads(line) for line in path.read_text().splitlines())
        for line, own in zip(steps, samples):
            line |= {"samples": own, "sent_bytes": 2_500_000 + line["step"], "received_bytes": 1_500_000}
            line["interface_bytes"] = 5_000_000 if rank == 0 else None
        _write_jsonl(path, header | {"accumulation": "adaptive"}, *steps)
    page = _Page(report.write_run(tmp_path).read_text())
    rounds, _, batch, _ = figures
    assert _lines(batch.axes[0])[0] == ([1, 2, 3, 4, 5], [16, 16, 32, 48, 24])
    assert _lines(rounds.axes[0])[0][0] == [16, 32, 64, 112, 136]  # samples so far, of both ranks
    for words in (
        "· adaptive windows ·",
        "Batch size over steps",
        "samples per step, all ranks 24",
        "sent by rank 0, MB per step 2.5",
        "sent by rank 0's host, MB per step 5.0",
    ):
        assert words in page.text, words
    (tmp_path / "rank1.jsonl").unlink()
    assert run_page.batch_sizes(read_run(tmp_path)) == [], "one rank is not all"


def test_what_a_run_lacks_is_said(tmp_path, figures):
    _write_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "samples": 4, "val_loss": 3.5})
    page = _Page(report.write_run(tmp_path).read_text())
    assert len(figures) == 1 and len(figures[0].axes) == 1
    for words in (
        "has no seconds",
        "No rounds:",
        "No step times:",
        "Train/ACCO/estimate_error",
        "Memory per rank Not known",
    ):
        assert words in page.text, words


def test_the_monitor_alone(tmp_path, figures):
    _write_csv(tmp_path, "round_ms", [8, 20.0], [16, 30.0])
    _write_csv(tmp_path, "exposed_wait_ms", [8, 5.0], [16, 0.0])
    _write_csv(tmp_path, "hidden_share", [8, 0.75], [16, 1.0])
    page = _Page(report.write_run(tmp_path).read_text())
    (rounds,) = figures
    assert [_lines(axes) for axes in rounds.axes] == [
        [([8, 16], [20, 30]), ([8, 16], [5, 0])],
        [([8, 16], [75, 100])],
    ]
    assert "90.0 % of the communication was hidden" in page.text and "No loss:" in page.text


def test_a_stock_optimizers_run(tmp_path, figures):
    _recorded(tmp_path, 0, schedule=None)
    page = _Page(report.write_run(tmp_path).read_text())
    widths = [[patch.get_width() for patch in container] for container in figures[0].axes[0].containers]
    assert widths == [[0.0], [0.0], [2.125], [0.375]]
    assert "How much communication was hidden is not known" in page.text


def test_long_runs_are_thinned(tmp_path, figures):
    _write_csv(tmp_path, "round_ms", *([8 * i, i] for i in range(1000)))
    _write_csv(tmp_path, "exposed_wait_ms", *([8 * i, 0] for i in range(1000)))
    page = _Page(report.write_run(tmp_path).read_text())
    x, y = _lines(figures[0].axes[0])[0]
    assert len(x) == 334 and (x[1], y[1]) == (8 * 4, 4) and "median of 3 windows" in page.text


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write_jsonl(path, _metrics(0, 0, None, 5.0, 0.0))
    path.write_text(path.read_text() + '{"step": 2, "sam')
    assert [point.samples for point in read_run(tmp_path).metrics] == [0]


def _two_runs(folder):
    for name in ("1", "2"):
        (folder / name).mkdir()
        _write_jsonl(folder / name / "metrics.jsonl", _metrics(0, 0, None, 5.0, 0.0))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, r"has no file that a report can show; allowed: results.json .* Give the folder"),
        (_two_runs, "has metrics.jsonl of several runs, in 1, 2. Give the folder of one of them"),
        (lambda folder: (folder / "metrics.jsonl").write_text("{\n{}\n"), "metrics.jsonl, line 1: .* Delete the line"),
        (
            lambda folder: _write_jsonl(folder / "metrics.jsonl", {"val_loss": "low"}),
            "line 1: val_loss is 'low'; allowed: a",
        ),
        (
            lambda folder: _write_jsonl(folder / "rank0.jsonl", {"step": 1}),
            "rank0.jsonl, line 1: there is no key 'rank'",
        ),
        (lambda folder: (folder / "rank0.jsonl").write_text(""), "rank0.jsonl is empty"),
        (
            lambda folder: _write_jsonl(
                folder / "rank0.jsonl", {"rank": 0, "n": 0, "micro_batch": 1, "samples_per_step": 1}
            ),
            "rank0.jsonl, line 1: n is 0; allowed: a whole number >= 1",
        ),
        (
            lambda folder: _write_csv(folder, "round_ms", [8, 1e300]),
            r"round_ms.csv, line 2 is '8,1e\+300'; allowed: samples >= 0 and a value, both up to 1e\+30",
        ),
        (
            lambda folder: _write_csv(folder, "round_ms", [8, "fast"]),
            "round_ms.csv, line 2 is '8,fast'; allowed: samples and",
        ),
    ],
)
def test_a_run_that_cannot_be_read(tmp_path, prepare, words):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=words):
        read_run(tmp_path)


# ---- the command


def test_the_command(tmp_path, capsys):
    path = _written(tmp_path, _results())
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert cli.main(["report", str(path), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    run = tmp_path / "run"
    _write_csv(run, "estimate_error", [8, 0.5])
    assert cli.main(["report", str(run)]) == 0
    assert "One training run: run" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere"], "nowhere does not exist; give a results.json"),
        (["{}"], "has no file that a report can show"),
        (["{}/broken.json"], "broken.json is no results.json that can be read"),
        (["{}", "--out", "{}"], "is not allowed; allowed: a file in a folder that exists"),
        (["{}", "--out", "{}/no/x.html"], "is not allowed; allowed: a file in a folder that exists"),
    ],
)
def test_arguments_that_are_refused(tmp_path, capsys, arguments, words):
    (tmp_path / "broken.json").write_text("no")
    assert cli.main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    path = _written(tmp_path, _results())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(path)]) == 1
    assert 'pip install "deepspeed_acco[report]"' in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        report.write(path)
