"""Locks of torch's builds are named, with their age and holder."""

import os
import subprocess
import sys
import time

import pytest
from torch.utils.file_baton import FileBaton

from deepspeed_acco.optim.build_locks import describe_locks
from tests.support.launcher import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    made = tmp_path / "py311_cpu" / "fused_adam"
    made.mkdir(parents=True)
    return made


def test_no_lock(folder):
    assert describe_locks() == []


def test_a_build_that_runs_is_named_by_its_process(folder):
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    (text,) = describe_locks()
    assert f"{folder}/lock: process {os.getpid()} has been building" in text
    baton.release()
    assert describe_locks() == []


def test_a_killed_build_is_named_with_its_age(folder):
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    (text,) = describe_locks()
    assert f"{lock}: a build lock, 60 min old, that no process of this machine holds. Remove it" in text


def test_what_a_killed_build_of_our_kernels_left_holds_nobody_up(folder, tmp_path):
    ours = tmp_path / "deepspeed_acco_0123456789abcdef" / "building"
    ours.mkdir(parents=True)
    (ours / "lock").touch()
    assert describe_locks() == []


@pytest.mark.full
def test_the_import_names_it(folder):
    (folder / "lock").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    for local_rank, lines in (("0", 1), ("1", 0)):
        environment["LOCAL_RANK"] = local_rank
        command = [sys.executable, "-c", "import deepspeed_acco"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count("that no process of this machine holds") == lines
