"""What a strategy remembers, through the real aggregation and store: the same bits whatever happens between rounds."""

import hashlib

import numpy as np
import pytest

import coordinator.aggregate
from coordinator import run_events as ev
from coordinator.aggregate import AggregationError, CountedUpdate, aggregate
from coordinator.models import ModelError, ModelStore
from coordinator.resume import resume
from coordinator.retention import Retention
from coordinator.spool import Spool
from coordinator.store import Store
from coordinator.strategies import FedAdam, FedAvg, FedAvgM, FedYogi, Step
from midge.tasks.flatten import layout_of
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, run_tag

ELEMENTS = 50
ROUNDS = 6


class Coordinator:
    """Its disk, and rounds of three made-up agents that each return something between the model and a place of their own."""

    def __init__(self, directory, strategy, state=None):
        self.directory = directory
        self.strategy = strategy
        self.store = Store(directory)
        self.models = ModelStore(directory / "models")
        self.spool = Spool(directory / "spool")
        self.run_id = self.store.latest("lab", "f")[0] or self.begin(state)
        self.retention = Retention(self.store, self.models, self.spool, 3)

    def begin(self, state):
        run_id = self.store.create_run(federation="lab", task="t", fingerprint="f", definition={}, rounds=ROUNDS)
        if state is None:
            state = {"w": np.random.default_rng(0).standard_normal(ELEMENTS).astype(np.float32)}
        digest = self.models.save_state(state)
        self.store.set_framing(run_id, 16, Framing(layout_of(state).num_elements, 16).num_frames)
        self.store.save(run_id, [ev.SaveVersion(0, digest, None)])
        return run_id

    def restart(self):
        """Killed, and started again on the same directory."""
        self.close()
        return Coordinator(self.directory, self.strategy)

    def close(self):
        self.spool.close()
        self.store.close()

    def aggregate(self, num_threads=1, max_step_ratio=0.0, scale=1.0):
        """One attempt at the next round, without a commit."""
        resumed = resume(self.store, self.models, self.run_id)
        version = resumed.version
        round_num = version.round_num + 1
        with self.models.open(version.digest) as base:
            counted = [
                self.receive(round_num, agent, np.array(base.elements), resumed.framing, scale) for agent in (1, 2, 3)
            ]
            made = aggregate(
                base,
                self.spool.round(self.run_id, round_num),
                counted,
                self.strategy,
                resumed.framing,
                self.models,
                num_threads,
                round_num=round_num,
                server_state=version.server_state,
                max_step_ratio=max_step_ratio,
            )
        return round_num, version, made

    def round(self, **how):
        round_num, version, made = self.aggregate(**how)
        save = ev.SaveVersion(round_num, made.digest, version.digest, server_state=made.server_state)
        self.store.save(self.run_id, [save])
        self.retention.committed(self.run_id, round_num, None)
        return made

    def receive(self, round_num, agent, model, framing, scale):
        place = np.random.default_rng([round_num, agent]).standard_normal(len(model))
        vector = (model + scale * 0.3 * (place - model)).astype(np.float32)
        digest = hashlib.sha256(vector.tobytes()).hexdigest()
        for index in range(framing.num_frames):
            start, stop = framing.span(index)
            frame = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag("run"),
                round_num=round_num,
                index=index,
                num_elements=stop - start,
                content_tag=content_tag(digest),
                body=encode_float32(vector[start:stop]),
            )
            self.spool.round(self.run_id, round_num).append(f"agent-{agent}", frame, bytes(32), 0.0)
        return CountedUpdate(f"agent-{agent}", content_tag(digest), agent)

    def versions(self):
        return [(row["digest"], row["server_state"]) for row in self.store.versions(self.run_id)]

    def elements(self, digest):
        with self.models.open(digest) as model:
            return np.array(model.elements)


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(strategy, name="one", state=None):
        (tmp_path / name).mkdir()
        started.append(Coordinator(tmp_path / name, strategy, state))
        return started[-1]

    yield begin
    for each in started:
        each.close()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even of small models, which end in the middle of frames."""
    monkeypatch.setattr(coordinator.aggregate, "_BLOCK_ELEMENTS", 7)


@pytest.mark.parametrize(
    "strategy", [FedAvgM(), FedAdam(), FedYogi(weighting="sum")], ids=lambda strategy: strategy.name
)
def test_restarts_and_attempts_that_came_to_nothing_change_no_bit(start, strategy):
    undisturbed = start(strategy)
    for _ in range(ROUNDS):
        undisturbed.round()
    disturbed = start(strategy, "other")
    for round_num in range(1, ROUNDS + 1):
        disturbed.aggregate()  # killed before it was recorded: the files are there, and nobody knows of them
        disturbed = disturbed.restart()
        disturbed.round(num_threads=1 + round_num % 3)
        disturbed = disturbed.restart()
    assert disturbed.versions() == undisturbed.versions()
    states = [state for _, state in undisturbed.versions()]
    assert states[0] is None
    assert len(set(states[1:])) == ROUNDS
    assert len(undisturbed.models.digests() & set(states[1:])) == 1
    disturbed.close()


def test_without_its_state_a_run_would_come_to_something_else(start):
    # What the test above relies on: to begin anew in each round shows.
    remembering, forgetting = start(FedAdam()), start(FedAdam(), "other")
    for coordinator_ in (remembering, forgetting):
        coordinator_.round()
    remembering.round()
    with forgetting.models.open(forgetting.versions()[1][0]) as base:
        framing = Framing(ELEMENTS, 16)
        counted = [forgetting.receive(2, agent, np.array(base.elements), framing, 1.0) for agent in (1, 2, 3)]
        spool = forgetting.spool.round(forgetting.run_id, 2)
        made = aggregate(base, spool, counted, FedAdam(), framing, forgetting.models)  # as if it were the first round
    assert made.digest != remembering.versions()[2][0]


def test_the_aggregation_is_what_the_strategy_does_to_whole_vectors(start):
    strategy = FedAdam()
    running = start(strategy)
    model = running.elements(running.versions()[0][0])
    state = [np.full(ELEMENTS, value, np.float32) for value in strategy.initial_state()]
    for round_num in range(1, ROUNDS + 1):
        places = [np.random.default_rng([round_num, agent]).standard_normal(ELEMENTS) for agent in (1, 2, 3)]
        vectors = [(model + 0.3 * (place - model)).astype(np.float32).astype(np.float64) for place in places]
        mean = (1 / 6 * vectors[0] + 2 / 6 * vectors[1]) + 3 / 6 * vectors[2]
        model = strategy.apply(model, mean, state, Step(round_num, 3, 6))
        made = running.round()
        assert running.elements(made.digest).tobytes() == model.tobytes()
        assert running.elements(made.server_state).tobytes() == b"".join(vector.tobytes() for vector in state)


def test_a_strategy_without_state_stores_none(start):
    running = start(FedAvg())
    assert running.round().server_state is None
    assert len(running.models.digests()) == 2


def test_a_version_without_the_state_that_the_strategy_keeps_is_refused(start):
    running = start(FedAvg())
    running.round()
    running.strategy = FedAvgM()
    with pytest.raises(
        AggregationError, match=r"version 1 has no server state, and strategy fedavgm keeps momentum \(50,\)"
    ):
        running.aggregate()
    assert len(running.models.digests()) == 2


def test_the_state_of_another_strategy_is_refused(start):
    running = start(FedAvgM())
    running.round()
    running.strategy = FedAdam()
    with pytest.raises(
        AggregationError, match=r"holds momentum .* strategy fedadam keeps first_moment .* and second_moment"
    ):
        running.aggregate()


def test_a_state_that_is_gone_is_an_error_that_names_it(start):
    running = start(FedAvgM())
    state = running.round().server_state
    running.models.delete(state)
    with pytest.raises(ModelError, match=state):
        running.aggregate()


def test_a_state_that_is_not_finite_is_refused_though_the_model_is(start):
    # (1e20)^2 is no float32: v would be infinite and every later step zero, without a word.
    running = start(FedAdam())
    with pytest.raises(AggregationError, match="of the server state are not all finite"):
        running.aggregate(scale=1e21)
    assert len(running.models.digests()) == 1


# The divergence guard.


def test_an_exploding_step_is_refused_and_the_last_good_model_kept(start):
    running = start(FedAvg(server_learning_rate=100))
    norm = float(np.linalg.norm(running.elements(running.versions()[0][0]).astype(np.float64)))
    with pytest.raises(
        AggregationError, match=r"the step has norm .*, the global model .*: .* times as much, and"
    ) as caught:
        running.aggregate(max_step_ratio=10)
    assert f"{norm:.3g}" in str(caught.value)
    assert "max_step_ratio is 10, after FedAvg(server_learning_rate=100" in str(caught.value)
    assert "on 3 updates: the model stays as it is; lower the server's or the agents' learning rate" in str(
        caught.value
    )
    assert len(running.models.digests()) == 1
    _, _, made = running.aggregate(max_step_ratio=0)
    assert made.delta_norm > 10 * norm
    _, _, again = running.aggregate(max_step_ratio=made.delta_norm / norm * (1 + 1e-12))
    assert again == made
    with pytest.raises(AggregationError):
        running.aggregate(max_step_ratio=made.delta_norm / norm * (1 - 1e-12))


@pytest.mark.parametrize("value", [0.0, 1e-5])
def test_a_model_that_is_all_but_zero_may_make_its_first_steps(start, value):
    # Its root mean square is below 0.001: it counts as 1, so steps of up to 10 an element are taken.
    running = start(FedAvg(server_learning_rate=10), state={"w": np.full(ELEMENTS, value, np.float32)})
    assert running.round(max_step_ratio=10).delta_norm > 1
    far = start(FedAvg(server_learning_rate=200), "far", {"w": np.full(ELEMENTS, value, np.float32)})
    with pytest.raises(AggregationError, match=r"and counts as 7\.07"):  # the root of 50
        far.aggregate(max_step_ratio=10)


def with_statistics(mean=0.0, var=1.0):
    rng = np.random.default_rng(0)
    return {
        "0.weight": rng.standard_normal(20).astype(np.float32),
        "1.weight": np.ones(3, np.float32),
        "1.running_mean": np.full(3, mean, np.float32),
        "1.running_var": np.full(3, var, np.float32),
        "2.weight": rng.standard_normal(21).astype(np.float32),
    }


def test_running_statistics_may_jump_and_are_averaged_by_strategies_that_optimise(start):
    # Three agents come 0.3 of the way to places near 0: statistics of 1e6 fall by 3e5, far beyond ten times the weights.
    state = with_statistics(mean=1e6, var=1e6)
    averaged = start(FedAvg(), state=state)
    plain = averaged.elements(averaged.round(max_step_ratio=10).digest)
    for name, strategy in (("adam", FedAdam()), ("momentum", FedAvgM())):
        running = start(strategy, name, state)
        for _ in range(2):
            made = running.round(max_step_ratio=10)
        first = running.elements(running.versions()[1][0])
        assert first[23:29].tobytes() == plain[23:29].tobytes()
        memory = running.elements(made.server_state).reshape(-1, 50)
        assert (memory[0, 23:29] == 0).all()
        assert (memory[0, :23] != 0).all()


def test_a_plain_average_steps_along_statistics_too(start):
    # G + lambda * sum(L - G) is over the whole state dictionary: 0.1 * 3 agents * mean delta.
    state = with_statistics(mean=8.0)
    running = start(FedAvg(weighting="sum", server_learning_rate=0.1), state=state)
    before = running.elements(running.versions()[0][0])
    after = running.elements(running.round().digest)
    places = [np.random.default_rng([1, agent]).standard_normal(50) for agent in (1, 2, 3)]
    locals_ = [(before + 0.3 * (place - before)).astype(np.float32).astype(np.float64) for place in places]
    expected = before + 0.1 * sum(local - before for local in locals_)
    np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-6)
