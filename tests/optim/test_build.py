# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Building and choosing: in processes of their own, since a process chooses once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed_acco.optim import build as op_builder

ROOT = Path(__file__).resolve().parents[2]

UPDATE = """
import torch
from deepspeed_acco.optim import native, ops
from deepspeed_acco.optim.adamw import AdamWHyper
from deepspeed_acco.optim.adamw import AdamWShard
shard = AdamWShard(torch.ones(5), torch.zeros(5), torch.zeros(5), torch.zeros(()))
out = torch.empty(5)
for _ in range(2):
    ops.adamw_commit(shard, torch.ones(5), AdamWHyper(lr=0.5), torch.tensor(1.0), torch.tensor(True), out)
print("weights", out[0].item(), "kernels", native.kernels_name())
"""


def start(script, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd="/",  # python -c looks there first
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(script, **environment):
    process = start(script, **environment)
    output = process.communicate(timeout=280)[0]
    return process.returncode, output


@pytest.fixture
def broken_compiler(tmp_path):
    """A compiler that has a version and compiles nothing, and an empty cache."""
    compiler = tmp_path / "broken-c++"
    real = shutil.which("c++")
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo "this compiler is broken" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    return {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}


@pytest.mark.timeout(400)
def test_two_processes_build_at_once(tmp_path):
    """Into an empty cache, where a build that was killed has left torch's lock behind."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DEEPSPEED_ACCO_KERNELS": "native"}
    prepare = "from deepspeed_acco.optim import build as b; print(b.build_directory(False))"
    folder = Path(run(prepare, **environment)[1].splitlines()[-1])
    assert folder.parent == tmp_path
    folder.mkdir()
    (folder / "lock").touch()
    processes = [start(UPDATE, **environment) for _ in range(2)]
    outputs = [process.communicate(timeout=350)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
        assert "kernels native" in output
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_no_build_without_the_lock(tmp_path):
    """Where the file system gives no locks, two builds at once would write the same files."""
    no_locks = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "no locks here")
fcntl.flock = flock
"""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DEEPSPEED_ACCO_KERNELS": "native"}
    code, output = run(no_locks + UPDATE, **environment)
    assert code != 0 and "no locks here" in output, output
    assert not list(tmp_path.rglob("*.o"))


def test_falls_back_with_one_warning(broken_compiler):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="auto", **broken_compiler)
    assert code == 0 and "kernels torch" in output, output
    assert output.count("RuntimeWarning") == 1
    assert "this compiler is broken" in output and "DEEPSPEED_ACCO_BUILD_OPS=1 pip install" in output


def test_other_ranks_do_not_warn(broken_compiler):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="auto", RANK="1", **broken_compiler)
    assert code == 0 and "kernels torch" in output and "RuntimeWarning" not in output, output


def test_native_or_nothing(broken_compiler):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="native", **broken_compiler)
    assert code != 0
    assert "DEEPSPEED_ACCO_KERNELS=native, and the native kernels cannot be had on cpu" in output
    assert "this compiler is broken" in output


def test_plain_path_on_purpose_builds_nothing(tmp_path):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="torch", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert code == 0 and "kernels torch" in output and "Warning" not in output.replace("[WARNING]", ""), output
    assert not list(tmp_path.iterdir())


def test_unknown_choice():
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="fast")
    assert code != 0
    assert "DEEPSPEED_ACCO_KERNELS = 'fast' is not allowed; allowed: auto, native, torch" in output


def test_importing_loads_nothing(tmp_path):
    script = "import deepspeed_acco, torch; print('has', torch._C._dispatch_has_kernel('deepspeed_acco::adamw_commit'))"
    code, output = run(script, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert code == 0 and "has False" in output, output
    assert not list(tmp_path.iterdir())


def test_flags_keep_the_arithmetic():
    assert all(path.is_file() for path in op_builder.sources(with_cuda=True))
    assert "-ffp-contract=off" in op_builder.cxx_args() and "-ffast-math" not in op_builder.cxx_args()
    assert "--use_fast_math" not in op_builder.nvcc_args() and "-fmad=false" in op_builder.nvcc_args()


@pytest.mark.timeout(400)
def test_ahead_of_time(tmp_path):
    """Built as pip would, into a folder of its own, from which the kernels come without any cache or compiler."""
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base")]
    build += ["--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "DEEPSPEED_ACCO_BUILD_OPS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    package = tmp_path / "lib" / "deepspeed_acco"
    assert len(list(package.glob("_native*.so"))) == 1 and (package / "csrc" / "cuda" / "adamw.cu").is_file()
    environment = {
        "PYTHONPATH": str(tmp_path / "lib"),
        "CXX": "/nonexistent",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
        "DEEPSPEED_ACCO_KERNELS": "native",
    }
    shutil.copytree(ROOT / "deepspeed_acco", package, dirs_exist_ok=True)
    code, output = run(UPDATE, **environment)
    assert code == 0 and "kernels native" in output, output
    assert not (tmp_path / "cache").exists()
