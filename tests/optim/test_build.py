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
from tests.support.ranks import run_script

pytestmark = pytest.mark.native
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
    """A process with a new interpreter."""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd="/",  # python -c looks there first
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(script, NAME=value, ...)`` in a forked process; gives its exit code and output."""

    def run(script, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        path = tmp_path / "script.py"
        path.write_text(script)
        done = run_script(path, ranks=1)
        return done.returncode, done.stdout + done.stderr

    return run


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


BUILD = """
import sys
from pathlib import Path
from deepspeed_acco.optim import build
build.sources = lambda with_cuda: [Path(sys.path[0]) / "small.cpp"]  # what is built does not matter, and this is fast
print("loaded", build.load())
"""


def test_two_processes_build_at_once(tmp_path, monkeypatch):
    """Into an empty cache, where a build that was killed has left torch's lock behind: one compiles, both load."""
    compiler, cache = tmp_path / "slow-c++", tmp_path / "cache"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo compiles >> {tmp_path}/log; sleep 3;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    folder = op_builder.build_directory(op_builder.cuda_is_buildable()[0])
    assert folder.parent == cache
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (tmp_path / "small.cpp").write_text("int acco_small() { return 1; }\n")
    (tmp_path / "build.py").write_text(BUILD)
    done = run_script(tmp_path / "build.py", ranks=2)
    assert done.returncode == 0, done.stderr
    library = cache / folder.name / "deepspeed_acco.so"
    assert done.stdout.count(f"loaded {library}") == 2, done.stdout
    assert library.is_file() and (tmp_path / "log").read_text() == "compiles\n"


def test_no_build_without_the_lock(run, tmp_path):
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


def test_falls_back_with_one_warning(run, broken_compiler):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="auto", **broken_compiler)
    assert code == 0 and "kernels torch" in output, output
    assert output.count("RuntimeWarning") == 1
    assert "this compiler is broken" in output and "DEEPSPEED_ACCO_BUILD_OPS=1 pip install" in output


def test_other_ranks_do_not_warn(run, broken_compiler):
    script = "import os; os.environ['RANK'] = '1'" + UPDATE
    code, output = run(script, DEEPSPEED_ACCO_KERNELS="auto", **broken_compiler)
    assert code == 0 and "kernels torch" in output and "RuntimeWarning" not in output, output


def test_native_or_nothing(run, broken_compiler):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="native", **broken_compiler)
    assert code != 0
    assert "DEEPSPEED_ACCO_KERNELS=native, and the native kernels cannot be had on cpu" in output
    assert "this compiler is broken" in output


def test_plain_path_on_purpose_builds_nothing(run, tmp_path):
    cache = tmp_path / "cache"
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="torch", TORCH_EXTENSIONS_DIR=str(cache))
    assert code == 0 and "kernels torch" in output and "Warning" not in output.replace("[WARNING]", ""), output
    assert not cache.exists()


def test_unknown_choice(run):
    code, output = run(UPDATE, DEEPSPEED_ACCO_KERNELS="fast")
    assert code != 0
    assert "DEEPSPEED_ACCO_KERNELS = 'fast' is not allowed; allowed: auto, native, torch" in output


def test_importing_loads_nothing(tmp_path):
    script = "import deepspeed_acco, torch; print('has', torch._C._dispatch_has_kernel('deepspeed_acco::adamw_commit'))"
    process = start(script, TORCH_EXTENSIONS_DIR=str(tmp_path))
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0 and "has False" in output, output
    assert not list(tmp_path.iterdir())


def test_flags_keep_the_arithmetic():
    assert all(path.is_file() for path in op_builder.sources(with_cuda=True))
    assert "-ffp-contract=off" in op_builder.cxx_args() and "-ffast-math" not in op_builder.cxx_args()
    assert "--use_fast_math" not in op_builder.nvcc_args() and "-fmad=false" in op_builder.nvcc_args()


@pytest.mark.full  # a build of its own, which takes as long as all else here
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
    process = start(UPDATE, **environment)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0 and "kernels native" in output, output
    assert not (tmp_path / "cache").exists()
