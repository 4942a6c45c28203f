"""The arrows between the parts, and who may know of what: read off the imports, so that no review has to.

coordinator -> midge        edge_agent -> midge        midge/tasks, midge/transport -> midge/wire
never: coordinator <-> edge_agent, midge -> either, midge/wire -> anything else of ours
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("midge", "coordinator", "edge_agent")
FILES = sorted(path.relative_to(ROOT) for package in OURS for path in (ROOT / package).rglob("*.py"))
FILES = [path for path in FILES if "templates" not in path.parts]  # what `coordinator new` writes is its owner's

ALLOWED = {
    "coordinator": ("coordinator", "midge"),
    "edge_agent": ("edge_agent", "midge"),
    "midge.wire": ("midge.wire",),
    "midge.transport": ("midge.transport", "midge.wire", "midge.eventqueue", "midge.log"),
    "midge.tasks": ("midge.tasks", "midge.wire"),
    "midge.settings": ("midge.settings", "midge.wire"),
    "midge": ("midge.wire",),
}
"""What each part may import of ours. Settings, and files right in midge/ (logs, the queue), serve all others."""

ONCE_PER_PROCESS = ("paho", "sqlalchemy", "prometheus_client", "click")
ONE_PLACE = ("coordinator/store",)
"""A folder that hides a library as one file would: all that is asked of the database fills several."""
RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""What can run code that came as data."""

PURE = [
    *(f"coordinator/{name}.py" for name in ("round", "attempt", "run", "scoring", "uplink", "cohort", "admission")),
    *(f"edge_agent/{name}.py" for name in ("agent", "pull", "push")),
]
IMPURE = {"os", "time", "socket", "threading", "pathlib", "logging", "numpy", "datetime", "secrets", "asyncio", "io"}


class Import(NamedTuple):
    """One name that a file imports, with its line."""

    module: str
    line: int


def name_of(path: Path) -> str:
    """The module that a file is."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


@cache
def imports_of(path: Path) -> list[Import]:
    """Every import of a file, also within functions and under TYPE_CHECKING; `from x import y` is x.y if that is a module."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import: name the package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [Import(name if name in MODULES else str(node.module), node.lineno) for name in names]
    return found


def importers(library: str, paths: list[Path]) -> set[str]:
    """The files that import a library."""
    return {str(path) for path in paths if any(found.module.split(".")[0] == library for found in imports_of(path))}


def places(files: set[str]) -> set[str]:
    """Where these are: a folder that is one place for its library stands for its files."""
    return {next((folder for folder in ONE_PLACE if Path(name).is_relative_to(folder)), name) for name in files}


def part_of(path: Path) -> str:
    """The part of the house that a file is in."""
    return next(part for part in ALLOWED if f"{name_of(path)}.".startswith(f"{part}."))


def within(module: str, part: str) -> bool:
    return f"{module}.".startswith(f"{part}.")


def test_the_walk_sees_the_whole_house():
    assert {part_of(path) for path in FILES} == set(ALLOWED)
    assert len(FILES) > 40
    assert Import("midge.wire.errors", 7) in imports_of(Path("midge/wire/identifiers.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_along_the_arrows(path):
    allowed = ALLOWED[part_of(path)]
    for module, line in imports_of(path):
        if module.split(".")[0] in OURS:
            # `midge` itself holds two constants, and a file right in midge/ may use another such.
            flat = part_of(path) == "midge" and module.count(".") == 1 and MODULES[module].name != "__init__.py"
            assert module == "midge" or flat or any(within(module, part) for part in allowed), (
                f"{path}:{line} imports {module}; {part_of(path)} may import {', '.join(allowed)}"
            )


@pytest.mark.parametrize("process", ["coordinator", "edge_agent"])
@pytest.mark.parametrize("library", ONCE_PER_PROCESS)
def test_one_file_of_a_process_imports_a_library_that_could_be_another_one(process, library):
    found = places(importers(library, [path for path in FILES if path.parts[0] in ("midge", process)]))
    assert len(found) <= 1, f"{library} is imported by {', '.join(sorted(found))}: one file may know of it"


def test_one_file_imports_the_mqtt_client():
    found = importers("paho", FILES)
    assert len(found) == 1, found
    assert found <= {"midge/transport/mqtt.py", "midge/transport/link.py"}


def test_one_folder_imports_the_database_library():
    assert places(importers("sqlalchemy", FILES)) == {"coordinator/store"}


def test_one_file_imports_the_compiler():
    assert importers("numba", FILES) == {"coordinator/kernel.py"}


@pytest.mark.parametrize("library", ["torch", "torchvision", "sklearn"])
def test_only_tasks_know_of_torch_and_of_data_sets(library):
    assert {name for name in importers(library, FILES) if not name.startswith("midge/tasks/")} == set()


@pytest.mark.fault(22)
@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_imported_that_could_run_code_out_of_data(path):
    found = {module.split(".")[0] for module, _ in imports_of(path)} & RUNS_CODE
    assert found == set(), f"{path} imports {found}"


@pytest.mark.fault(22)
@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_calls_what_could_run_code_out_of_data(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "__import__", "torch.load"}, f"{path}:{node.lineno} calls {called}"
            pickles = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("allow_pickle")
            expected = "False" if called in {"np.load", "numpy.load"} else None
            assert pickles == expected, (
                f"{path}:{node.lineno}: {called} with allow_pickle={pickles}: expected {expected}"
            )


def closure_of(path: Path) -> set[Path]:
    """A file and all of ours that it imports, directly or not."""
    seen, queue = {path}, [path]
    while queue:
        for module, _ in imports_of(queue.pop()):
            if module in MODULES and MODULES[module] not in seen:
                seen.add(MODULES[module])
                queue.append(MODULES[module])
    return seen


@pytest.mark.parametrize("name", PURE)
def test_a_machine_knows_neither_clock_nor_disk_nor_network_nor_tensor(name):
    for path in sorted(closure_of(Path(name))):
        for module, line in imports_of(path):
            assert module.split(".")[0] not in IMPURE, f"{name} must stay pure, and {path}:{line} imports {module}"


@pytest.mark.parametrize("name", PURE)
def test_a_machine_takes_its_chances_from_a_generator_that_it_was_given(name):
    for node in ast.walk(tree_of(Path(name))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{name}:{node.lineno} uses random.{node.attr}: global, so not to be repeated"
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert {alias.name for alias in node.names} <= {"Random"}, f"{name}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "random.Random", f"{name}:{node.lineno} makes its own generator"
