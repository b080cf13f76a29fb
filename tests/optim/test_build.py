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


BUILT_AHEAD = """
from pathlib import Path
from deepspeed_acco.optim import build, native
sources = build.csrc()
build.csrc = lambda: sources
build._PACKAGE = Path({folder!r})
(build._PACKAGE / "_native_1.so").write_bytes(b"deepspeed_acco_0123456789abcdef_cuda")
(build._PACKAGE / "_native_2.so").write_bytes(build.mark(with_cuda=False).encode())
print(native.kernels_reason("cuda"))
"""


def test_a_library_without_cuda_kernels_does_not_hide_them(run, tmp_path):
    """What was built ahead of other sources, or for CPUs alone, is not loaded for CUDA; the reason names both."""
    code, output = run(BUILT_AHEAD.format(folder=str(tmp_path)))
    assert code == 0, output
    reason = next(line for line in output.splitlines() if line.startswith("RuntimeError: "))
    assert "this PyTorch was built without CUDA" in reason or "no CUDA device is visible" in reason
    assert "_native_1.so was built ahead of other sources" in reason
    assert "_native_2.so was built ahead without CUDA kernels" in reason


BUILD = """
import os, sys
from pathlib import Path
from deepspeed_acco.optim import build
build.sources = lambda with_cuda: [Path(sys.path[0]) / "small.cpp"]  # what is built does not matter, and this is fast
if "CHECKOUT" in os.environ:
    build.csrc = lambda: Path(os.environ["CHECKOUT"])
print("loaded", build.load())
"""


@pytest.fixture
def small_build(tmp_path, monkeypatch):
    """``small_build(ranks)`` runs BUILD with a compiler that writes a line into ``log`` whenever it compiles."""
    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo compiles >> {tmp_path}/log; sleep 2;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    (tmp_path / "small.cpp").write_text("int acco_small() { return 1; }\n")
    (tmp_path / "build.py").write_text(BUILD)

    def run(ranks=1):
        done = run_script(tmp_path / "build.py", ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        return done, [line.removeprefix("loaded ") for line in done.stdout.splitlines() if line.startswith("loaded ")]

    return run


def _compiled(tmp_path) -> int:
    return (tmp_path / "log").read_text().count("compiles\n")


def _name() -> str:
    return op_builder.build_name(op_builder.cuda_is_buildable()[0])


def test_two_processes_build_at_once(small_build, tmp_path):
    """Into an empty cache, where a build that was killed has left its files and torch's lock behind: one compiles, both
    load, and one says so."""
    building = tmp_path / "cache" / _name() / "building"
    building.mkdir(parents=True)
    (building / "lock").touch()
    done, loaded = small_build(ranks=2)
    library = building.parent / "deepspeed_acco.so"
    assert loaded == [str(library)] * 2 and library.is_file() and not building.exists()
    assert _compiled(tmp_path) == 1
    assert done.stderr.count("ACCO: the native kernels are built once, in ") == 1, done.stderr
    again, _ = small_build(ranks=2)
    assert _compiled(tmp_path) == 1 and "ACCO" not in again.stderr


@pytest.mark.parametrize("damage", ["cut", "other", "no hash"])
def test_a_damaged_library_is_built_anew(small_build, tmp_path, damage):
    """Whoever maps a cut one is ended by SIGBUS."""
    _, (path,) = small_build()
    library = Path(path)
    whole = library.read_bytes()
    if damage == "cut":
        os.truncate(library, len(whole) // 2)
    elif damage == "other":
        library.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        library.with_name("deepspeed_acco.so.sha256").unlink()
    done, loaded = small_build()
    assert loaded == [path] and _compiled(tmp_path) == 2
    assert done.stderr.count("ACCO: the native kernels are built once") == 1
    assert library.stat().st_size == len(whole)
    subprocess.run(["sha256sum", "--check", "deepspeed_acco.so.sha256"], cwd=library.parent, check=True)


def test_two_checkouts_do_not_undo_each_other(small_build, tmp_path, monkeypatch):
    """Those with the same sources share one build; another source has another folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    loaded = []
    for checkout, has_edit in ((first, False), (second, False), (first, True), (second, False), (first, True)):
        if not checkout.exists():
            shutil.copytree(op_builder.csrc(), checkout)
        if has_edit:
            (checkout / "common" / "bits.h").write_text("// edited\n")
        monkeypatch.setenv("CHECKOUT", str(checkout))
        loaded += small_build()[1]
    assert loaded[0] == loaded[1] == loaded[3] != loaded[2] == loaded[4]
    assert _compiled(tmp_path) == 2


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
