"""The soak: in short, and what it says of samples that grow."""

import gc
from dataclasses import replace

import pytest

from tests import soak
from tests.soak import Usage

FLAT = [Usage(resident_bytes=100_000_000, threads=9, descriptors=30, shared_memory=2)] * 50


@pytest.mark.full
@pytest.mark.distributed
def test_two_hundred_steps(capsys):
    assert soak.main(["--steps", "200", "--modes", "acco"]) == 0
    output = capsys.readouterr().out
    assert output.count("acco, rank ") == 2 and "200 steps" in output and "NOT FLAT" not in output


@pytest.mark.parametrize(
    ("name", "is_allowed", "is_too_much"),
    [("resident_bytes", 5_900_000, 6_100_000), ("threads", 0, 1), ("descriptors", -1, 1), ("shared_memory", 0, 1)],
)
def test_what_grows_after_the_warm_up_is_told(name, is_allowed, is_too_much):
    value = getattr(FLAT[0], name)
    assert soak.growth(FLAT) == []
    assert soak.growth([*FLAT, replace(FLAT[0], **{name: value + is_allowed})]) == []
    (sentence,) = soak.growth([*FLAT, replace(FLAT[0], **{name: value + is_too_much})])
    assert sentence.startswith(f"{name} grew from {value} to {value + is_too_much}")


def test_a_peak_of_the_warm_up_may_come_again():
    peak = replace(FLAT[0], descriptors=35)
    assert soak.growth([peak, *FLAT, peak]) == []
    assert soak.growth([*FLAT, peak]) != []


@pytest.mark.distributed
def test_a_leak_of_descriptors_is_found(monkeypatch, capsys):
    monkeypatch.setattr(soak, "train", _leak)
    assert soak.main(["--steps", "50", "--modes", "sync"]) == 1
    assert capsys.readouterr().out.count("NOT FLAT: descriptors grew from") == 2


def _leak(mode, steps, folder):
    """What a rank runs instead: every step leaves a file open."""
    gc.freeze()
    opened, samples = [], []
    for step in range(steps):
        opened.append(open(f"{folder}/{step}", "w"))
        samples.append(Usage.now())
    return samples
