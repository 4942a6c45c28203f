"""`edge-agent data`: what it shows, draws and exits with. Its task has no torch, and there is no broker anywhere."""

from __future__ import annotations

import importlib.util
import json
import struct

import pytest

from edge_agent.cli import main
from edge_agent.data_picture import picture
from midge.tasks.summary import DataSummary, LabelCount

LABELLED = ["--task", "tests.unit.tiny_tasks:labelled", "--agent-id", "pi-1"]
IID = ["--partition", "iid", "--of", "3"]


@pytest.fixture
def data(capsys, monkeypatch):
    """Call the command within this process, in a terminal of 60 columns; its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "60")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["data", *arguments], prog_name="edge-agent")
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def test_an_agent_s_labels_are_a_bar_chart_as_wide_as_the_terminal(data):
    code, output, errors = data(*LABELLED, "--classes", "1", "--def-prob", "0.1")
    assert code == 0
    lines = output.splitlines()
    assert lines[0] == "pi-1, task tests.unit.tiny_tasks:labelled: 24 examples of shape (3,)"
    # 60 columns: 3 of names, 2 of counts, two gaps of 2: 51 for 20 examples, so 5.1 for 2, which is 41 eighths.
    assert lines[2:5] == ["cat   2  █████▏", f"dog  20  {'█' * 51}", "cow   2  █████▏"]
    assert lines[6] == "test data: 6 examples of shape (3,), for the coordinator alone"
    assert errors == "loading\n"  # what a task prints is none of the result


def test_with_a_partition_and_no_index_every_part_is_in_a_table(data):
    code, output, _ = data(*LABELLED, "--partition", "contiguous", "--of", "3")
    assert code == 0
    assert output.splitlines()[:7] == [
        "tests.unit.tiny_tasks:labelled, contiguous over 3 agents, seed 0",
        "",
        "part  examples  cat  dog  cow",
        "   0        20    7    7    6",
        "   1        20    7    6    7",
        "   2        20    6    7    7",
        " all        60   20   20   20",
    ]


@pytest.mark.parametrize("index", ["0", "2"])
def test_with_an_index_that_part_alone_is_shown_the_first_too(data, index, monkeypatch):
    for given in (["--index", index], ["--set", f"index={index}"]):
        code, output, _ = data(*LABELLED, *IID, *given)
        assert code == 0
        title = f"pi-1, task tests.unit.tiny_tasks:labelled, part {index} of iid over 3 agents, seed 0: 20 examples"
        assert output.startswith(title)
    monkeypatch.setenv("MIDGE_INDEX", index)
    assert data(*LABELLED, *IID)[1].startswith(title)


def test_json_has_the_same_numbers(data):
    code, output, _ = data(*LABELLED, "--partition", "contiguous", "--of", "2", "--index", "1", "--json")
    assert code == 0
    assert json.loads(output) == {
        "task": "tests.unit.tiny_tasks:labelled",
        "partition": "contiguous",
        "num_parts": 2,
        "data_seed": 0,
        "parts": [
            {
                "part": 1,
                "summary": {
                    "num_examples": 30,
                    "input_shape": [3],
                    "labels": [{"label": label, "count": 10, "name": name} for label, name in enumerate(("cat", "dog", "cow"))],
                },
                "problem": "",
            }
        ],
        "test": {
            "num_examples": 6,
            "input_shape": [3],
            "labels": [{"label": label, "count": 2, "name": name} for label, name in enumerate(("cat", "dog", "cow"))],
        },
        "test_problem": "",
    }  # fmt: skip


def test_one_label_alone_is_warned_of(data):
    code, output, _ = data(*LABELLED, "--classes", "2")
    assert code == 0
    assert "all have one label: training here teaches no other; look at --data-dir, --classes and --partition" in output


def test_of_a_task_without_labels_the_number_of_examples_is_said(data):
    code, output, _ = data("--task", "tests.unit.tiny_tasks:tiny", "--agent-id", "pi-1")
    assert code == 0
    assert output.splitlines() == [
        "pi-1, task tests.unit.tiny_tasks:tiny: 1 example",
        "the labels of these data cannot be read",
        "",
        "test data: 4 examples, for the coordinator alone",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task", "tests.unit.tiny_tasks:dataless", "--data-dir", "/x"], 1, "edge-agent: no examples in /x: put some"),
        (["--task", "tests.unit.tiny_tasks:clumsy"], 1, "edge-agent: loading the data failed: KeyError: 'label'"),
        (["--task", "tests.unit.tiny_tasks:unfed"], 1, "edge-agent: task unfed: no examples; look at what load_data"),
        ([*LABELLED, "--partition", "shards:90", "--of", "4"], 1, "edge-agent: 360 shards of 60 examples: expected 1 to 60"),
        ([*LABELLED, "--of", "4"], 1, "edge-agent: part 0 of 4, but no partition: say how to deal"),
        (["--task", "nope"], 2, "edge-agent: task 'nope': not known."),
        ([*LABELLED, *IID, "--index", "3"], 2, "edge-agent: --index: index is 3, and of is 3: expected 0 to 2"),
        ([*LABELLED, "--set", "clases=1"], 2, "unknown setting clases: did you mean classes?"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_said_once_and_the_exit_code_tells(data, arguments, code, message):
    seen, output, errors = data(*arguments)
    assert seen == code
    assert output == ""
    assert message in errors
    assert errors.count("edge-agent: ") == 1


def test_a_problem_is_in_the_json_too(data):
    code, output, _ = data("--task", "tests.unit.tiny_tasks:dataless", "--json")
    assert code == 1
    (part,) = json.loads(output)["parts"]
    assert part == {"part": 0, "summary": None, "problem": "no examples in None: put some there"}


# The picture.


def test_a_plot_is_a_small_png(data, tmp_path):
    for name, arguments in (("all", IID), ("one", [*IID, "--index", "1"])):
        path = tmp_path / f"{name}.png"
        code, output, errors = data(*LABELLED, *arguments, "--plot", str(path))
        assert code == 0
        assert errors.endswith(f"edge-agent: wrote {path}\n")
        assert output
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", content[16:20]) == (800,)
        assert len(content) < 60_000


def test_without_matplotlib_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code, output, errors = data(*LABELLED, "--plot", str(tmp_path / "x.png"))
    assert (code, output) == (2, "")
    assert errors == "edge-agent: --plot needs matplotlib, which is not installed: pip install matplotlib\n"


def test_a_plot_that_cannot_be_made_is_said(data, tmp_path):
    path = tmp_path / "missing" / "x.png"
    code, _, errors = data(*LABELLED, "--plot", str(path))
    assert code == 1
    assert errors.endswith(f"edge-agent: --plot {path}: No such file or directory\n")
    code, _, errors = data("--task", "tests.unit.tiny_tasks:tiny", "--plot", str(tmp_path / "x.png"))
    assert code == 1
    assert "the labels of task tests.unit.tiny_tasks:tiny cannot be read, so there is nothing to draw" in errors
    assert list(tmp_path.iterdir()) == []


def summary(**counts: int) -> DataSummary:
    labels = tuple(LabelCount("abc".index(name), count, name) for name, count in counts.items())
    return DataSummary(num_examples=sum(counts.values()), labels=labels)


def written_in(axes) -> list[tuple[float, float, str]]:
    return [(*text.get_position(), text.get_text()) for text in axes.texts]


def test_a_heat_map_has_each_count_in_its_cell_and_each_sum_as_a_bar():
    figure = picture("by hand", [(0, summary(a=7, b=1)), (1, summary(b=2, c=30))])
    heat, totals = figure.axes
    assert written_in(heat) == [(0, 0, "7"), (1, 0, "1"), (1, 1, "2"), (2, 1, "30")]
    assert [bar.get_width() for bar in totals.patches] == [8, 32]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in figure.texts] == [
        "by hand",
        "40 examples: 8 to 32 an agent, with 2 of 3 labels, 30 where it is darkest",
    ]


def test_a_single_part_is_a_bar_chart():
    figure = picture("one", [(4, summary(a=7, c=3))])
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [7, 3]
    assert figure.texts[1].get_text() == "10 examples with 2 labels"


def test_where_counts_do_not_fit_colours_alone_tell():
    many = DataSummary(num_examples=100, labels=tuple(LabelCount(label, 1) for label in range(100)))
    figure = picture("many", [(0, many), (1, many)])
    assert list(figure.axes[0].texts) == []
