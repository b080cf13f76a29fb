# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco env`` and ``ds_acco kernels``."""

import json

import pytest

from deepspeed_acco.tools import cli

INT4_ROWS = ("estimate to int4", "pack", "pack to int4", "sum of 2 in int4", "sum of 4 in int4", "add int4")


def test_env(native, capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for what in ("PyTorch:", "DeepSpeed:", "C++ compiler:", "nvcc:", "CUDA architectures:", "kernels' library:"):
        assert what in printed
    assert "kernels on cpu:" in printed and "native" in printed


def test_kernels(native, capsys, tmp_path):
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
        *(f"{what}, {path}" for what in INT4_ROWS for path in ("native", "torch path")),
        "torch AdamW, fused",
        "torch AdamW, foreach",
        "estimate by clone + step + restore",
    }
    budgets = {row["name"]: row["bytes_per_param"] for row in report["rows"] if row["grad_dtype"] == "bfloat16"}
    assert budgets["commit, native"] == 28 and budgets["estimate, native"] == 16
    # 12 bytes of state, 2 of gradient and 2 of the weights that stand; half a byte of levels and a scale per block
    assert budgets["estimate to int4, native"] == pytest.approx(16.5 + 2 / 256, abs=1e-3)


@pytest.mark.parametrize("arguments", [["kernels", "--numel", "0"], ["kernels", "--device", "tpu"], []])
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: ds_acco" in capsys.readouterr().err
