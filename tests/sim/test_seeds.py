"""A seed that fails is named, and hides no other."""

from __future__ import annotations

import pytest

from tests.sim import seeds


def test_groups_hold_every_seed_once():
    groups = seeds.groups(45)
    assert [seed for group in groups for seed in group] == list(range(45))
    assert [seeds.name(group) for group in groups] == ["0-19", "20-39", "40-44"]


def test_every_seed_is_tried_and_those_that_fail_are_named():
    tried = []

    def attempt(seed: int) -> None:
        tried.append(seed)
        assert seed not in {3, 5}, f"broken by {seed}"

    with pytest.raises(AssertionError, match=r"2 of 10 seeds failed: 3, 5\. .* --seed 3\n") as caught:
        seeds.each(range(10), attempt)
    assert tried == list(range(10))
    assert "broken by 5" in str(caught.value)
