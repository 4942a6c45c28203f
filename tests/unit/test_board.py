"""The board: bounded, whatever happens, and a copy of it is no part of it."""

from __future__ import annotations

import threading

import msgspec

from coordinator.board import (
    AGENT_ROUNDS,
    HISTORY,
    SCORED_AGENTS,
    AgentRound,
    AgentView,
    Board,
    RoundView,
    Shared,
    from_snapshot,
)
from coordinator.cohort import AgentState
from coordinator.run_events import AcceptedUpdate
from midge.wire.messages import Evaluation

CENTRAL = Evaluation(num_examples=10, loss=0.5, metrics={"accuracy": 0.75})
FEDERATED = Evaluation(num_examples=99, loss=0.25)


def board() -> Board:
    return Board(federation="lab", broker="mqtt://broker:1883")


def test_only_the_latest_events_are_kept():
    made = board()
    for number in range(1000):
        made.add_event(f"event {number}")
    assert made.events == [f"event {number}" for number in range(950, 1000)]


def test_only_the_latest_rounds_are_kept_in_order():
    made = board()
    for round_num in range(HISTORY + 5):
        assert made.round_view(round_num).round_num == round_num
    assert list(made.history) == list(range(5, HISTORY + 5))
    assert len(made.history) == HISTORY


def test_the_view_of_a_round_is_made_once():
    made = board()
    made.round_view(3).num_updates = 7
    assert made.round_view(3).num_updates == 7
    assert list(made.history) == [3]


def test_a_rounds_score_is_the_central_one_where_there_is_one():
    assert RoundView(1).score is None
    assert RoundView(1, federated=FEDERATED).score == FEDERATED
    assert RoundView(1, central=CENTRAL, federated=FEDERATED).score == CENTRAL


def update(agent_id: str, **fields) -> AcceptedUpdate:
    return AcceptedUpdate(agent_id, 1, "", 10, (), 0.5, 2.0, **fields)


def test_what_an_update_says_of_its_agent_is_kept_by_round():
    made = board()
    made.add_update(3, update("a", metrics={"loss": 0.125, "a task's own": 1.0}, evaluation=FEDERATED))
    made.add_update(4, update("a"))
    assert made.agent_rounds == {
        "a": {3: AgentRound(3, 10, 0.5, 2.0, 0.125, FEDERATED), 4: AgentRound(4, 10, 0.5, 2.0)}
    }


def test_only_the_latest_rounds_of_the_first_agents_are_kept():
    made = board()
    for number in range(SCORED_AGENTS + 5):
        for round_num in range(1, AGENT_ROUNDS + 4):
            made.add_update(round_num, update(f"a-{number}"))
    assert list(made.agent_rounds) == [f"a-{number}" for number in range(SCORED_AGENTS)]
    assert all(list(rounds) == list(range(4, AGENT_ROUNDS + 4)) for rounds in made.agent_rounds.values())


def test_a_board_comes_back_from_its_snapshot():
    shared = Shared(board())
    shared.board.agents["a"] = AgentView("a", presence=AgentState.ONLINE)
    shared.board.round_view(0).central = CENTRAL
    shared.board.add_update(1, update("a", evaluation=FEDERATED))
    assert from_snapshot(msgspec.json.decode(msgspec.json.encode(shared.snapshot()))) == shared.board


def test_two_boards_share_nothing():
    one, other = board(), board()
    one.add_event("x")
    one.round_view(1)
    one.agents["a"] = AgentView("a")
    assert (other.events, other.history, other.agents) == ([], {}, {})


def test_an_agent_that_was_not_heard_is_not_said_to_be_here():
    assert AgentView("a").presence == AgentState.SILENT


def test_a_snapshot_is_of_jsons_types_and_stays_as_it_was():
    shared = Shared(board())
    shared.board.agents["a"] = AgentView("a", presence=AgentState.ONLINE)
    shared.board.round_view(0).central = CENTRAL
    snapshot = shared.snapshot()
    shared.board.agents["b"] = AgentView("b")
    shared.board.round_view(1)
    shared.board.add_event("x")
    assert [agent["agent_id"] for agent in snapshot["agents"]] == ["a"]
    assert [view["round_num"] for view in snapshot["history"]] == [0]
    assert snapshot["events"] == []
    assert type(snapshot["agents"][0]["presence"]) is str
    assert msgspec.json.decode(msgspec.json.encode(snapshot)) == snapshot


def test_a_snapshot_waits_until_the_writer_has_finished():
    shared = Shared(board())
    taken: list[dict] = []
    with shared.lock:
        shared.board.run_id = "half"
        reader = threading.Thread(target=lambda: taken.append(shared.snapshot()))
        reader.start()
        reader.join(0.02)
        assert taken == []
        shared.board.run_id = "whole"
    reader.join(10)
    assert taken[0]["run_id"] == "whole"
