# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the options of ``ds_acco`` read, against values written out."""

import argparse

import pytest

from deepspeed_acco.tools import units

milliseconds = units.time_in("ms")
nanoseconds_or_zero = units.time_in("ns", or_zero=True)


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.count, "8", 8),
        (units.count, "7e9", 7_000_000_000),
        (units.count, "7B", 7_000_000_000),
        (units.count, "1.3B", 1_300_000_000),
        (units.count, "1.100000001b", 1_100_000_001),
        (units.count, "350M", 350_000_000),
        (units.count, "350m", 350_000_000),
        (units.count, " 16k ", 16_000),
        (units.count, "9007199254740993", 9_007_199_254_740_993),  # no float has it
        (units.positive, "0.9", 0.9),
        (units.positive, "1e-3", 0.001),
        (units.positive, ".5", 0.5),
        (units.bandwidth, "300mbit", 37_500_000.0),
        (units.bandwidth, "25Gbit", 3_125_000_000.0),
        (units.bandwidth, "25Gbit/s", 3_125_000_000.0),
        (units.bandwidth, "100gbit", 12_500_000_000.0),
        (units.bandwidth, "12.5GB/s", 12_500_000_000.0),
        (units.bandwidth, "8 bit", 1.0),
        (units.bandwidth, "1e3kbit", 125_000.0),
        (units.bandwidth, "2kB/s", 2000.0),
        (units.size, "80GB", 80_000_000_000.0),
        (units.size, "80GiB", 85_899_345_920.0),
        (units.size, "1.5 TB", 1_500_000_000_000.0),
        (units.duration, "10us", 0.00001),
        (units.duration, "1.5ms", 0.0015),
        (units.duration, "2s", 2.0),
        (units.duration, "0", 0.0),
        (milliseconds, "300", 300.0),
        (milliseconds, "300ms", 300.0),
        (milliseconds, "0.3s", 300.0),
        (nanoseconds_or_zero, "0", 0.0),
        (nanoseconds_or_zero, "2us", 2000.0),
    ],
)
def test_what_is_read(read, text, value):
    assert read(text) == value


def test_rates_as_tc_spells_them():
    assert [units.link_rate(text) for text in ("300mbit", "25Gbit/s", "3mbps", "fast")] == [
        "300mbit",
        "25Gbit",
        "3mbps",
        "fast",
    ]


@pytest.mark.parametrize(
    ("read", "texts", "example"),
    [
        (units.count, ("0", "-1", "1.5", "1.23456789012B", "nan", "inf", "1e999999999", "7G", "", "B"), "7e9"),
        (units.positive, ("0", "-1", "nan", "inf", "x", "1.2.3", "5%"), "0.9"),
        (units.bandwidth, ("300", "300mbps", "-3mbit", "0mbit", "1.2.3mbit", "10gb/s", "10Gb/s", "bit"), "25gbit"),
        (units.size, ("80", "80gb", "80G", "0GB"), "80GB"),
        (units.duration, ("10", "10min", "-1s", ""), "10us"),
        (milliseconds, ("0", "-1", "nan", "3min"), "300ms"),
        (nanoseconds_or_zero, ("-1", "inf"), "300ns"),
    ],
)
def test_what_is_refused(read, texts, example):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            read(text)
        message = str(caught.value)
        assert message.startswith(f"{text!r} is not allowed; allowed: ") and "for example" in message
        assert example in message
