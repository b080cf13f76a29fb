# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""``ds_acco doctor``: a run on real ranks is well, and what is broken on purpose is found and named."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from deepspeed_acco import doctor
from deepspeed_acco.optim import ops
from deepspeed_acco.tools import cli
from deepspeed_acco.tools.doctor import page
from deepspeed_acco.tools.doctor.costly_settings import SETTINGS, Facts
from deepspeed_acco.tools.doctor.costly_settings import finding_of as finding_of_settings
from deepspeed_acco.tools.doctor.finding import FAIL, NOT_APPLICABLE, OK, WARN, Finding, together
from deepspeed_acco.tools.doctor.installation import check_locks
from tests.support.launcher import ROOT, rank_environment

pytestmark = pytest.mark.timeout(400)

NAMES = ["versions", "kernels", "locks", "settings", "equality", "lanes", "rounds", "hidden"]
THREADS = str(max(1, (os.cpu_count() or 2) // 2))
SMALL = ["--numel", "100k", "--comm-timeout", "30"]


def _require_well(file, printed, precision):
    found = json.loads(file.read_text())
    assert found["is_well"] and found["version"] == page.VERSION
    assert (found["ranks"], found["device"], found["precision"], found["schedule"]) == (2, "cpu", precision, "acco")
    checks = found["checks"]
    assert list(checks) == NAMES
    # A lock may be another run's, and how much is hidden is measured beside other tests.
    well = {name for name, check in checks.items() if check["status"] == OK}
    assert well >= set(NAMES) - {"locks", "hidden"}, checks
    assert checks["equality"]["figures"]["distance"] < checks["equality"]["figures"]["tolerance"] <= 3e-3
    rounds, hidden = checks["rounds"]["figures"], checks["hidden"]["figures"]
    assert rounds["numel"] == 100_000 and 0 < rounds["communication_share"] <= 1
    # Each of two ranks sends half of the gradients and half of the weights.
    assert rounds["sent_bytes"] == 100_000 * (4 if precision == "fp32" else 2)
    assert rounds["bytes_per_s"] == pytest.approx(rounds["sent_bytes"] / rounds["exchange_s"])
    share = 1 - (hidden["both_s"] - hidden["compute_s"]) / hidden["round_s"]
    assert hidden["hidden_share"] == pytest.approx(share) and hidden["compute_s"] > 0
    for name, check in checks.items():
        assert name in printed and check["sentence"].split()[0] in printed
    assert f"deepspeed_acco doctor: 2 ranks on CPUs, {precision}, schedule acco" in printed
    assert "Nothing failed" in printed


@pytest.mark.full
def test_a_run_is_well(ranks, tmp_path, capfd, monkeypatch):
    """``ranks`` waits for the operators: a build takes longer than the checks."""
    monkeypatch.setenv("OMP_NUM_THREADS", THREADS)
    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--num_accelerators", "2", "--json", str(file), *SMALL]) == 0
    printed = capfd.readouterr()
    _require_well(file, printed.out, "fp32")
    assert [line.split()[1] for line in printed.err.splitlines() if line.startswith("doctor: ")] == NAMES


LAUNCHERS = {
    "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29731", "--module"],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731", "-m"],
}


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_other_launchers(ranks, launcher, tmp_path):
    file = tmp_path / "doctor.json"
    config = ["--config", str(ROOT / "ds_configs" / "acco_bf16.json"), "--json", str(file)]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "deepspeed_acco.doctor", *config, *SMALL]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=rank_environment() | {"OMP_NUM_THREADS": THREADS}
    )
    assert done.returncode == 0, done.stderr
    _require_well(file, done.stdout, "bf16")


@pytest.mark.full
def test_a_run_that_is_not_well_ends_with_1(ranks, tmp_path, capfd, monkeypatch):
    operators = tmp_path / "operators"
    (operators / "forgotten").mkdir(parents=True)
    for built in Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir():
        (operators / built.name).symlink_to(built)
    lock = operators / "forgotten" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(operators))
    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--num_accelerators", "2", "--json", str(file), *SMALL]) == 1
    assert json.loads(file.read_text())["checks"]["locks"]["figures"]["locks"] == [str(lock)]
    printed = capfd.readouterr().out
    assert "FAIL  locks" in printed and str(lock) in printed and "1 check failed: locks." in printed


# ---- what is broken on purpose


def _wrong_decay(commit):
    def wrong(shard, grad, hyper, *rest):
        commit(shard, grad, replace(hyper, weight_decay=2 * hyper.weight_decay), *rest)

    return wrong


def _other_bits_on_the_worker(commit):
    def differs(shard, *rest):
        commit(shard, *rest)
        if threading.current_thread() is not threading.main_thread():
            shard.master[0].mul_(1 + 2**-20)

    return differs


def _raises(commit):
    def fails(*_):
        raise ZeroDivisionError("on purpose")

    return fails


def examined(
    names=(), break_commit=None, broken_ranks=(0, 1), precision="fp32", params=(), n=4, timeout_s=20, environment=()
):
    """Returns on a rank what is found where the commit is replaced on some ranks, and whether all is well."""
    import deepspeed
    import torch

    from deepspeed_acco.runtime.communicator import Communicator
    from deepspeed_acco.tools.doctor import session
    from deepspeed_acco.tools.doctor.subject import Subject, Training

    deepspeed.init_distributed(verbose=False)
    control = Communicator(None, torch.device("cpu"), 2 * timeout_s + 10)
    training = Training(precision, n, params=dict(params))
    subject = Subject(training, torch.device("cpu"), 3000, timeout_s, control)
    checks = {name: session.CHECKS[name] for name in names}
    with ExitStack() as while_broken:
        while_broken.enter_context(mock.patch.dict(os.environ, dict(environment)))
        if break_commit is not None and control.rank in broken_ranks:
            place = "deepspeed_acco.runtime.round.adamw_commit"
            while_broken.enter_context(mock.patch(place, globals()[break_commit](ops.adamw_commit)))
        findings = session.examine(subject, checks)
    control.destroy()
    return findings, page.is_well(findings)


@pytest.mark.parametrize(
    ("precision", "params", "n"),
    [
        ("fp32", {"schedule": "wp"}, 2),
        ("bf16", {"schedule": "local", "eps": 1e-6, "betas": [0.9, 0.95]}, 1),
        ("bf16", {"estimate_comm": "int4", "estimate_fraction": 0.75, "weight_decay": 0.1}, 4),
        pytest.param("bf16", {"schedule": "dpu"}, 4, marks=pytest.mark.full),
        pytest.param("fp32", {"schedule": "sync"}, 4, marks=pytest.mark.full),
    ],
)
def test_what_users_set_equals_the_reference(ranks, precision, params, n):
    found = ranks(2).run(examined, names=["equality", "lanes"], precision=precision, params=params, n=n)
    for findings, is_well in found:
        assert is_well, findings
        assert [finding.status for finding in findings.values()] == [OK, OK]


def test_a_wrong_update_is_found(ranks):
    found = ranks(2).run(examined, names=["equality", "lanes"], break_commit="_wrong_decay", params={"weight_decay": 1})
    for findings, is_well in found:
        assert not is_well and findings["equality"].status == FAIL and findings["lanes"].status == OK
        assert findings["equality"].figures["distance"] > 1e-2
        assert "of the way; allowed is 1e-04" in findings["equality"].sentence
        assert "FAIL  equality" in page.page_of("2 ranks", findings, 1.0)


def test_lanes_that_differ_are_found(ranks):
    found = ranks(2).run(examined, names=["lanes"], break_commit="_other_bits_on_the_worker", broken_ranks=[1])
    for findings, _ in found:
        assert findings["lanes"].status == FAIL and "differ between the lanes" in findings["lanes"].sentence


def test_the_rank_that_fails_is_named_and_the_others_checks_are_made(ranks):
    """The other rank waits for it until the timeout, and is no cause."""
    names = ["equality", "versions"]
    found = ranks(2).run(examined, names=names, break_commit="_raises", broken_ranks=[1], timeout_s=4)
    for findings, is_well in found:
        assert not is_well
        assert findings["equality"].status == FAIL and findings["equality"].figures["ranks"] == [1]
        assert findings["equality"].sentence.startswith("rank 1: ")
        assert "on purpose" in findings["equality"].sentence
        assert findings["versions"].status == OK


def test_links_of_both_levels_are_measured(ranks):
    hosts = [{"environment": {"CROSS_RANK": str(rank // 2)}} for rank in range(4)]
    for findings, _ in ranks(4).run(examined, names=["rounds"], per_rank=hosts):
        assert findings["rounds"].status == OK
        assert {"bytes_per_s_inside", "bytes_per_s_between"} <= set(findings["rounds"].figures)
        assert [what for what, _ in findings["rounds"].rows] == ["inside hosts", "between hosts"]


def _examine_three(gone_rank, limit_s):
    import torch

    from deepspeed_acco.runtime.communicator import Communicator
    from deepspeed_acco.tools.doctor import session
    from deepspeed_acco.tools.doctor.subject import Subject, Training

    control = Communicator(None, torch.device("cpu"), 3)
    subject = Subject(Training("fp32"), torch.device("cpu"), None, 1, control)

    def stays_away(_):
        if control.rank == gone_rank:
            time.sleep(8)
        return Finding(OK, "It came.")

    findings = session.examine(subject, {name: stays_away for name in "abc"}, limit_s)
    control.destroy(is_broken=gone_rank >= 0)
    return findings


def test_after_the_limit_no_check_is_begun(ranks):
    for findings in ranks(2).run(_examine_three, gone_rank=-1, limit_s=0):
        assert [finding.status for finding in findings.values()] == [OK, NOT_APPLICABLE, NOT_APPLICABLE]
        assert findings["c"].sentence == "Not made: 0 s are over."


def test_a_rank_that_is_gone_ends_the_checks(ranks):
    findings, _ = ranks(2).run(_examine_three, gone_rank=1, limit_s=60)
    assert [finding.status for finding in findings.values()] == [FAIL, NOT_APPLICABLE, NOT_APPLICABLE]
    assert "Not every rank came" in findings["a"].sentence


# ---- what ranks found, together


def test_the_worst_counts_and_its_ranks_are_named():
    well, ill = Finding(OK, "Well."), Finding(FAIL, "Ill.", "Mend it", {"figure": 1})
    assert together([well, Finding(NOT_APPLICABLE, "None.")]) == well
    assert together([well, well]) == well
    both = together([ill, ill])
    assert (both.sentence, both.figures) == ("Ill.", {"figure": 1, "ranks": [0, 1]})
    some = together([well, ill, Finding(WARN, "Odd."), ill])
    assert (some.status, some.sentence, some.advice) == (FAIL, "ranks 1, 3: Ill.", "Mend it")
    other = together([ill, Finding(FAIL, "Sick."), Finding(FAIL, "It waited.", is_consequence=True)])
    assert other.sentence == "rank 0: Ill. rank 1: Sick." and other.figures["ranks"] == [0, 1]
    many = together([well, *[ill] * 9])
    assert many.sentence == "ranks 1, 2, 3, 4 and 5 more: Ill."


def test_the_page_says_what_to_do_and_steers_no_terminal():
    findings = {
        "first": Finding(OK, "Well."),
        "second": Finding(WARN, "Odd \x1b[31m.", "Mend it", rows=(("A=1", "on CUDA"),)),
        "third": Finding(NOT_APPLICABLE, "None."),
    }
    assert page.page_of("2 ranks", findings, 3.4).splitlines() == [
        "deepspeed_acco doctor: 2 ranks",
        "",
        "ok    first      Well.",
        "warn  second     Odd \ufffd[31m.",
        "                 A=1: on CUDA",
        "                 What to do: Mend it.",
        "-     third      None.",
        "",
        "Nothing failed; 1 warning: second. It took 3 s.",
    ]
    assert page.is_well(findings) and not page.is_well({"it": Finding(FAIL, "Ill.")})


# ---- locks, settings, options


@pytest.mark.parametrize(("age_s", "status"), [(20, WARN), (3600, FAIL)])
def test_a_stale_lock_is_named(tmp_path, monkeypatch, age_s, status):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert check_locks(None).status == OK
    lock = tmp_path / "py311" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    finding = check_locks(None)
    assert finding.status == status and finding.figures == {"locks": [str(lock)]}
    ((name, told),) = finding.rows
    assert name == "fused_adam" and str(lock) in told and "Remove it" in told


GPU = Facts("cuda", ranks=16, ranks_here=8, cores=64, threads=4)
CPU = Facts("cpu", ranks=2, ranks_here=2, cores=8, threads=4)
ONE_HOST = Facts("cuda", ranks=1, ranks_here=1, cores=64, threads=4)


@pytest.mark.parametrize(
    ("environment", "facts", "names"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, GPU, ["CUDA_DEVICE_MAX_CONNECTIONS"]),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_LAUNCH_MODE": "PARALLEL", "NCCL_MAX_CTAS": "16"}, GPU, []),
        ({"CUDA_LAUNCH_BLOCKING": "1", "TORCH_NCCL_BLOCKING_WAIT": "true"}, GPU, [*SETTINGS[1:3]]),
        ({"CUDA_LAUNCH_BLOCKING": "0", "NCCL_BLOCKING_WAIT": ""}, GPU, []),
        ({"NCCL_LAUNCH_MODE": "group", "NCCL_MAX_CTAS": "2"}, GPU, ["NCCL_LAUNCH_MODE", "NCCL_MAX_CTAS"]),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}, GPU, ["NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"]),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}, ONE_HOST, []),
        ({"CUDA_LAUNCH_BLOCKING": "1", "NCCL_IB_DISABLE": "1"}, CPU, []),
        ({"GLOO_SOCKET_IFNAME": "lo"}, CPU, []),
        ({"GLOO_SOCKET_IFNAME": "lo"}, Facts("cpu", 4, 2, 8, 4), ["GLOO_SOCKET_IFNAME"]),
        ({}, Facts("cpu", 2, 2, 8, 8), ["OMP_NUM_THREADS"]),
        ({"OMP_NUM_THREADS": "1"}, Facts("cpu", 2, 2, 8, 1), ["OMP_NUM_THREADS"]),
        ({"OMP_NUM_THREADS": "2"}, Facts("cpu", 2, 2, 8, 2), []),
    ],
)
def test_settings_that_cost_overlap(environment, facts, names):
    finding = finding_of_settings(environment, facts)
    names = [getattr(name, "name", name) for name in names]
    assert [what.partition("=")[0] for what, _ in finding.rows] == names
    assert finding.status == (WARN if names else OK)
    for what, text in finding.rows:
        assert "What to do: " in text and what.partition("=")[2] in (*environment.values(), "(unset)")


def test_all_settings_are_documented():
    text = (ROOT / "docs" / "how-to" / "doctor.md").read_text()
    table = text.split("## Settings that cost overlap")[1].split("\n## ")[0]
    assert {setting.name for setting in SETTINGS} == set(re.findall(r"\b[A-Z]+_[A-Z0-9_]+\b", table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.json"], "--config nowhere.json is not a file"),
        (["--hostfile", "nowhere"], "--hostfile nowhere is not a file"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json is not allowed; allowed: a file in a folder"),
    ],
)
def test_wrong_usage_starts_nothing(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("deepspeed_acco.tools.launch.launcher.started", pytest.fail)
    assert cli.main(["doctor", *arguments]) == 2
    assert f"ds_acco doctor: {message}" in capsys.readouterr().err


def test_without_a_launcher_it_says_how_to_start(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        doctor.main([])
    assert stop.value.code == 2 and "deepspeed --module deepspeed_acco.doctor" in capsys.readouterr().err


def test_what_is_taken_of_a_json(tmp_path):
    import torch

    from deepspeed_acco.tools.doctor.subject import Training, training_of

    cpu, configs = torch.device("cpu"), ROOT / "ds_configs"
    assert training_of(None, None, cpu, 2) == Training("fp32")
    assert training_of(None, None, torch.device("cuda"), 2).precision == "bf16"
    taken = training_of(configs / "acco_int4.json", None, cpu, 2)
    assert taken.settings.estimate_comm == "int4" and "lr" not in taken.params
    filled = training_of(configs / "acco_auto.json", "bf16", cpu, 2)
    assert (filled.precision, filled.n, dict(filled.params)) == ("bf16", 4, {})
    adaptive = training_of(configs / "acco_adaptive.json", None, cpu, 2)
    assert not adaptive.settings.is_adaptive and adaptive.schedule.name == "acco"
    one = training_of(configs / "one_micro_batch.json", None, cpu, 2)
    assert (one.n, one.schedule.name) == (1, "local")
    with pytest.raises(ValueError, match="optimizer.type is 'AdamW'; allowed: \"ACCO\""):
        training_of(configs / "zero1.json", None, cpu, 2)
