from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from midge.tasks import references, registry
from midge.tasks.base import Task, TaskError
from midge.tasks.references import check_reference, check_source, task_names
from midge.tasks.registry import find_task

ROOT = Path(__file__).parents[2]

A_TASK = """
class Counting:
    name = "counting"

    def initial_state(self, seed): return {}
    def load_data(self, spec): return [1]
    def num_examples(self, data): return len(data)
    def test_data(self): return None
    def train(self, state, data, spec, progress): ...
    def evaluate(self, state, data): ...
"""

BUILT_IN = ("cifar10", "digits", "emnist", "fashion-mnist", "mnist")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that can be imported by the name `kept_tasks` for as long as the test runs."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code, name="kept_tasks"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(A_TASK) + textwrap.dedent(code))

    yield write
    for name in [name for name in sys.modules if name.startswith("kept_")]:
        del sys.modules[name]


@pytest.fixture
def entry_point(tmp_path):
    """Install a distribution with one entry point."""

    def install(name, value):
        info = tmp_path / f"kept_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kept-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[midge.tasks]\n{name} = {value}\n")

    return install


def error_of(reference):
    with pytest.raises(TaskError) as caught:
        find_task(reference)
    return str(caught.value)


# What is found


def test_an_instance_a_class_a_function_and_a_nested_name_all_give_the_task(module):
    module("""
        instance = Counting()
        def make(): return Counting()
        class Outer:
            task = Counting()
    """)
    for path in ("instance", "Counting", "make", "Outer.task"):
        task = find_task(f"kept_tasks:{path}")
        assert task.name == "counting"
        assert task.num_examples([1, 2]) == 2


def test_an_instance_that_can_be_called_is_taken_as_it_is(module):
    module("""
        class Callable(Counting):
            def __call__(self): raise AssertionError("called")
        task = Callable()
    """)
    assert find_task("kept_tasks:task").name == "counting"


def test_an_entry_point_is_found_by_its_name_and_listed(module, entry_point):
    module("")
    entry_point("thermostat", "kept_tasks:Counting")
    assert find_task("thermostat").name == "counting"
    assert task_names() == (*BUILT_IN, "thermostat")


def test_a_built_in_name_wins_over_an_entry_point(module, entry_point, monkeypatch):
    module("class Other(Counting): name = 'other'")
    entry_point("digits", "kept_tasks:Other")
    monkeypatch.setitem(references.BUILT_IN, "digits", "kept_tasks:Counting")
    assert find_task("digits").name == "counting"
    assert task_names() == BUILT_IN


def test_listing_names_imports_no_task(module, entry_point):
    module("raise SystemError('imported')")
    entry_point("thermostat", "kept_tasks:Counting")
    assert "thermostat" in task_names()
    assert "kept_tasks" not in sys.modules


def test_the_registry_and_partitions_import_no_torch():
    code = (
        "import sys; from midge.tasks import references, registry, partition; references.task_names();"
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_makes_a_task_is_what_the_protocol_says():
    assert set(registry._MEMBERS) == {name for name in vars(Task) if not name.startswith("_")}


# Files


@pytest.fixture
def task_file(module, tmp_path, monkeypatch):
    """Write a file with a task; the reference to it is relative to a directory that Python knows nothing of."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def write(code, name="kept_file", header=A_TASK):
        path = tmp_path / "apart" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(header) + textwrap.dedent(code))
        return f"../apart/{name}.py"

    yield write
    while str(tmp_path / "apart") in sys.path:
        sys.path.remove(str(tmp_path / "apart"))


@pytest.mark.parametrize(
    "code",
    [
        "",
        "class Better(Counting): pass",
        "mine = Counting()",
        "class Better(Counting): pass\nmine = Better()\n_other = Counting()",
        "mine = also = Counting()",
        "task = Counting()\nother = Counting()",
        "class Other(Counting): pass\ndef task(): return Counting()",
        "import abc\nclass Half(Counting, abc.ABC):\n    @abc.abstractmethod\n    def rest(self): ...\nCounting = Counting",
    ],
    ids=["a class", "a subclass", "an instance", "of a subclass", "two names", "task", "a function", "an abstract one"],
)
def test_the_one_task_of_a_file_is_found_without_its_name(task_file, code):
    assert find_task(task_file(code)).name == "counting"


def test_a_file_imports_what_lies_beside_it_and_tasks_from_there_are_not_its_own(task_file):
    task_file("", name="kept_sibling")
    reference = task_file("from kept_sibling import Counting\nclass Mine(Counting): name = 'mine'", header="")
    assert find_task(reference).name == "mine"


def test_an_object_of_a_file_is_found_by_its_name_from_any_directory(task_file, tmp_path):
    reference = task_file("a, b = Counting(), Counting()\nb.name = 'second'")
    for path in (reference, str(tmp_path / "apart" / "kept_file.py")):
        assert find_task(f"{path}:b").name == "second"


def test_a_file_s_name_need_be_no_identifier(task_file):
    assert find_task(task_file("", name="kept-2")).name == "counting"


def test_a_file_with_several_tasks_or_with_none_is_told_what_to_do(task_file):
    reference = task_file("a, b = Counting(), Counting()")
    assert error_of(reference) == f"task {reference!r}: it holds 2 tasks, a, b: name one, as {reference}:a"
    reference = task_file("from pathlib import Path", name="kept_empty", header="")
    assert error_of(reference).startswith(f"task {reference!r}: nothing in it is a task. Make one, as `task = ...`")


def test_a_file_that_is_not_there_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"there is no file {tmp_path}/kept_none.py" in error_of("./kept_none.py:task")


@pytest.mark.parametrize("name", ["types", "kept.dotted"])
def test_a_file_with_a_name_that_cannot_be_imported_is_to_be_renamed(task_file, name):
    assert "rename the file" in error_of(task_file("", name=name))


def test_a_file_may_be_called_as_its_directory_though_that_was_imported(tmp_path, monkeypatch):
    directory = tmp_path / "kept_garden"
    directory.mkdir()
    (directory / "kept_garden.py").write_text(textwrap.dedent(A_TASK))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.import_module("kept_garden").__file__ is None  # as pytest --import-mode=importlib does
    try:
        assert find_task(str(directory / "kept_garden.py")).name == "counting"
    finally:
        del sys.modules["kept_garden"]
        sys.path.remove(str(directory))


def test_a_file_called_as_another_imported_module_is_told_where_that_is(task_file, tmp_path, monkeypatch):
    (tmp_path / "kept_spread").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("kept_spread")
    reference = task_file("", name="kept_spread")
    words = "another module called {} is imported already, {}: rename the file"
    assert words.format("kept_spread", "a directory of that name") in error_of(reference)
    assert words.format("types", importlib.import_module("types").__file__) in error_of(task_file("", name="types"))
    assert words.format("time", "one of Python's own") in error_of(task_file("", name="time"))


def test_a_file_that_fails_says_what_it_raised(task_file):
    assert "importing kept_file failed: ZeroDivisionError: division by zero" in error_of(task_file("1 / 0"))


def test_a_module_that_is_not_found_but_lies_here_as_a_file_is_met_with_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept_here.py").write_text("")
    assert "Did you mean the file, './kept_here.py'?" in error_of("kept_here:task")


# Names alone


@pytest.mark.parametrize("reference", ["digits", "kept_tasks:Counting", "tests.unit.tiny_tasks:tiny", "xml.dom:Node"])
def test_a_reference_that_could_be_a_task_passes_and_imports_nothing(module, reference):
    module("1 / 0")
    check_reference(reference)
    assert "kept_tasks" not in sys.modules


def test_a_file_and_an_entry_point_pass_without_being_run(module, entry_point, tmp_path, monkeypatch):
    module("1 / 0")
    entry_point("kept", "kept_tasks:Counting")
    monkeypatch.chdir(tmp_path)
    check_reference("./kept_tasks.py:Counting")
    check_reference("kept")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    check_reference("kept_tasks:Counting")  # a child process is started with the directory that this one is in


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("digist", "not known. Did you mean 'digits'?"),
        ("kept_none.py", "there is no file "),
        ("kept_taks.py", "Did you mean 'kept_tasks.py'?"),
        ("kept_none.module:task", "no module 'kept_none' is found"),
        ("kept_tasks.inner:task", "no module 'kept_tasks.inner' is found"),
        ("midge.tasks.digist:Task", "no module 'midge.tasks.digist' is found"),
        ("midge.tasks.digist:Task", "Did you mean 'midge.tasks.digits'?"),
        ("midge.taks.digits:Task", "Did you mean 'midge.tasks'?"),
        ("a b:c", "expected package.module:object"),
    ],
)
def test_what_no_task_can_be_called_is_refused_by_its_name(module, tmp_path, monkeypatch, reference, said):
    module("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError) as caught:
        check_reference(reference)
    assert said in str(caught.value)


def test_a_package_is_looked_into_without_being_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("kept_whole", "kept_loose", "kept_loose/inner"):
        (tmp_path / name).mkdir()
    for name in ("kept_whole/__init__.py", "kept_whole/deep.py", "kept_loose/deep.py", "kept_loose/inner/deep.py"):
        (tmp_path / name).write_text("1 / 0")
    for found in ("kept_whole.deep:x", "kept_whole:x", "kept_loose.deep:x", "kept_loose.inner.deep:x"):
        check_reference(found)
    for missing in ("kept_whole.deap", "kept_loose.deap", "kept_loose.inner.deap", "kept_whole.deep.inner"):
        with pytest.raises(TaskError, match=f"no module '{missing}' is found"):
            check_reference(f"{missing}:x")
    assert not [name for name in sys.modules if name.startswith("kept_")]


def test_a_name_is_looked_for_in_the_text_of_its_module(module, tmp_path, monkeypatch):
    module("""
        from typing import Any as kept_any
        if True:
            task = made, other = 1, Counting()
        1 / 0
    """)
    monkeypatch.chdir(tmp_path)
    for name in ("Counting", "task", "made", "other", "kept_any", "Counting.inner"):
        check_source(f"kept_tasks:{name}")
        check_source(f"./kept_tasks.py:{name}")
    check_source("./kept_tasks.py")
    for reference in ("kept_tasks:Countin", "./kept_tasks.py:Countin"):
        with pytest.raises(TaskError, match=r"kept_tasks\.py has no 'Countin'\. Did you mean 'Counting'\?"):
            check_source(reference)
    for name in ("evaluate", "str"):  # a class's own, and Python's
        with pytest.raises(TaskError, match=f"has no '{name}'"):
            check_source(f"kept_tasks:{name}")


@pytest.mark.parametrize(
    "code",
    [
        "from os.path import *",
        "def __getattr__(name): return Counting()",
        "globals()['made'] = Counting()",
        "def make():\n    global made\n    made = Counting()\nmake()",
    ],
)
def test_a_name_that_cannot_be_read_off_the_text_is_left_to_the_import(module, code):
    module("")
    (Path(sys.path[0]) / "kept_tasks.py").write_text(f"{textwrap.dedent(A_TASK)}\n{code}\n")
    check_source("kept_tasks:made")


def test_what_is_no_python_is_refused_with_its_line(module):
    module("")
    (Path(sys.path[0]) / "kept_tasks.py").write_text("import os\nclass Counting(:\n")
    with pytest.raises(TaskError, match=r"kept_tasks\.py, line 2: invalid syntax"):
        check_source("kept_tasks:Counting")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_task_is_where_its_name_leads(name):
    check_source(name)


def test_what_is_beside_a_package_s_own_names_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept_package").mkdir()
    (tmp_path / "kept_package" / "__init__.py").write_text("")
    (tmp_path / "kept_package" / "task.py").write_text("")
    check_source("kept_package:task.Task")
    with pytest.raises(TaskError, match="has no 'Other'"):
        check_source("kept_package:Other")


# What is not


def test_a_misspelt_name_is_met_with_the_nearest_and_with_all_that_are_known():
    assert error_of("digit") == (
        f"task 'digit': not known. Did you mean 'digits'? Known are {', '.join(BUILT_IN)}; yours is named as "
        "package.module:object, or by its file, as ./my_task.py."
    )


def test_a_dot_where_a_colon_belongs_is_seen():
    assert "Did you mean 'my_tasks.images:ImageTask'?" in error_of("my_tasks.images.ImageTask")


@pytest.mark.parametrize("reference", ["", " ", "x"])
def test_a_name_like_none_is_met_with_what_there_is(reference):
    assert error_of(reference).startswith(f"task {reference!r}: not known. Known are {BUILT_IN[0]}, ")


@pytest.mark.parametrize(
    "reference", [":", "a:", ":b", "a b:c", "a:b:c", "../a:b", "a..b:c", ".a:b", "a:b.", "a:b()", "a-b:c"]
)
def test_a_reference_that_is_none_is_refused_before_anything_is_imported(reference):
    assert error_of(reference) == (
        f"task {reference!r}: expected package.module:object, such as my_tasks.images:ImageTask, or a file, such as "
        "./my_task.py"
    )


@pytest.mark.parametrize("name", ["kept_nowhere", "kept_nowhere.inner"])
def test_a_module_that_is_not_there_is_named_with_what_to_do(name):
    assert error_of(f"{name}:Task") == (
        f"task '{name}:Task': no module 'kept_nowhere' is found. Install it into this environment, or name its directory in "
        "PYTHONPATH."
    )


def test_a_module_that_another_module_lacks_is_told_from_the_task_s_own(module):
    module("import kept_missing_dependency")
    message = "it imports 'kept_missing_dependency', which is not installed: install what provides it"
    assert message in error_of("kept_tasks:Counting")


def test_a_built_in_without_torch_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "midge.tasks.digits", raising=False)
    monkeypatch.delitem(sys.modules, "midge.tasks.torch_task", raising=False)
    assert error_of("digits") == "task 'digits': it imports 'torch', which is not installed: pip install 'midge[torch]'"


def test_a_module_that_raises_is_reported_with_what_it_raised(module):
    module("1 / 0")
    assert error_of("kept_tasks:Counting") == (
        "task 'kept_tasks:Counting': importing kept_tasks failed: ZeroDivisionError: division by zero"
    )


def test_a_module_whose_task_cannot_be_made_says_why_in_the_task_s_own_words(module):
    module("from midge.tasks.base import TaskError\nraise TaskError('train(net): expected a loader')")
    assert error_of("kept_tasks:Counting") == "task 'kept_tasks:Counting': train(net): expected a loader"


def test_a_misspelt_object_is_met_with_the_nearest(module):
    module("")
    assert error_of("kept_tasks:Countin") == (
        "task 'kept_tasks:Countin': module kept_tasks was imported and has no 'Countin'. Did you mean 'Counting'?"
    )


def test_a_class_that_needs_arguments_is_reported_with_what_it_raised(module):
    module("""
        class Needy(Counting):
            def __init__(self, path): ...
    """)
    assert "calling it with no arguments failed: TypeError: " in error_of("kept_tasks:Needy")


def test_an_object_that_is_no_task_is_told_what_it_lacks(module):
    module("""
        numbers = [1]
        class Half:
            name = "half"
            def train(self): ...
    """)
    assert "it is of type list, which is no task: it lacks name, initial_state" in error_of("kept_tasks:numbers")
    assert "it lacks initial_state, load_data, num_examples, test_data, evaluate." in error_of("kept_tasks:Half")


def test_an_entry_point_that_leads_nowhere_is_reported_by_its_name(entry_point, module):
    entry_point("thermostat", "kept_gone:Task")
    entry_point("barometer", "kept_gone")
    assert error_of("thermostat").startswith("task 'thermostat': no module 'kept_gone' is found.")
    assert error_of("barometer").startswith("task 'barometer' leads to 'kept_gone': expected package.module:object")
