# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the command lines of every subcommand of ``ds_acco``.

Nothing is measured: where ranks or kernels would run stands an error or a fixed figure. ``--model`` is left out, whose
values transformers looks up elsewhere.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from deepspeed_acco.tools import cli
from tests.fuzz.in_process import problem, without_pictures

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ["acco.json", "zero1.json", "wp.json", "acco_auto.json"]
RESULTS = "compare_real_small.json"
SUBCOMMANDS = ("init", "check", "fit", "plan", "compare", "report", "doctor", "kernels", "env", "schema", "completion")
PLAN = ["--params=7B", "--ranks=64", "--hosts=8", "--bandwidth=100gbit", "--micro-batch-ms=300", "--n=24"]
LOG = ROOT / "tests" / "tools" / "logs" / "zero1.log"
FIT = ["--params=30k", "--backend=gloo", "--stage=1", "--steps=1000"]
VALID = {
    "init": [["--from=zero1.json"], ["--from=zero1.json", "--out=new.json"]],
    "check": [["acco.json"], ["acco_auto.json", "--hf"], ["wp.json", "--ranks=2"]],
    "fit": [["run.log", *FIT], ["odd.log", *FIT, "--json=fit.json"], ["odd.log", *FIT[:2], "--stage=2", "--ranks=8"]],
    "plan": [PLAN, ["--results", RESULTS], [*PLAN, "--round-ms=648"], [*PLAN, "--micro-batch-size=1000"]],
    "compare": [[*CONFIGS[:2], "--num_accelerators=2"], [CONFIGS[0], "--emulate-compute=5", "--num_accelerators=2"]],
    "report": [[RESULTS, "--out=page.html"], ["run"]],
    "doctor": [["--num_accelerators=2"], ["--config=acco.json", "--json=doctor.json", "--hostfile=hostfile"]],
    "kernels": [["--numel=1000", "--device=cpu"]],
    "env": [[]],
    "schema": [[], ["--out=schema.json"]],
    "completion": [["bash"], ["zsh"]],
}
NUMBERS = ["0", "1", "-1", "7", "0.5", "1.5", "8 ", "1e3", "1e18", "1e19", "1e99", "1e400", "1e-30", "1e-320"]
NUMBERS += ["9" * 400, "nan", "inf", "-inf", "0x10", "1_000", "٣", "10**9", "1,5", "7B", "350M"]
UNITS = ["300mbit", "0mbit", "300mbit\n", "1gbit;id", "1GBIT/s", "12.5GB/s", "1e29Tbit", "-5us", "10us", "1e5000us"]
UNITS += ["80GB", "1e-30MB", "300ms", "3min", "1e30s", "5s"]
TEXTS = ["", " ", "-", "-x", "--", "--x", "x", "auto", "bf16", "gloo", "cuda", "\x1b[31mred", "\udcff", "a\u202eb"]
TEXTS += ["ü" * 300, "%s%n", "{out}", "$(id)", "'\"<b>", "@file", "a\nb"]
PATHS = [".", "..", "/dev", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/nope/x", "nowhere/x"]
PATHS += ["text.txt", "hostfile", "odd_hostfile", "run/../text.txt", "broken.json", "deep.json", "list.json"]
PATHS += ["run.log", "odd.log"]
PATHS += [*CONFIGS, RESULTS]
POOLS = (NUMBERS, UNITS, TEXTS, PATHS)
ODD_TIMES = [b"0.00", b"0", b"9" * 15, b"9" * 400, b"1e9", b"nan", b"-5.00", b"1.2.3", b"\xff", b"", b"7.00", b"7.01"]
HOSTFILE = "one slots=2\ntwo slots=2\n"
ODD_HOSTS = ["-oProxyCommand=id slots=2", "a slots=-1", "a slots=99999999999999999999", "a", "a slots=x", "a slots=0"]
ODD_HOSTS += [
    "a slots=1\na slots=1",
    "",
    "# none",
    "a;id slots=1",
    "user@-x slots=1",
    "\x00 slots=1",
    "\x1b[2J slots=1",
]


def _options_of(subcommand: str) -> list[str]:
    """Returns the options that the help names, so that new ones are tried, too."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([subcommand, "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said.getvalue())) - {"--help", "--model", "--model-name"})


def _make_files(folder: Path, choose: random.Random) -> None:
    for name in CONFIGS:
        shutil.copy(ROOT / "ds_configs" / name, folder)
    shutil.copy(ROOT / "benchmarks" / "results" / RESULTS, folder)
    (folder / "run.log").write_text(LOG.read_text())
    (folder / "odd.log").write_bytes(_damaged(LOG.read_bytes(), choose))
    (folder / "text.txt").write_text("no JSON")
    (folder / "hostfile").write_text(HOSTFILE)
    (folder / "odd_hostfile").write_bytes(choose.choice(ODD_HOSTS).encode("utf-8", "surrogatepass"))
    (folder / "broken.json").write_bytes(b'{"optimizer": \xff')
    (folder / "deep.json").write_text('{"optimizer": ' + "[" * 3000 + "]" * 3000 + "}")
    (folder / "list.json").write_text("[1]")
    os.mkfifo(folder / "fifo")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "val_loss": 2.5}\n')


def _damaged(log: bytes, choose: random.Random) -> bytes:
    """Returns the log with lines left out, doubled and swapped, and with odd numbers."""
    lines = log.splitlines(keepends=True)
    for _ in range(choose.randrange(40)):
        at, other = choose.randrange(len(lines)), choose.randrange(len(lines))
        kind = choose.randrange(4)
        if kind == 0:
            lines[at] = b""
        elif kind == 1:
            lines[at] += lines[other]
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines[at] = re.sub(rb"[0-9]+\.[0-9]+", lambda _: choose.choice(ODD_TIMES), lines[at])
    return b"".join(lines)


def _pool_of(option: str) -> list[str]:
    """Returns the values of which some are right for the option: others seldom come further than its reader."""
    if any(word in option for word in ("script", "hostfile", "results", "calibrate", "config", "from")):
        return [*PATHS, "fifo"]  # to write to one is to wait for a reader, as ever
    if any(word in option for word in ("json", "out")):
        return PATHS
    if any(word in option for word in ("rate", "bandwidth", "memory", "latency", "-ms", "-ns", "compute")):
        return UNITS
    return NUMBERS


def _line(choose: random.Random, options: dict[str, list[str]]) -> list[str]:
    subcommand = choose.choice(("plan", "plan", "compare", "compare", *SUBCOMMANDS))
    words = [subcommand, *choose.choice(VALID[subcommand])]
    for _ in range(choose.choice((0, 1, 1, 1, 2, 3))):
        option = choose.choice(options[subcommand] or [""])
        value = choose.choice(_pool_of(option) if choose.random() < 0.7 else choose.choice(POOLS))
        kind = choose.random()
        if kind < 0.7:
            words.append(f"{option}={value}")
        elif kind < 0.85:
            words += [option, value]
        elif kind < 0.95:
            words.insert(choose.randrange(1, len(words) + 1), value)
        else:
            words.append(option)
    if len(words) > 1 and choose.random() < 0.15:
        words.pop(choose.randrange(len(words)))
    return words


@contextlib.contextmanager
def _nothing_is_measured() -> Iterator[None]:
    figures = {"device": "cpu", "numel": 1, "threads": 1, "copy_gb_s": 1.0, "remarks": []}
    row = {"name": "x", "grad_dtype": "x", "weight_dtype": "x", "ns_per_param": 1.0, "bytes_per_param": 1.0}
    figures["rows"] = [row | {"gb_s": 1.0, "copy_share": 1.0}]
    with (
        without_pictures(),
        mock.patch("deepspeed_acco.tools.compare.runs.run_all", side_effect=RuntimeError("nothing runs here")),
        mock.patch("deepspeed_acco.tools.launch.launcher.started", side_effect=RuntimeError("nothing runs here")),
        mock.patch("deepspeed_acco.tools.kernel_benchmark.measure", return_value=figures),
        mock.patch("deepspeed_acco.tools.environment.describe", return_value=[("PyTorch", "there")]),
    ):
        yield


def run(seed: int, count: int) -> Iterator[str]:
    """Yields one line for each command line with which something goes wrong."""
    options = {subcommand: _options_of(subcommand) for subcommand in SUBCOMMANDS}
    home = Path.cwd()
    with _nothing_is_measured():
        for index in range(count):
            choose = random.Random(f"{seed} {index}")
            folder = Path(tempfile.mkdtemp(prefix="fuzz")) / "inside"  # so that ".." is ours, too
            try:
                folder.mkdir()
                os.chdir(folder)
                _make_files(folder, choose)
                words = _line(choose, options)
                wrong, _ = problem(words)
                wrong = wrong or _wrong_in_json(folder, words)
            finally:
                os.chdir(home)
                shutil.rmtree(folder.parent)
            if wrong:
                yield f"ds_acco {[word if len(word) < 80 else word[:80] + '...' for word in words]}: {wrong}"


def _wrong_in_json(folder: Path, words: list[str]) -> str:
    """Says which word of a JSON that was written is no JSON."""
    wrong: list[str] = []
    names = {word.removeprefix("--json=") for word in words if word.startswith("--json=")}
    for path in folder.iterdir():
        if path.name in names and path.suffix != ".json" and path.is_file():
            with contextlib.suppress(ValueError):  # a file that was there before
                json.loads(path.read_text(), parse_constant=wrong.append)
    return f"{wrong[0]} is written" if wrong else ""
