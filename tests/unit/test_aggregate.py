"""Aggregation by hand: what comes out, and that the same updates give the same bits."""

import hashlib
import itertools
import math

import numpy as np
import pytest

import coordinator.aggregate
import coordinator.spool
from coordinator import kernel
from coordinator.aggregate import AggregationError, CountedUpdate, aggregate
from coordinator.gates import delta_sum_squares
from coordinator.models import ModelStore
from coordinator.spool import RoundSpool
from coordinator.strategies import FedAvg
from midge.tasks.flatten import layout_of, state_to_vector
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, run_tag


class Round:
    """One round: a global model, and updates in the order in which they arrive."""

    def __init__(self, directory, global_state, frame_elements=2):
        self.models = ModelStore(directory / "models")
        self.layout = layout_of(global_state)
        self.base_digest = self.models.save_state(global_state)
        self.framing = Framing(self.layout.num_elements, min(frame_elements, self.layout.num_elements))
        self.spool = RoundSpool(directory / "1.spool")
        self.updates = []

    def receive(self, agent_id, values, num_examples=1, counters=()):
        vector = np.array(values, np.float32)
        digest = hashlib.sha256(vector.tobytes()).hexdigest()
        for index in reversed(range(self.framing.num_frames)):
            start, stop = self.framing.span(index)
            self.receive_frame(agent_id, index, vector[start:stop], content_tag(digest))
        self.updates.append(CountedUpdate(agent_id, content_tag(digest), num_examples, tuple(counters)))
        return self

    def receive_frame(self, agent_id, index, elements, tag):
        encoded = encode_frame(
            codec=FLOAT32,
            run_tag=run_tag("run"),
            round_num=1,
            index=index,
            num_elements=len(elements),
            content_tag=tag,
            body=encode_float32(elements),
        )
        self.spool.append(agent_id, encoded, bytes(32), 0.0)

    def aggregate(self, strategy=None, num_threads=1):
        with self.models.open(self.base_digest) as base:
            strategy = FedAvg() if strategy is None else strategy
            return aggregate(base, self.spool, self.updates, strategy, self.framing, self.models, num_threads)

    def result(self, strategy=None, num_threads=1):
        with self.models.open(self.aggregate(strategy, num_threads).digest) as model:
            return np.array(model.elements)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even of small models, which end in the middle of frames."""
    monkeypatch.setattr(coordinator.aggregate, "_BLOCK_ELEMENTS", 3)


@pytest.fixture(autouse=True, params=["numpy", "numba"])
def way(request):
    """All of it holds either way of doing the arithmetic."""
    if request.param == "numba" and kernel.compiled() is None:
        pytest.skip("numba is not installed, or rounds otherwise here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "WORTH_ELEMENTS", 0 if request.param == "numba" else math.inf)
        yield


@pytest.fixture
def start(tmp_path):
    """Begins a round; each in a directory of its own."""
    rounds = []

    def begin(global_values, frame_elements=2):
        state = global_values if isinstance(global_values, dict) else {"w": np.array(global_values, np.float32)}
        directory = tmp_path / str(len(rounds))
        directory.mkdir()
        rounds.append(Round(directory, state, frame_elements))
        return rounds[-1]

    yield begin
    for each in rounds:
        each.spool.close()


def random_vectors(num_agents, num_elements):
    rng = np.random.default_rng(7)
    scales = 10.0 ** rng.integers(-20, 20, num_elements)
    return [(rng.standard_normal(num_elements) * scales).astype(np.float32) for _ in range(num_agents)]


def cancelling_vectors(num_pairs, num_elements):
    """Vectors whose sum is rounding alone: each has its negative among them, so another order of adding shows."""
    rng = np.random.default_rng(11)
    halves = [rng.standard_normal(num_elements).astype(np.float32) * 3**k for k in range(num_pairs)]
    return [*halves, np.full(num_elements, 1e-17, np.float32), *(-half for half in halves)]


def bits(vector):
    return vector.tobytes()


# What comes out.


def test_updates_are_averaged_by_their_numbers_of_examples(start):
    # (1 * 2 + 3 * 6) / 4 = 5;  (1 * -4 + 3 * 0) / 4 = -1;  (1 * 8 + 3 * 8) / 4 = 8
    ready = start([0, 0, 0]).receive("pi-1", [2, -4, 8], 1).receive("pi-2", [6, 0, 8], 3)
    assert ready.result().tolist() == [5, -1, 8]
    assert ready.aggregate().num_examples == 4


def test_uniform_weighting_ignores_the_numbers_of_examples(start):
    ready = start([0, 0]).receive("pi-1", [2, -4], 1).receive("pi-2", [6, 0], 3)
    assert ready.result(FedAvg(weighting="uniform")).tolist() == [4, -2]


def test_a_server_learning_rate_goes_part_of_the_way(start):
    # The means are 4 and -2: 2 + (4 - 2) / 2 = 3;  2 + (-2 - 2) / 2 = 0
    ready = start([2, 2]).receive("pi-1", [2, -4]).receive("pi-2", [6, 0])
    assert ready.result(FedAvg(server_learning_rate=0.5)).tolist() == [3, 0]


def test_the_norm_is_of_the_whole_step_over_all_blocks(start):
    # Deltas 2, -3, 0, 0, 6 in blocks of three: (4 + 9) + 36 = 49
    assert start([1, 1, 1, 1, 1]).receive("pi-1", [3, -2, 1, 1, 7]).aggregate().delta_norm == 7.0


def test_sums_are_float64(start):
    # 2^26 + 4 + 4 + 8 over 4 is 2^24 + 4. In float32, whose steps at 2^26 are 8, both 4s would be lost: 2^24 + 2.
    ready = start([0])
    for agent_num, value in enumerate((2**26, 4, 4, 8)):
        ready.receive(f"pi-{agent_num}", [value])
    assert ready.result().tolist() == [2**24 + 4]


def test_every_element_is_that_of_a_plain_loop(start):
    vectors = random_vectors(45, 7)
    ready = start([0] * 7, 3)
    for agent_num, vector in enumerate(vectors):
        ready.receive(f"pi-{agent_num:02d}", vector, num_examples=agent_num + 1)
    total = sum(range(1, 46))
    expected = []
    for element in range(7):
        mean = 0.0
        for agent_num, vector in enumerate(vectors):
            mean += (agent_num + 1) / total * float(vector[element])
        expected.append(mean)
    assert bits(ready.result()) == bits(np.array(expected).astype(np.float32))


def test_integer_buffers_take_the_largest_value_reported(start):
    state = {
        "bn.weight": np.array([1.0], np.float32),
        "bn.num_batches_tracked": np.array(5, np.int64),
        "bn.bias": np.array([3.0], np.float32),
        "frozen": np.array([True, False]),
    }
    ready = start(state).receive("pi-1", [2, 4], 1, (9, 0, 0)).receive("pi-2", [4, 4], 1, (7, 1, 0))
    with ready.models.open(ready.aggregate().digest) as model:
        after = model.state()
    assert after["bn.num_batches_tracked"] == 9
    assert after["bn.num_batches_tracked"].dtype == np.int64
    assert after["frozen"].tolist() == [True, False]
    assert after["bn.weight"].tolist() == [3]
    assert after["bn.bias"].tolist() == [4]


# Equalities that are exact.


AWKWARD = [1.0, -0.0, 0.0, 2.0**-30, 1e-45, 3.4028235e38, -1.17549435e-38, 0.1, 1 + 2**-23]


def test_one_agent_gives_exactly_its_own_bits(start):
    # In float32, 1 + (2^-30 - 1) would be 0: the difference is formed in float64, or not at all.
    ready = start([1.0, 1.0, -0.0, 1.0, 0.5, -3e38, 1.0, 1e30, 1.0], 4).receive("pi-1", AWKWARD, 600)
    assert bits(ready.result()) == bits(np.array(AWKWARD, np.float32))


def test_one_agent_gives_the_digest_of_its_state(start):
    ready = start({"w": np.zeros(3, np.float32), "n": np.array(0)}).receive("pi-1", [1, 2, 3], 5, (8,))
    assert ready.aggregate().digest == ready.models.save_state({"w": np.array([1, 2, 3], np.float32), "n": np.array(8)})


@pytest.mark.parametrize("num_agents", [1, 2, 3, 7, 41])
def test_agents_that_change_nothing_leave_the_model_as_it_is(start, num_agents):
    ready = start(AWKWARD, 4)
    for agent_num in range(num_agents):
        ready.receive(f"pi-{agent_num}", AWKWARD, 3 + 7 * agent_num)
    done = ready.aggregate()
    assert done.digest == ready.base_digest
    assert done.delta_norm == 0.0


def test_scaling_all_numbers_of_examples_changes_no_bit(start):
    digests = set()
    for factor in (1, 3, 10, 1000):
        ready = start([0] * 50, 16)
        for agent_num, vector in enumerate(random_vectors(5, 50)):
            ready.receive(f"pi-{agent_num}", vector, factor * (agent_num + 2))
        digests.add(ready.aggregate().digest)
    assert len(digests) == 1


def test_any_order_of_arrival_gives_the_same_bits(start):
    vectors = cancelling_vectors(2, 50)
    results = set()
    for order in list(itertools.permutations(range(5)))[::5]:
        ready = start([0] * 50, 16)
        for agent_num in order:
            ready.receive(f"pi-{agent_num}", vectors[agent_num])
        results.add(bits(ready.result()))
    assert len(results) == 1


def test_the_order_of_adding_would_show_if_it_were_another(start):
    # What the tests around this one rely on: with the agents' names dealt otherwise, the same vectors give other bits.
    vectors = cancelling_vectors(12, 1000)
    one, other = start([0] * 1000, 64), start([0] * 1000, 64)
    for agent_num, vector in enumerate(vectors):
        one.receive(f"pi-{agent_num:02d}", vector)
        other.receive(f"pi-{24 - agent_num:02d}", vector)
    assert bits(one.result()) != bits(other.result())


def big_round(start):
    ready = start([0] * 1000, 64)
    for agent_num, vector in enumerate(cancelling_vectors(12, 1000)):
        ready.receive(f"pi-{agent_num:02d}", vector)
    return ready


def test_any_number_of_threads_gives_the_same_model_and_norm(start):
    ready = big_round(start)
    assert len({ready.aggregate(num_threads=num_threads) for num_threads in (1, 2, 3, 7, 100)}) == 1


@pytest.mark.parametrize("name", ["_GROUP_ROWS", "_BLOCK_ELEMENTS"])
def test_the_size_of_a_group_or_block_changes_no_bit(start, monkeypatch, name):
    ready = big_round(start)
    before = ready.aggregate()
    for size in (1, 2, 24, 25, 64, 1000, 5000):
        monkeypatch.setattr(coordinator.aggregate, name, size)
        after = ready.aggregate(num_threads=2)
        assert after.digest == before.digest
        assert after.delta_norm == pytest.approx(before.delta_norm, rel=1e-15)


@pytest.mark.parametrize("frame_elements", [1, 2, 3, 7, 1000, 65_536])
def test_blocks_and_frames_need_not_match(start, monkeypatch, frame_elements):
    monkeypatch.setattr(coordinator.aggregate, "_BLOCK_ELEMENTS", 300)
    values = np.arange(1000, dtype=np.float32)
    ready = start(np.zeros(1000), frame_elements).receive("pi-1", values).receive("pi-2", values + 2)
    assert bits(ready.result(num_threads=2)) == bits(values + 1)


def test_models_larger_than_a_block_of_real_size_are_whole(start, monkeypatch):
    monkeypatch.undo()
    values = np.arange(150_000, dtype=np.float32)
    ready = start(np.zeros(150_000), 65_536).receive("pi-1", values).receive("pi-2", values + 2)
    assert bits(ready.result(num_threads=2)) == bits(values + 1)


def test_a_restart_gives_the_same_bits(start):
    ready = big_round(start)
    before = ready.aggregate()
    ready.spool.close()
    ready.spool = RoundSpool(ready.spool.path)
    assert ready.aggregate() == before


def test_giving_memory_back_in_between_changes_nothing(start, monkeypatch):
    ready = big_round(start)
    before = ready.aggregate()
    monkeypatch.setattr(coordinator.aggregate, "_RELEASE_BYTES", 0)
    monkeypatch.setattr(coordinator.spool, "_MAX_RESIDENT_EXTENTS", 0)
    assert ready.aggregate(num_threads=2) == before


def test_updates_that_are_not_counted_have_no_part(start):
    ready = start([0, 0]).receive("pi-1", [2, 2]).receive("pi-2", [float("nan"), 9])
    ready.updates.pop()
    assert ready.result().tolist() == [2, 2]


# What is refused. Nothing is stored then.


def refuses(ready, message, strategy=None):
    with pytest.raises(AggregationError, match=message):
        ready.aggregate(strategy)
    assert ready.models.digests() == {ready.base_digest}
    assert len(list(ready.models.path.iterdir())) == 1
    return True


def test_no_update_is_refused(start):
    assert refuses(start([0]), "no update is counted: expected at least one")


def test_no_weight_is_refused(start):
    assert refuses(start([0]).receive("pi-1", [1], 0).receive("pi-2", [1], 0), "2 updates weigh 0.0 in all")


def test_an_agent_that_counts_twice_is_refused(start):
    assert refuses(start([0]).receive("pi-1", [1]).receive("pi-1", [2]), "two updates of pi-1")


def test_an_incomplete_update_is_refused_and_the_frame_named(start):
    ready = start([0, 0, 0, 0])
    ready.receive_frame("pi-1", 0, np.ones(2, np.float32), bytes(8))
    ready.updates.append(CountedUpdate("pi-1", bytes(8), 1))
    assert refuses(ready, r"update 0{16} of pi-1: frame 1 has 0 elements in .*, expected 2")


def test_a_frame_of_another_length_is_refused(start):
    ready = start([0, 0])
    ready.receive_frame("pi-1", 0, np.ones(1, np.float32), bytes(8))
    ready.updates.append(CountedUpdate("pi-1", bytes(8), 1))
    assert refuses(ready, r"frame 0 has 1 elements in RoundSpool.*, expected 2")


def test_counters_of_another_number_are_refused(start):
    assert refuses(start([0]).receive("pi-1", [1], 1, (3,)), "update of pi-1 has 1 counters: the layout has 0")


def test_a_framing_of_another_model_is_refused(start):
    ready = start([0, 0]).receive("pi-1", [1, 1])
    ready.framing = Framing(3, 2)
    assert refuses(ready, "the model has 2 elements")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_result_that_is_not_finite_is_refused_and_its_place_named(start, value):
    ready = start([0, 0, 0, 0]).receive("pi-1", [1, 1, 1, value]).receive("pi-2", [1, 1, 1, 1])
    assert refuses(ready, "elements 3 to 4 of the next model are not all finite")


@pytest.mark.filterwarnings("error")
def test_a_step_that_overflows_is_refused_without_a_warning(start):
    ready = start([0]).receive("pi-1", [3e38])
    assert refuses(ready, "not all finite", FedAvg(server_learning_rate=10))


def test_a_failing_thread_fails_the_whole(start):
    ready = start([0] * 8)
    ready.receive("pi-1", [1] * 7 + [float("nan")])
    with pytest.raises(AggregationError, match="elements 6 to 8"):
        ready.aggregate(num_threads=3)
    assert ready.models.digests() == {ready.base_digest}


# The arithmetic of gates.


def test_the_sum_of_squares_of_a_delta_by_hand():
    # (3 - 1)^2 + (1 - 1)^2 + (-2 - 1)^2 = 13
    assert delta_sum_squares(np.array([3, 1, -2], np.float32), np.ones(3, np.float32)) == 13.0


def test_the_sum_of_squares_is_formed_in_float64():
    # 2^-30 - 1 is not -1, as it would be in float32.
    seen = delta_sum_squares(np.array([2.0**-30], np.float32), np.ones(1, np.float32))
    assert seen == (2.0**-30 - 1) ** 2 != 1.0


def test_the_largest_float32_values_do_not_overflow_the_sum_of_squares():
    largest = np.full(1000, np.finfo(np.float32).max)
    assert math.isfinite(delta_sum_squares(largest, -largest))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_element_that_is_not_finite_makes_the_sum_of_squares_so(value):
    local = np.zeros(1000, np.float32)
    local[999] = value
    assert not math.isfinite(delta_sum_squares(local, np.ones(1000, np.float32)))


@pytest.mark.filterwarnings("error")
def test_a_signalling_nan_from_a_peer_is_a_result_and_no_warning():
    local = np.array([0x7FA00000], np.uint32).view(np.float32)
    assert math.isnan(delta_sum_squares(local, np.ones(1, np.float32)))


def test_a_scratch_buffer_changes_nothing():
    local, global_ = random_vectors(2, 100)
    scratch = np.full(150, np.nan)
    assert delta_sum_squares(local, global_, scratch) == delta_sum_squares(local, global_)


def test_a_delta_of_different_lengths_is_our_bug():
    with pytest.raises(ValueError, match=r"local \(1,\) and global \(2,\)"):
        delta_sum_squares(np.ones(1, np.float32), np.ones(2, np.float32))


def test_a_state_that_was_trained_gives_the_update_that_a_coordinator_reads(start):
    state = {"a": np.array([[1, 2]], np.float32), "n": np.array(4), "b": np.array([0.5], np.float64)}
    trained = {"a": np.array([[3, 4]], np.float32), "n": np.array(6), "b": np.array([1.5], np.float64)}
    ready = start(state)
    vector, counters = state_to_vector(trained, ready.layout)
    ready.receive("pi-1", vector, 10, counters)
    with ready.models.open(ready.aggregate().digest) as model:
        after = model.state()
    assert {name: array.tolist() for name, array in after.items()} == {"a": [[3, 4]], "n": 6, "b": [1.5]}
    assert after["b"].dtype == np.float64
