# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The command: what it imports, and its small subcommands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import deepspeed_acco
from deepspeed_acco.tools import cli

CONFIGS = Path(__file__).parents[2] / "ds_configs"
LOGS = Path(__file__).parent / "logs"
PLAN = ["plan", "--params", "7B", "--ranks", "64", "--hosts", "8", "--bandwidth", "100gbit", "--n", "24"]
PLAN += ["--micro-batch-ms", "300ms"]
HEAVY = {"torch", "deepspeed", "numpy", "psutil", "pydantic", "matplotlib", "jinja2", "transformers"}
# As the script that pip writes.
AS_COMMAND = """
import sys
sys.argv[0] = "/somewhere/bin/ds_acco"
from deepspeed_acco.tools.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, code
"""
TELL = "\nprint(sorted({name.split('.')[0] for name in sys.modules}))"


def _is_not_built(*_, **__):
    raise RuntimeError("no compiler for it")


INT4_ROWS = (
    *("estimate to int4", "estimate to int4 from weights", "commit to int4 from weights"),
    *("pack", "pack to int4", "sum of 2 in int4", "sum of 4 in int4", "add int4"),
)


def test_env(native, capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for what in ("PyTorch:", "DeepSpeed:", "C++ compiler:", "nvcc:", "CUDA architectures:", "kernels' library:"):
        assert what in printed
    assert "kernels on cpu:" in printed and "native" in printed


@pytest.mark.timeout(900)
@pytest.mark.parametrize("deepspeeds_own", [False, pytest.param(True, marks=pytest.mark.full)])
def test_kernels(native, capsys, tmp_path, monkeypatch, deepspeeds_own):
    """With DeepSpeed's own Adam, which is compiled for a minute, and where it cannot be built."""
    if not deepspeeds_own:
        monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", _is_not_built)
    file = tmp_path / "kernels.json"
    arguments = ["kernels", "--numel", "3001", "--device", "cpu", "--threads", "1", "--turns", "2", "--json", str(file)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "turn 2/2" in printed.err and "turn" not in printed.out
    report = json.loads(file.read_text())
    assert report["numel"] == 3001 and report["threads"] == 1 and report["copy_gb_s"] > 0 and report["device"]
    keys = {"name", "grad_dtype", "weight_dtype", "ns_per_param", "bytes_per_param", "gb_s", "copy_share"}
    names = set()
    for row in report["rows"]:
        assert set(row) == keys
        assert row["gb_s"] == pytest.approx(row["bytes_per_param"] / row["ns_per_param"])
        assert row["copy_share"] == pytest.approx(row["gb_s"] / report["copy_gb_s"])
        names.add(row["name"])
        assert row["name"] in printed.out
    assert names >= {
        "commit, native",
        "estimate, native",
        "commit, no arithmetic",
        "estimate, no arithmetic",
        "commit, torch path",
        "estimate, torch path",
        *(f"{what}, {path}" for what in (*INT4_ROWS, "predict", "roots") for path in ("native", "torch path")),
        "torch AdamW, fused",
        "torch AdamW, foreach",
        "estimate by clone + step + restore",
    }
    remark = "DeepSpeed's own Adam is not measured: RuntimeError: no compiler for it"
    assert ("DeepSpeedCPUAdam" in names, remark in report["remarks"]) == (deepspeeds_own, not deepspeeds_own)
    budgets = {row["name"]: row["bytes_per_param"] for row in report["rows"] if row["grad_dtype"] == "bfloat16"}
    assert budgets["commit, native"] == 28 and budgets["estimate, native"] == 16
    # 12 bytes of state and 2 of gradient; half a byte of levels and a scale per block
    assert budgets["estimate to int4, native"] == pytest.approx(14.5 + 2 / 256, abs=1e-3)
    # and 2 of the given weights; a commit writes the state, too
    assert budgets["estimate to int4 from weights, native"] == pytest.approx(16.5 + 2 / 256, abs=1e-3)
    assert budgets["commit to int4 from weights, native"] == pytest.approx(28.5 + 2 / 256, abs=1e-3)


@pytest.mark.parametrize("arguments", [["kernels", "--numel", "0"], ["kernels", "--device", "tpu"], []])
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: ds_acco" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--numel", "1e18"], "--numel 1,000,000,000,000,000,000 is not allowed; allowed: up to "),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json is not allowed; allowed: a file in a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("deepspeed_acco.tools.kernel_benchmark.measure", pytest.fail)
    assert cli.main(["kernels", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def _python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--help"],
            ["--version"],
            ["compare", "--help"],
            ["report", "--help"],
            ["doctor", "--help"],
            ["schema"],
            PLAN,
        ),
        ["check", str(CONFIGS / "acco_auto.json"), "--hf"],
        ["init", "--from", str(CONFIGS / "zero3.json")],
        ["fit", str(LOGS / "zero1.log"), "--config", str(LOGS / "zero1.json"), "--params", "1M"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_answers_without_heavy_imports(arguments):
    *printed, modules = _python("-c", AS_COMMAND + TELL, *arguments).splitlines()
    assert printed and "argparse" in modules and not HEAVY & set(eval(modules))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], PLAN, ["check", str(CONFIGS / "acco.json")], ["-u", *PLAN], ["-u", "schema"]],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_it_ends_quietly_where_nobody_reads(arguments):
    """Unbuffered the first print meets the closed pipe, else the last flush."""
    unbuffered = {"PYTHONUNBUFFERED": "1" if arguments[0] == "-u" else ""}
    words = [sys.executable, "-m", "deepspeed_acco.tools.cli", *(word for word in arguments if word != "-u")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(words, stdout=write_end, stderr=subprocess.PIPE, text=True, env=os.environ | unbuffered)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_as_a_module_it_is_light_too():
    assert _python("-m", "deepspeed_acco.tools.cli", "--version") == f"deepspeed_acco {deepspeed_acco.__version__}\n"
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deepspeed_acco.tools.cli", *PLAN], capture_output=True, text=True
    )
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in told.stderr.splitlines() if "|" in line}
    assert told.returncode == 0 and "argparse" in imported and not HEAVY & imported


def test_the_command_lacks_no_public_name():
    script = """
import sys
sys.argv[0] = "ds_acco"
import deepspeed_acco
assert "torch" not in sys.modules
assert all(callable(getattr(deepspeed_acco, name)) for name in deepspeed_acco.__all__ if name != "__version__")
import torch
print(torch.optim.ACCO is deepspeed_acco.ACCO, hasattr(deepspeed_acco, "acco"))
"""
    assert _python("-c", script).splitlines()[-1] == "True False"


@pytest.mark.parametrize("program", ["/opt/ds_acco/train.py", pytest.param("", marks=pytest.mark.full)])
def test_every_other_program_registers(program):
    script = f"import sys; sys.argv[0] = {program!r}; import deepspeed_acco, torch; print(torch.optim.ACCO.__name__)"
    assert _python("-c", script).splitlines()[-1] == "ACCO"


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "numpy", None)
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["compare", "x.json"]) == 1
    assert 'ds_acco compare: numpy not installed: pip install "deepspeed_acco[tools]"' in capsys.readouterr().err
    assert cli.main(["completion", "zsh"]) == 1
    assert 'pip install "deepspeed_acco[completion]"' in capsys.readouterr().err


def test_the_schema_is_printed_or_written(tmp_path, capsys):
    assert cli.main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert cli.main(["schema", "--out", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text() == printed
    jsonschema.Draft7Validator.check_schema(json.loads(printed))
    assert cli.main(["schema", "--out", str(tmp_path / "no" / "schema.json")]) == 2
    assert "no/schema.json cannot be written" in capsys.readouterr().err


def test_completion_by_the_shell(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(_python("-m", "deepspeed_acco.tools.cli", "completion", "bash"))
    (tmp_path / "mine.json").touch()
    ask = f"""
cd {tmp_path}; source {script}
complete_words() {{
    COMP_WORDS=("$@"); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
    $(complete -p ds_acco | sed 's/.*-F \\([^ ]*\\).*/\\1/') ds_acco "${{COMP_WORDS[COMP_CWORD]}}" ""
    echo "${{COMPREPLY[@]}}"
}}
complete_words ds_acco comp
complete_words ds_acco plan --micro
complete_words ds_acco plan --backend ""
complete_words ds_acco compare mi
"""
    told = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    assert told.stdout.splitlines() == [
        "compare completion",
        "--micro-batch-ms --micro-batch-size",
        "nccl gloo",
        "mine.json",
    ], told.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_every_subcommand_has_an_example_and_is_completed(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    completion = capsys.readouterr().out
    for subcommand in (
        "init",
        "check",
        "fit",
        "plan",
        "compare",
        "report",
        "doctor",
        "kernels",
        "env",
        "schema",
        "completion",
    ):
        assert f"ds_acco_{subcommand}" in completion
        with pytest.raises(SystemExit):
            cli.main([subcommand, "--help"])
        assert f"ds_acco {subcommand}" in capsys.readouterr().out.split("\nexample:\n")[1]
