from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.partition import (
    MIN_EXAMPLES,
    by_labels,
    contiguous,
    dirichlet,
    iid,
    partition,
    quantity,
    select,
    shards,
)

LABELS = np.repeat(np.arange(10), 40)[np.random.RandomState(1).permutation(400)]  # 40 examples of each of ten labels

EVERY_PARTITION = [
    "iid",
    "contiguous",
    "shards:2",
    "shards:10",
    "dirichlet:0.3",
    "dirichlet:1",
    "quantity:0.5",
    "quantity:5",
]

GOLDEN = {
    "by_labels": [1, 6, 7, 8, 10],
    "iid": [[0, 1, 2, 3], [4, 5, 6]],
    "shards": [[2, 5, 7, 10], [0, 4, 6, 8], [1, 3, 9, 11]],
    "dirichlet": [[0, 1, 2, 3, 5, 6, 8, 9, 10], [4, 7, 11]],
    "quantity": [[4, 11], [1, 3, 5, 6, 7, 8, 9, 10], [0, 2]],
}


def counts(indices, labels=LABELS):
    return np.bincount(labels[indices], minlength=10).tolist()


def assert_a_partition(parts, num_examples):
    together = np.concatenate(parts)
    assert len(together) == num_examples
    assert sorted(together.tolist()) == list(range(num_examples))
    assert all((np.diff(part) > 0).all() for part in parts)


# by_labels


def test_own_labels_are_kept_whole_and_of_the_others_the_exact_share():
    kept = by_labels(LABELS, (1, 2, 3), 1.0, 0.05, seed=0)
    assert counts(kept) == [2, 40, 40, 40, 2, 2, 2, 2, 2, 2]  # 0.05 · 40 = 2
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize(("prob", "kept"), [(0.0, 0), (0.1, 1), (0.3, 2), (0.5, 3), (0.69, 3), (0.7, 4), (1.0, 5)])
def test_a_count_is_rounded_to_the_nearest_and_halves_up(prob, kept):
    # Of 5: 0.1 -> 0.5 -> 1; 0.3 -> 1.5 -> 2; 0.5 -> 2.5 -> 3; 0.69 -> 3.45 -> 3; 0.7 -> 3.5 -> 4.
    assert len(by_labels(np.zeros(5, int), (), prob, 0.0, seed=0)) == kept


def test_no_classes_means_all_of_them():
    assert by_labels(LABELS, (), 1.0, 0.0, seed=0).tolist() == list(range(400))


def test_the_same_seed_keeps_the_same_and_another_seed_others():
    first = by_labels(LABELS, (7,), 0.5, 0.1, seed=3)
    assert np.array_equal(first, by_labels(LABELS, (7,), 0.5, 0.1, seed=3))
    assert not np.array_equal(first, by_labels(LABELS, (7,), 0.5, 0.1, seed=4))


def test_a_larger_share_contains_the_smaller_one_of_the_same_seed():
    small, large = (set(by_labels(LABELS, (7,), prob, 0.0, seed=3).tolist()) for prob in (0.25, 0.75))
    assert len(small) == 10
    assert len(large) == 30
    assert small < large


def test_choices_are_those_of_every_other_device_and_version():
    # Written down: they must never change, or devices of two versions would deal differently.
    labels = np.array([0, 1] * 6)
    assert by_labels(labels, (0,), 0.5, 0.34, seed=7).tolist() == GOLDEN["by_labels"]
    assert [part.tolist() for part in iid(7, 2, seed=7)] == GOLDEN["iid"]
    assert [part.tolist() for part in shards(labels, 1, 3, seed=7)] == GOLDEN["shards"]
    assert [part.tolist() for part in dirichlet(labels, 2.0, 2, seed=7)] == GOLDEN["dirichlet"]
    assert [part.tolist() for part in quantity(12, 0.5, 3, seed=7)] == GOLDEN["quantity"]


def test_numbers_of_any_integer_type_serve_as_labels():
    assert len(select(LABELS.astype(np.uint8), DataSpec(classes=(3,)))) == 40
    assert len(select(LABELS.astype(np.int32), DataSpec(classes=(3,)))) == 40


# iid, shards, dirichlet


def test_iid_parts_are_disjoint_cover_everything_and_differ_by_one_in_size():
    parts = iid(1437, 10, seed=0)
    assert_a_partition(parts, 1437)
    assert sorted(len(part) for part in parts) == [143] * 3 + [144] * 7  # 3 · 143 + 7 · 144 = 1437


def test_two_shards_a_part_hold_two_labels_at_most_where_shards_end_with_labels():
    parts = shards(LABELS, 2, 10, seed=0)  # 20 shards of 20: two a label
    assert_a_partition(parts, 400)
    assert all(len(part) == 40 for part in parts)
    assert all(sum(count > 0 for count in counts(part)) <= 2 for part in parts)


def test_a_shard_takes_its_label_s_examples_from_all_over_the_data():
    labels = np.zeros(100, int)
    first, second = shards(labels, 1, 2, seed=0)
    assert first.min() < 10
    assert second.min() < 10


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_dirichlet_parts_are_disjoint_cover_everything_and_none_is_too_small(alpha):
    parts = dirichlet(LABELS, alpha, 5, seed=0)
    assert_a_partition(parts, 400)
    assert min(len(part) for part in parts) >= MIN_EXAMPLES


def test_a_large_alpha_gives_even_parts_and_a_small_one_skewed_parts():
    even = np.array([counts(part) for part in dirichlet(LABELS, 1e6, 4, seed=0)])
    skewed = np.array([counts(part) for part in dirichlet(LABELS, 0.1, 4, seed=0)])
    assert even.min() >= 9  # 40 examples of a label in four: 10 each, one of rounding
    assert even.max() <= 11
    assert skewed.max() > 30


def test_dirichlet_draws_again_until_the_smallest_part_is_large_enough():
    smallest = [min(len(part) for part in dirichlet(LABELS, 0.1, 10, seed=seed)) for seed in range(20)]
    assert min(smallest) >= MIN_EXAMPLES
    # Few examples lower the bar to half of an even share: 40 // 10 // 2 = 2.
    few = dirichlet(LABELS[:40], 1.0, 10, seed=0)
    assert_a_partition(few, 40)
    assert min(len(part) for part in few) >= 2


@pytest.mark.parametrize("alpha", [1e-4, 1e-300])
def test_dirichlet_says_when_no_draw_will_do(alpha):
    with pytest.raises(TaskError, match=r"none of 1000 draws gave each of 50 parts at least 4 examples; use a larger"):
        dirichlet(LABELS, alpha, 50, seed=0)


def test_every_partition_depends_on_the_seed_alone():
    for deal in (
        lambda seed: iid(400, 4, seed),
        lambda seed: shards(LABELS, 2, 4, seed),
        lambda seed: dirichlet(LABELS, 0.5, 4, seed),
        lambda seed: quantity(400, 0.5, 4, seed),
    ):
        same = [np.array_equal(a, b) for a, b in zip(deal(5), deal(5), strict=True)]
        assert all(same)
        assert not all(np.array_equal(a, b) for a, b in zip(deal(5), deal(6), strict=True))


# contiguous, quantity


def test_contiguous_parts_are_the_pieces_in_order_whatever_the_seed():
    assert [part.tolist() for part in contiguous(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    specs = [DataSpec(partition="contiguous", part=2, num_parts=10, seed=seed) for seed in (0, 9)]
    for spec in specs:  # the third tenth of 400
        assert select(LABELS, spec).tolist() == list(range(80, 120))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 100.0])
def test_quantity_parts_are_disjoint_cover_everything_and_none_is_too_small(alpha):
    parts = quantity(1000, alpha, 8, seed=0)
    assert_a_partition(parts, 1000)
    assert min(len(part) for part in parts) >= MIN_EXAMPLES


def test_a_small_alpha_gives_uneven_sizes_and_a_large_one_even_ones():
    even = [len(part) for part in quantity(1000, 1e6, 4, seed=0)]
    uneven = [len(part) for part in quantity(1000, 0.2, 4, seed=0)]
    assert max(even) - min(even) <= 3  # each share is 1/4 within a thousandth
    assert max(uneven) > 2 * 250


def test_quantity_leaves_labels_as_they_are_in_the_whole():
    largest = max(quantity(400, 0.3, 4, seed=1), key=len)
    assert len(largest) > 150
    assert min(counts(largest)) > 0.5 * len(largest) / 10  # an even share of each of ten labels, within a half


@pytest.mark.parametrize("alpha", [1e-3, 1e-300])
def test_quantity_says_when_no_draw_will_do(alpha):
    with pytest.raises(TaskError, match=r"quantity:.*none of 1000 draws gave each of 50 parts at least 4 examples"):
        quantity(400, alpha, 50, seed=0)


# any of them


@given(
    how=st.sampled_from(EVERY_PARTITION),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=120).map(np.array),
    num_parts=st.integers(1, 6),
    seed=st.integers(0, 2**53),
)
def test_any_partition_of_any_data_gives_each_example_to_one_part_and_always_the_same(how, labels, num_parts, seed):
    try:
        parts = partition(labels, how, num_parts, seed)
    except TaskError:
        assume(False)  # too few examples for so many parts, which is said
    assert len(parts) == num_parts
    assert all(len(part) for part in parts)
    assert_a_partition(parts, len(labels))
    again = partition(labels.astype(np.uint8), how, num_parts, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


# select


def test_without_any_wish_an_agent_has_everything():
    assert select(LABELS, DataSpec()).tolist() == list(range(400))


@pytest.mark.parametrize("partition", EVERY_PARTITION)
def test_the_parts_of_all_agents_together_are_the_data(partition):
    parts = [select(LABELS, DataSpec(partition=partition, part=part, num_parts=5, seed=2)) for part in range(5)]
    assert_a_partition(parts, 400)


def test_classes_apply_within_the_part_so_that_agents_share_nothing():
    specs = [
        DataSpec(classes=classes, def_prob=0.5, partition="iid", part=part, num_parts=2, seed=1)
        for part, classes in enumerate([(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)])
    ]
    first, second = (select(LABELS, spec) for spec in specs)
    assert not set(first) & set(second)
    half = iid(400, 2, seed=1)[0]
    of_each = counts(half)
    assert counts(first)[:5] == of_each[:5]
    assert counts(first)[5:] == [(count + 1) // 2 for count in of_each[5:]]


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            "shard:2",
            "partition 'shard:2': expected iid, contiguous, shards:2, dirichlet:0.3 or quantity:0.5; did you mean shards:2?",
        ),
        ("shard:3", "; did you mean shards:3?"),
        ("Dirichlet:0.5", "; did you mean dirichlet:0.5?"),
        ("shards", "; did you mean shards:2?"),
        ("shards:0", "; did you mean shards:2?"),
        ("shards:1.5", "; did you mean shards:2?"),
        ("shards:²", "; did you mean shards:2?"),
        ("dirichlet:-1", "; did you mean dirichlet:0.3?"),
        ("dirichlet:nan", "; did you mean dirichlet:0.3?"),
        ("dirichlet:inf", "; did you mean dirichlet:0.3?"),
        ("iid:4", "; did you mean iid?"),
        ("IID", "; did you mean iid?"),
        ("contiguous:2", "; did you mean contiguous?"),
        ("continuous", "; did you mean contiguous?"),
        ("quantity", "; did you mean quantity:0.5?"),
        ("quantity:0", "; did you mean quantity:0.5?"),
        ("quanity:2", "; did you mean quantity:2?"),
    ],
)
def test_a_misspelt_partition_is_met_with_the_one_that_was_meant(partition, message):
    with pytest.raises(TaskError) as error:
        select(LABELS, DataSpec(partition=partition, num_parts=2))
    assert str(error.value).endswith(message)


def test_a_partition_like_none_is_met_with_all_there_are():
    with pytest.raises(
        TaskError, match=r"partition 'quux': expected iid, contiguous, shards:2, dirichlet:0\.3 or quantity:0\.5$"
    ):
        select(LABELS, DataSpec(partition="quux", num_parts=2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec(partition="iid", part=3, num_parts=3), "part 3 of 3 parts: expected 0 to num_parts - 1"),
        (DataSpec(partition="iid", part=-1, num_parts=3), "part -1 of 3 parts"),
        (
            DataSpec(part=1, num_parts=3),
            "part 1 of 3, but no partition: say how to deal, iid, contiguous, shards:2, dirichlet:0.3 or quantity:0.5",
        ),
        (DataSpec(partition="iid", num_parts=401), "401 parts of 400 examples: expected 1 to 400"),
        (DataSpec(partition="shards:300", num_parts=2), "600 shards of 400 examples: expected 1 to 400"),
        (DataSpec(classes=(3, 12)), "classes (3, 12): no example is labelled 12; the labels are 0 to 9"),
        (DataSpec(classes=(3,), sel_prob=1.5), "sel_prob is 1.5: expected a share from 0 to 1"),
        (DataSpec(classes=(3,), def_prob=-0.1), "def_prob is -0.1: expected a share from 0 to 1"),
        (DataSpec(classes=(3,), def_prob=float("nan")), "def_prob is nan: expected a share from 0 to 1"),
        (DataSpec(classes=(3,), sel_prob=0.0), "no example is left of 400"),
    ],
)
def test_what_makes_no_sense_is_said(spec, message):
    with pytest.raises(TaskError) as error:
        select(LABELS, spec)
    assert message in str(error.value)


def test_labels_must_be_one_integer_an_example():
    for labels in (np.zeros((4, 2), int), np.zeros(4)):
        with pytest.raises(TaskError, match="expected one integer an example"):
            select(labels, DataSpec())


def test_no_data_at_all_is_said():
    with pytest.raises(TaskError, match="no example is left of 0"):
        select(np.empty(0, int), DataSpec())
    with pytest.raises(TaskError, match=r"no example is labelled 1; the labels are \[\]"):
        select(np.empty(0, int), DataSpec(classes=(1,)))
