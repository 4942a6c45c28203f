from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from midge.tasks import registry
from midge.tasks.base import Task, TaskError
from midge.tasks.registry import find_task, task_names

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
    assert task_names() == ("digits", "thermostat")


def test_a_built_in_name_wins_over_an_entry_point(module, entry_point, monkeypatch):
    module("class Other(Counting): name = 'other'")
    entry_point("digits", "kept_tasks:Other")
    monkeypatch.setitem(registry._BUILT_IN, "digits", "kept_tasks:Counting")
    assert find_task("digits").name == "counting"
    assert task_names() == ("digits",)


def test_listing_names_imports_no_task(module, entry_point):
    module("raise SystemError('imported')")
    entry_point("thermostat", "kept_tasks:Counting")
    assert "thermostat" in task_names()
    assert "kept_tasks" not in sys.modules


def test_the_registry_and_partitions_import_no_torch():
    code = (
        "import sys; from midge.tasks import registry, partition; registry.task_names();"
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_makes_a_task_is_what_the_protocol_says():
    assert set(registry._MEMBERS) == {name for name in vars(Task) if not name.startswith("_")}


# What is not


def test_a_misspelt_name_is_met_with_the_nearest_and_with_all_that_are_known():
    assert error_of("digit") == (
        "task 'digit': not known. Did you mean 'digits'? Known are digits; yours is named as package.module:object."
    )


def test_a_dot_where_a_colon_belongs_is_seen():
    assert "Did you mean 'my_tasks.images:ImageTask'?" in error_of("my_tasks.images.ImageTask")


@pytest.mark.parametrize("reference", ["", " ", "x"])
def test_a_name_like_none_is_met_with_what_there_is(reference):
    assert error_of(reference).startswith(f"task {reference!r}: not known. Known are digits")


@pytest.mark.parametrize(
    "reference", [":", "a:", ":b", "a b:c", "a:b:c", "../a:b", "a..b:c", ".a:b", "a:b.", "a:b()", "a-b:c"]
)
def test_a_reference_that_is_none_is_refused_before_anything_is_imported(reference):
    assert (
        error_of(reference) == f"task {reference!r}: expected package.module:object, such as my_tasks.images:ImageTask"
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
