"""Robust rules by hand, against plain NumPy, and through the real aggregation, where some updates are hostile."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coordinator.aggregate
import coordinator.update_rows
from coordinator import kernel
from coordinator.aggregate import AggregationError, CountedUpdate, aggregate
from coordinator.config import load_settings, run_definition
from coordinator.gates import delta_sum_squares
from coordinator.models import ModelStore
from coordinator.spool import RoundSpool
from coordinator.strategies import (
    STRATEGIES,
    Cohort,
    FedAvg,
    FedAvgM,
    Krum,
    Median,
    MultiKrum,
    Shares,
    StrategyError,
    TrimmedMean,
    make_strategy,
)
from midge.settings import SettingsError
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, run_tag

ROBUST = ("median", "trimmed-mean", "krum", "multi-krum")


def rows(*values):
    return np.array(values, np.float64).T.copy()


# By hand. Each argument of `rows` is an element, over the updates.


def test_the_median_is_the_middle_of_each_element():
    assert Median().centre(rows([1, 100, 2], [-5, 0, 7])).tolist() == [2.0, 0.0]


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle():
    # 1, 2, 4, 1000: (2 + 4) / 2
    assert Median().centre(rows([1000, 1, 4, 2])).tolist() == [3.0]


def test_a_zero_in_the_middle_has_no_sign_of_its_own():
    assert not np.signbit(Median().centre(rows([-0.0, 0.0, -0.0]))[0])


def test_the_trimmed_mean_leaves_out_the_extremes_of_each_element():
    # A fifth of five is one at either end: (2 + 3 + 4) / 3, and (0 + 1 + 2) / 3
    assert TrimmedMean().centre(rows([2, -100, 3, 1e6, 4], [1, 2, 0, -9, 9])).tolist() == [3.0, 1.0]


def test_what_is_trimmed_is_rounded_down_to_whole_updates():
    # 0.3 of nine is 2.7, so two at either end: of 1 to 9, the mean of 3 to 7
    assert TrimmedMean(trim=0.3).centre(rows(range(1, 10))).tolist() == [5.0]
    # 0.2 of ten is two, though 0.1 + 0.2 would not be 0.3
    assert TrimmedMean(trim=0.2).centre(rows([0, 0, 1, 1, 1, 1, 1, 1, 9, 9])).tolist() == [1.0]


FIVE = np.array([[0.0], [1.0], [3.0], [4.0], [100.0]])
"""Of five updates with one element each. With f = 1, each is scored by its 5 - 1 - 2 = 2 nearest others:
0: 1 + 9 = 10;  1: 1 + 4 = 5;  3: 1 + 4 = 5;  4: 1 + 9 = 10;  100: 96^2 + 97^2"""


def cohort(vectors):
    distances = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    return Cohort((1 / len(vectors),) * len(vectors), tuple(np.linalg.norm(vectors, axis=1)), distances)


def test_krum_takes_the_update_with_the_least_score_and_of_equals_the_first_agents():
    assert Krum().nearest(cohort(FIVE)).tolist() == [1, 2, 0, 3, 4]
    assert Krum().shares(cohort(FIVE)) == Shares((0.0, 1.0, 0.0, 0.0, 0.0))


def test_multi_krum_takes_as_many_as_its_theory_allows_or_as_it_is_told():
    assert MultiKrum().shares(cohort(FIVE)) == Shares((0.0, 0.5, 0.5, 0.0, 0.0))
    assert MultiKrum(num_chosen=1).shares(cohort(FIVE)) == Krum().shares(cohort(FIVE))
    assert MultiKrum(num_byzantine=0, num_chosen=3).shares(cohort(FIVE)).updates.count(1 / 3) == 3


def test_clipping_shortens_what_is_longer_than_the_cohorts_median():
    # The median norm is 2, so deltas may be 4 long: the one of 16 counts a quarter, and the model three quarters of its weight.
    shares = FedAvg(clip_to_median=2).shares(Cohort((0.5, 0.25, 0.25), (2.0, 1.0, 16.0)))
    assert shares == Shares((0.5, 0.25, 0.0625), 0.1875)


def test_without_an_outlier_clipping_leaves_the_weights_alone():
    weights = (0.1, 0.2, 0.7)
    assert FedAvg(clip_to_median=2).shares(Cohort(weights, (2.0, 1.0, 3.9))) == Shares(weights)
    assert FedAvg().shares(Cohort(weights, (2.0, 1.0, 1e9))) == Shares(weights)


def test_where_most_agents_return_the_global_model_nobody_else_moves_it():
    shares = FedAvg(clip_to_median=3).shares(Cohort((0.25, 0.25, 0.5), (0.0, 0.0, 5.0)))
    assert shares == Shares((0.25, 0.25, 0.0), 0.5)


# Against plain NumPy.

matrices = st.integers(5, 12).flatmap(
    lambda k: st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=k, max_size=k).map(
        lambda values: np.array(values, np.float64)
    )
)


@given(matrices)
def test_the_median_is_numpys(values):
    expected = np.median(values, axis=0) + 0.0
    np.testing.assert_allclose(Median().centre(values.copy()), expected, rtol=1e-15, atol=0)


@given(matrices, st.sampled_from([0.2, 0.25, 0.4, 0.49]))
def test_the_trimmed_mean_is_the_mean_of_what_is_left_of_each_sorted_column(values, trim):
    k = int(trim * len(values) + 1e-9)
    expected = np.sort(values, axis=0)[k : len(values) - k].mean(axis=0)
    np.testing.assert_allclose(TrimmedMean(trim=trim).centre(values.copy()), expected, rtol=1e-12, atol=1e-9)


@given(matrices, st.integers(0, 1))
def test_krum_is_the_papers(values, num_byzantine):
    # Blanchard et al., section 4: s(i) = sum over the n - f - 2 closest j of ||V_i - V_j||^2; the least s is chosen.
    given_cohort = cohort(values)
    scores = []
    for one in range(len(values)):
        others = sorted(((values[one] - values[other]) ** 2).sum() for other in range(len(values)) if other != one)
        scores.append(sum(others[: len(values) - num_byzantine - 2]))
    shares = Krum(num_byzantine=num_byzantine).shares(given_cohort)
    assert scores[shares.updates.index(1.0)] == pytest.approx(min(scores), rel=1e-9)


@given(matrices.filter(lambda values: np.linalg.norm(values, axis=1).all()), st.floats(1, 5))
def test_the_clipped_mean_is_the_mean_of_clipped_deltas(values, factor):
    norms = np.linalg.norm(values, axis=1)
    bound = factor * np.median(norms)
    expected = (values * np.minimum(1, bound / norms)[:, None]).mean(axis=0)
    shares = FedAvg(clip_to_median=factor).shares(Cohort((1 / len(values),) * len(values), tuple(norms.tolist())))
    assert sum(shares.updates) + shares.base == pytest.approx(1)
    np.testing.assert_allclose(np.array(shares.updates) @ values, expected, rtol=1e-9, atol=1e-6)


@settings(max_examples=30)
@given(matrices, st.sampled_from(ROBUST), st.randoms(use_true_random=False))
def test_no_honest_bound_is_left_whatever_one_agent_sends(values, name, random):
    # Of five or more, one is hostile: every element stays within what the honest ones sent.
    values[random.randrange(len(values))] = random.choice([1e30, -1e30, 0])
    strategy = make_strategy(name)
    if strategy.replaces_mean:
        found = strategy.centre(values.copy())
    else:
        found = np.array(strategy.shares(cohort(values)).updates) @ values
    assert (np.abs(found) <= 1e6 * (1 + 1e-9)).all()


# Through the aggregation.


class Aggregation:
    """A round of a model of `size` elements, whose updates arrive in any order."""

    def __init__(self, directory, base, frame_elements=16):
        self.base = np.array(base, np.float32)
        self.models = ModelStore(directory / "models")
        self.digest = self.models.save_state({"w": self.base})
        self.framing = Framing(len(self.base), frame_elements)
        self.directory = directory
        self.number = 0

    def run(self, strategy, vectors, *, num_threads=1, backwards=False, num_examples=None):
        self.number += 1
        spool = RoundSpool(self.directory / f"{self.number}.spool")
        named = [(f"agent-{number:02}", np.array(vector, np.float32)) for number, vector in enumerate(vectors)]
        counted = [self._receive(spool, *one) for one in (named[::-1] if backwards else named)]
        try:
            with self.models.open(self.digest) as model:
                return aggregate(model, spool, counted, strategy, self.framing, self.models, num_threads)
        finally:
            spool.close()

    def _receive(self, spool, agent_id, vector):
        tag = content_tag(hashlib.sha256(vector.tobytes()).hexdigest())
        for index in range(self.framing.num_frames):
            start, stop = self.framing.span(index)
            frame = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag("run"),
                round_num=1,
                index=index,
                num_elements=stop - start,
                content_tag=tag,
                body=encode_float32(vector[start:stop]),
            )
            spool.append(agent_id, frame, bytes(32), delta_sum_squares(vector[start:stop], self.base[start:stop]))
        return CountedUpdate(agent_id, tag, 10)

    def elements(self, made):
        with self.models.open(made.digest) as model:
            return np.array(model.elements)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and lanes, which end in the middle of frames."""
    monkeypatch.setattr(coordinator.aggregate, "_BLOCK_ELEMENTS", 7)
    monkeypatch.setattr(coordinator.aggregate, "_LEAST_BLOCK", 5)
    monkeypatch.setattr(coordinator.update_rows, "_BLOCK_VALUES", 1)
    monkeypatch.setattr(coordinator.update_rows, "_LEAST_BLOCK", 3)


SIZE = 101
BASE = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
HONEST = [
    (BASE + 0.1 + 0.01 * np.random.default_rng(number).standard_normal(SIZE)).astype(np.float32)
    for number in range(1, 8)
]


def expected_of(name, vectors):
    values = np.array(vectors, np.float64)
    if name == "median":
        return np.median(values, axis=0)
    if name == "trimmed-mean":
        k = len(values) // 5
        return np.sort(values, axis=0)[k : len(values) - k].mean(axis=0)
    strategy = make_strategy(name)
    return np.array(strategy.shares(cohort(values)).updates) @ values


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ROBUST)
def test_the_aggregation_is_the_rule_on_whole_vectors_whatever_the_order_and_the_threads(tmp_path, name):
    running = Aggregation(tmp_path, BASE)
    made = running.run(make_strategy(name), HONEST)
    np.testing.assert_allclose(running.elements(made), expected_of(name, HONEST), rtol=0, atol=2e-7)
    assert running.run(make_strategy(name), HONEST, backwards=True) == made
    assert running.run(make_strategy(name), HONEST, num_threads=3) == made


def test_distances_are_numpys_to_the_last_digits_and_the_same_bits_with_any_number_of_threads(tmp_path, small_blocks):
    running, seen = Aggregation(tmp_path, BASE), []

    class Looks(Krum):
        def shares(self, cohort):
            seen.append(cohort)
            return super().shares(cohort)

    for num_threads in (1, 2, 16):
        running.run(Looks(), HONEST, num_threads=num_threads)
    values = np.array(HONEST, np.float64)
    np.testing.assert_allclose(seen[0].distances, ((values[:, None] - values[None]) ** 2).sum(axis=2), rtol=1e-12)
    np.testing.assert_allclose(seen[0].norms, np.linalg.norm(values - BASE, axis=1), rtol=1e-12)
    assert all(one.distances.tobytes() == seen[0].distances.tobytes() for one in seen)


def test_krum_gives_one_agents_own_model_to_the_bit_and_says_whose_others_it_left_out(tmp_path):
    running = Aggregation(tmp_path, BASE)
    made = running.run(Krum(), HONEST)
    (chosen,) = [number for number in range(7) if f"agent-{number:02}" not in made.held_back]
    assert running.elements(made).tobytes() == HONEST[chosen].tobytes()


def test_a_clipped_round_without_outliers_has_the_bits_of_one_that_does_not_clip(tmp_path):
    running = Aggregation(tmp_path, BASE)
    clipped = running.run(FedAvg(clip_to_median=2), HONEST)
    assert clipped == running.run(FedAvg(), HONEST)
    assert clipped.held_back == ()


@pytest.mark.usefixtures("small_blocks")
def test_a_long_delta_is_shortened_to_the_bound_and_its_agent_named(tmp_path):
    running = Aggregation(tmp_path, BASE)
    far = (BASE + 100).astype(np.float32)
    made = running.run(FedAvg(clip_to_median=2), [*HONEST, far])
    assert made.held_back == ("agent-07",)
    deltas = np.array([*HONEST, far], np.float64) - BASE
    norms = np.linalg.norm(deltas, axis=1)
    expected = BASE + (deltas * np.minimum(1, 2 * np.median(norms) / norms)[:, None]).mean(axis=0)
    np.testing.assert_allclose(running.elements(made), expected, rtol=0, atol=3e-7)


def test_the_compiled_loop_gives_the_same_bits_where_deltas_are_clipped(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    running = Aggregation(tmp_path, BASE)
    vectors = [*HONEST, (BASE + 100).astype(np.float32)]
    strategies = [FedAvg(clip_to_median=2), Median(), MultiKrum()]
    plain = [running.run(strategy, vectors) for strategy in strategies]
    if kernel.compiled() is None:
        pytest.skip("NumPy rounds otherwise than numba here")
    monkeypatch.setattr(coordinator.aggregate, "kernel_for", lambda _: kernel.compiled())
    assert [running.run(strategy, vectors) for strategy in strategies] == plain


def test_clipping_goes_before_what_the_server_remembers(tmp_path):
    # Momentum takes the mean of clipped deltas: 0.5 * (1 + 1 + 2) / 3, the third being clipped from 9 to twice the median.
    running = Aggregation(tmp_path, [1.0])
    made = running.run(FedAvgM(server_learning_rate=0.5, momentum=0, clip_to_median=2), [[2.0], [2.0], [10.0]])
    np.testing.assert_allclose(running.elements(made), [1 + 0.5 * 4 / 3], rtol=1e-6)


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", [*ROBUST, "clipped"])
def test_two_of_ten_agents_that_flip_their_signs_tenfold_do_not_turn_the_model_around(tmp_path, name):
    running = Aggregation(tmp_path, BASE)
    honest = [BASE + 0.1 + 0.02 * np.random.default_rng(number).standard_normal(SIZE) for number in range(8)]
    hostile = [BASE - 10 * (vector - BASE) for vector in honest[:2]]
    options = {} if name in ("median", "trimmed-mean", "clipped") else {"num_byzantine": 2}
    strategy = FedAvg(clip_to_median=1.5) if name == "clipped" else make_strategy(name, options)
    step = running.elements(running.run(strategy, [*hostile, *honest])) - BASE
    # The honest mean step is 0.1 an element; two that are clipped to 1.5 of it leave (8 - 3) / 10 of that.
    assert 0.04 < step.mean() < 0.13
    undefended = running.elements(running.run(FedAvg(), [*hostile, *honest])) - BASE
    assert undefended.mean() < -0.1


# What cannot be.


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("median", {}, 3),
        ("trimmed-mean", {}, 5),
        ("trimmed-mean", {"trim": 0.1}, 10),
        ("krum", {"num_byzantine": 2}, 7),
        ("multi-krum", {"num_byzantine": 2.0}, 7),
        ("multi-krum", {"num_byzantine": 1, "num_chosen": 6}, 9),
    ],
)
def test_a_round_with_too_few_updates_is_abandoned_with_a_reason(tmp_path, name, options, least):
    strategy = make_strategy(name, options)
    assert strategy.min_updates == least
    running = Aggregation(tmp_path, [0.0, 1.0])
    vectors = [[0.1 * number, 1.0] for number in range(least)]
    assert running.run(strategy, vectors).digest
    with pytest.raises(
        AggregationError, match=f"{least - 1} updates are counted, .* needs at least {least}: raise quorum"
    ):
        running.run(strategy, vectors[1:])


def test_a_quorum_that_the_rule_cannot_do_with_is_refused_at_the_start():
    with pytest.raises(SettingsError) as caught:
        load_settings(assignments=["strategy=krum", "min_agents=4"])
    expected = "quorum is 4, and strategy krum with its options needs 5 updates a round: raise quorum or min_agents"
    assert expected in str(caught.value)
    assert load_settings(assignments=["strategy=krum", "min_agents=4", "quorum=5"]).needed_updates == 5
    assert load_settings(assignments=["strategy=krum", "strategy_options=num_byzantine=0", "min_agents=3"])


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("krum", {"num_byzantine": -1}, "krum: num_byzantine is -1: expected a whole number of at least 0"),
        ("multi-krum", {"num_chosen": 1.5}, "multi-krum: num_chosen is 1.5: expected a whole number of at least 0"),
        ("multi-krum", {"num_byzantine": float("inf")}, "multi-krum: num_byzantine is inf: expected a whole number"),
        ("trimmed-mean", {"trim": 0.5}, "trimmed-mean: trim is 0.5: expected a finite number above 0 and below 0.5"),
        ("fedavg", {"clip_to_median": 2}, "give it as the setting clip_to_median"),
        ("median", {"trim": 0.1}, "median has no such option"),
    ],
)
def test_options_out_of_range_are_refused(name, options, problem):
    with pytest.raises(StrategyError) as caught:
        make_strategy(name, options)
    assert problem in str(caught.value)


def test_who_has_no_mean_cannot_clip():
    with pytest.raises(SettingsError, match=r"clip_to_median is 2\.0, and strategy median has none: leave it out"):
        load_settings(assignments=["strategy=median", "min_agents=3", "clip_to_median=2"])


def test_a_bound_below_the_median_itself_is_refused():
    with pytest.raises(SettingsError, match=r"clip_to_median is 0\.5: expected a number of at least 1, or 0"):
        load_settings(assignments=["clip_to_median=0.5"])


def test_clipping_defines_a_run_and_not_clipping_says_nothing():
    plain = load_settings()
    assert "clip_to_median" not in run_definition(plain)
    assert run_definition(load_settings(assignments=["clip_to_median=2"]))["clip_to_median"] == 2


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        (Shares((1.0,)), "gives 3 updates 1 shares"),
        (Shares((0.5, 0.6, -0.1)), r"the least -0\.1"),
        (Shares((0.5, 0.5, 0.5)), r"add up to 1\.5"),
        (Shares((0.0, 0.0, 0.0), 1.0), "leaves out all of 3 updates"),
        (Shares((float("nan"), 0.5, 0.5)), "add up to nan"),
    ],
)
def test_shares_that_are_none_are_refused(tmp_path, shares, problem):
    class Wrong(FedAvg):
        def shares(self, cohort):
            return shares

    with pytest.raises(AggregationError, match=problem):
        Aggregation(tmp_path, BASE).run(Wrong(), HONEST[:3])


def test_each_robust_rule_says_what_it_costs_and_no_other_strategy_does():
    assert [name for name in STRATEGIES if make_strategy(name).caution] == list(ROBUST)
    for name in ROBUST:
        assert "where their labels differ" in make_strategy(name).caution
