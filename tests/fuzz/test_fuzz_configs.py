"""What tests/fuzz/configs.py finds: nothing."""

import random

import pytest

from tests.fuzz import configs

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("count", [250, pytest.param(500, marks=pytest.mark.full)])
def test_no_json_is_ignored_or_breaks(count):
    assert list(configs.run(seed=1, count=count)) == []


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2, 6))
def test_no_json_of_more_is_ignored_or_breaks(seed):
    assert list(configs.run(seed, count=1000)) == []


def test_inputs_follow_from_the_seed_and_reach_every_key():
    inputs = [configs.make_input(random.Random(f"1 {number}")) for number in range(1000)]
    assert inputs == [configs.make_input(random.Random(f"1 {number}")) for number in range(1000)]
    assert set(configs.WORDS) <= {key for changed, _ in inputs for key in changed}
