# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The palette against a simulation of color vision, and what names get of it."""

import itertools

import numpy
import pytest

from deepspeed_acco.tools import palette

THEMES = {
    "light": (palette.SERIES, palette.PARTS, "#FFFFFF"),
    "dark": (palette.SERIES_DARK, palette.PARTS_DARK, "#14171C"),
}
# Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB.
SIGHT = {
    "normal": numpy.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Ottosson's OKLab: a distance of 0.02 is just noticed.
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(color):
    value = numpy.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return numpy.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(color, sight):
    seen = numpy.clip(numpy.array(SIGHT[sight]) @ linear(color), 0, 1)
    return numpy.array(TO_LAB) @ numpy.cbrt(numpy.array(TO_CONES) @ seen)


@pytest.mark.parametrize("theme", THEMES)
def test_no_color_has_two_meanings(theme):
    series, parts, _ = THEMES[theme]
    colors = [*series.values(), *parts.values()]
    assert len({color.lower() for color in colors}) == len(colors)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", THEMES)
def test_any_two_colors_of_a_table_are_told_apart_whatever_one_sees(theme, sight):
    series, parts, paper = THEMES[theme]
    for table in (series, parts):
        seen = {name: lab(color, sight) for name, color in {**table, "paper": paper}.items()}
        distances = {(a, b): numpy.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(seen, 2)}
        closest = min(distances, key=distances.get)
        assert distances[closest] > 0.07, (closest, distances[closest])


def test_a_name_has_its_color_in_every_picture_and_others_take_what_is_free():
    names = ["mine", "zero1", "acco", "acco:estimate_fraction=0.75"]
    colors = palette.colors_of(names)
    assert list(colors) == names
    assert colors["acco"] == palette.SERIES["acco"] == palette.colors_of(["acco"])["acco"]
    assert colors["zero1"] == palette.SERIES["zero1"]
    assert len(set(colors.values())) == 4
    assert set(colors.values()) <= set(palette.SERIES.values())
    assert palette.colors_of(names, is_dark=True)["zero1"] == palette.SERIES_DARK["zero1"]


def test_there_are_colors_for_any_number_of_names():
    names = [f"run{number}" for number in range(30)] + list(palette.SERIES)
    assert set(palette.colors_of(names)) == set(names)
