"""What the terminal shows of the board: the words that a person looks for, within 80 columns, at any moment of a run."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.text import Text

from coordinator.board import AgentView, Board, Shared
from coordinator.display import Above, Display, Performance, render, sparkline
from coordinator.run_events import AcceptedUpdate
from midge import log
from midge.wire.messages import Evaluation


def board(**fields) -> Board:
    return Board(federation="lab", broker="mqtt://broker:1883", is_connected=True, **fields)


def committed(made: Board, *durations_s: float, accuracy: bool = True) -> Board:
    """Rounds 1, 2, ... that took so long; version r has accuracy r / 10 and loss 1 / (r + 1)."""
    for round_num, duration_s in enumerate((0.0, *durations_s)):
        view = made.round_view(round_num)
        view.duration_s = duration_s
        metrics = {"accuracy": round_num / 10} if accuracy else {}
        view.central = Evaluation(num_examples=10, loss=1 / (round_num + 1), metrics=metrics)
    return made


def shown(made: Board, title: str = "", captions: dict[str, str] | None = None, columns: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, width=columns, force_terminal=False, color_system=None)
    console.print(render(made, title, captions))
    text = file.getvalue()
    for line in text.splitlines():
        assert len(line) <= columns, line
    return text


def test_a_board_on_which_nothing_happened_can_be_drawn():
    text = shown(board())
    assert "0/0" in text
    assert "no evaluation yet" in text
    assert "no run" in text


def test_a_run_shows_its_rounds_scores_agents_and_what_it_waits_for():
    made = committed(board(rounds=10, status="round 3 of 10: 1 of 2 reported"), 2.0, 1.0)
    made.best_round, made.best_value = 2, 0.2
    made.agents["pi-1"] = AgentView("pi-1", activity="training", fraction=0.5)
    made.agents["pi-2"] = AgentView("pi-2", activity="refused", detail="hours: this agent trains only at night")
    text = shown(made, "Midge", {"pi-1": "owns 1,2,3"})
    assert text.startswith("Midge\n")
    for word in ("2/10", "about 8 s left", "accuracy 20.0%", "loss 0.3333", "best 0.2000 in round 2"):
        assert word in text
    (first,) = [line for line in text.splitlines() if line.startswith("pi-1")]
    assert first.split()[:4] == ["pi-1", "owns", "1,2,3", "training"]
    (second,) = [line for line in text.splitlines() if line.startswith("pi-2")]
    assert "refused" in second
    assert "hours: this agent" in second
    assert "round 3 of 10: 1 of 2 reported" in text


@pytest.mark.parametrize(
    ("durations_s", "rounds", "expected"),
    [
        ((), 10, ""),
        ((3.0,), 10, "at most 27 s left"),  # the first round says little: agents start their trainers in it
        ((30.0, 2.0), 10, "about 16 s left"),
        ((30.0, 1.0, 2.0, 9.0), 10, "about 12 s left"),  # the median of 1, 2 and 9, for six rounds
        ((30.0, 100.0, 100.0, 1.0, 1.0, 1.0, 1.0, 1.0), 10, "about 2 s left"),  # of the latest five
        ((60.0, 60.0), 10, "about 8 min left"),
        ((1.0, 1.0), 2, ""),
    ],
)
def test_the_time_left_is_told_from_the_latest_rounds(durations_s, rounds, expected):
    text = shown(committed(board(rounds=rounds), *durations_s))
    assert ("left" in text) == bool(expected)
    assert expected in text


def test_without_an_accuracy_the_loss_is_shown_alone():
    text = shown(committed(board(rounds=3), 1.0, accuracy=False))
    assert "loss 0.5000" in text
    assert "accuracy" not in text


def test_where_nothing_was_evaluated_centrally_the_agents_own_score_is_shown():
    made = board(rounds=3)
    made.round_view(1).federated = Evaluation(num_examples=3, loss=0.125, metrics={"accuracy": 0.5})
    assert "accuracy 50.0%" in shown(made)


def test_a_lost_broker_is_shown_with_its_reason():
    made = board()
    made.is_connected, made.broker_problem = False, "connection refused: is a broker running there?"
    assert "broker mqtt://broker:1883: connection refused: is a broker running there?" in shown(made, columns=100)
    made.broker_problem = ""
    assert "broker" not in shown(made)


def test_the_latest_event_is_shown():
    made = board()
    made.add_event("round 1, attempt 1 abandoned: too few updates")
    made.add_event("round 1, attempt 2 abandoned: too few updates")
    text = shown(made)
    assert "attempt 2 abandoned" in text
    assert "attempt 1" not in text


def test_of_many_agents_the_first_by_number_are_shown_and_the_others_counted():
    made = board()
    for number in range(40, 0, -1):
        made.agents[f"pi-{number}"] = AgentView(f"pi-{number}")
    lines = shown(made).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("pi-")] == [f"pi-{number}" for number in range(1, 13)]
    assert any(line.startswith("and 28 more") for line in lines)


@pytest.mark.parametrize(
    ("activity", "word"),
    [
        ("accepted", "done"),
        ("fetching", "at work"),
        ("idle", "waiting"),
        ("lost", "lost"),
        ("never seen", "never seen"),
    ],
)
def test_what_an_agent_does_is_told_in_plain_words(activity, word):
    made = board()
    made.agents["a"] = AgentView("a", activity=activity)
    (line,) = [line for line in shown(made).splitlines() if line.startswith("a ")]
    assert line.split("  ")[1].strip().startswith(word) or word in line


def test_whatever_an_agent_says_is_text_and_no_markup():
    made = board()
    made.agents["a"] = AgentView("a", activity="refused", detail="[/red] [bold]the sensor[/] \x1b[31m broke")
    text = shown(made, captions={"a": "[link=x]y[/link]"})
    assert "[/red]" in text
    assert "[link=x]y[/link]" in text


def test_long_names_and_texts_do_not_break_a_narrow_terminal():
    made = committed(board(rounds=10, status="waiting " * 40), *([1.0] * 40))
    made.agents["x" * 64] = AgentView("x" * 64, activity="training", detail="y" * 500)
    made.add_event("round 1 abandoned " * 30)
    shown(made, "t" * 300, columns=40)


def test_bars_go_from_the_least_to_the_greatest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3]) == "▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(number) for number in range(100)])) == 24
    assert sparkline([float(number) for number in range(100)])[-1] == "█"


def test_a_live_view_draws_what_is_below_it_and_leaves_the_last_state():
    shared = Shared(committed(board(rounds=3), 1.0))
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with Display(shared, console, "Midge", below=lambda: Text("press Ctrl-C to stop")):
        shared.board.status = "done: 3 rounds"
    text = file.getvalue()
    assert "press Ctrl-C to stop" in text
    assert text.rindex("done: 3 rounds") > text.index("Midge")


# By agent and round.


def reported(made: Board, agent_id: str, round_num: int, accuracy: float | None = None, loss: float = 0.5) -> None:
    """An update: how the version before did on the agent's data, and a training loss of a quarter of that loss."""
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    evaluation = Evaluation(num_examples=10, loss=loss, metrics=metrics)
    made.add_update(
        round_num, AcceptedUpdate(agent_id, 1, "", 10, (), 1.0, metrics={"loss": loss / 4}, evaluation=evaluation)
    )


def rows(made: Board, columns: int = 100) -> dict[str, list[str]]:
    """The cells of the table by the first one."""
    file = io.StringIO()
    Console(file=file, width=columns, force_terminal=False, color_system=None).print(Performance(made))
    lines = [line for line in file.getvalue().splitlines() if line.strip() and "─" not in line]
    assert all(len(line) <= columns for line in lines)
    split = [[cell for cell in line.strip().split("  ") if cell] for line in lines]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in split}


def test_before_an_agent_has_reported_there_is_no_table():
    assert rows(board()) == {}


def test_a_narrow_terminal_shows_fewer_rounds_and_no_name_cut_short():
    made = committed(board(rounds=30), *[1.0] * 12)
    for number in range(1, 12):
        reported(made, "demo-agent-1", number, 0.5)
    wide, narrow = rows(made, columns=120), rows(made, columns=60)
    assert len(narrow["demo-agent-1"]) < len(wide["demo-agent-1"])
    assert narrow["demo-agent-1"][-1] == "0.1250"
    assert narrow["on the data of"][-1] == "training loss"


def test_a_log_line_longer_than_the_terminal_comes_whole_above_a_live_view():
    file = io.StringIO()
    console = Console(file=file, width=40, force_terminal=True, color_system=None)
    line = "13:11:40 WARN  evaluation failed  " + "reason " * 20
    with Display(Shared(board()), console, "Midge"):
        log.setup(stream=Above(console))
        logging.getLogger("coordinator").warning(line)
    assert line.strip() in file.getvalue()


def test_each_agents_scores_stand_under_the_version_that_they_are_of():
    made = committed(board(rounds=10), 1.0)  # versions 0 and 1, of accuracy 0.0 and 0.1
    made.round_view(0).federated = Evaluation(num_examples=20, loss=1.0, metrics={"accuracy": 0.25})
    reported(made, "pi-1", 1, accuracy=0.2)
    reported(made, "pi-2", 1, accuracy=0.3)
    reported(made, "pi-2", 2, accuracy=0.4, loss=0.2)  # in round 2 it scores version 1
    assert rows(made) == {
        "accuracy of the global model after round": [],
        "on the data of": ["0", "1", "training loss"],
        "the test set": ["0.0%", "10.0%"],
        "all agents": ["25.0%"],
        "pi-1": ["20.0%", "0.1250"],
        "pi-2": ["30.0%", "40.0%", "0.0500"],
    }


def test_where_an_agent_tells_no_accuracy_losses_are_compared():
    made = board(rounds=10)
    reported(made, "pi-1", 1, accuracy=0.2)
    reported(made, "pi-2", 1)
    seen = rows(made)
    assert "loss of the global model after round" in seen
    assert seen["pi-1"] == seen["pi-2"] == ["0.5000", "0.1250"]


def test_only_the_last_rounds_and_the_first_agents_are_in_the_table():
    made = board(rounds=99)
    for number in range(20):
        for round_num in range(1, 31):
            reported(made, f"pi-{number}", round_num, accuracy=0.5)
    seen = rows(made)
    assert seen["on the data of"] == [*map(str, range(22, 30)), "training loss"]
    assert [name for name in seen if name.startswith("pi-")] == [f"pi-{number}" for number in range(12)]
    assert "and 8 more" in seen
