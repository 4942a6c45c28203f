"""The registry: from the name of a task, as an operator typed it, to the task.

A reference is one of

    digits                    a built-in task
    thermostat                an entry point of the group `midge.tasks`, of a package that is installed
    package.module:object     an object of any module that can be imported
    ./my_task.py:object       an object of a file, wherever it lies
    ./my_task.py              the one task in a file: what is called `task` there, or the only thing that is one

where the object is a task, or a class or a function that gives one when called with nothing. A built-in name wins over
an entry point of the same name. A task's module, and torch with it, is imported when the task is asked for, not before.
A file is imported as Python runs a program: what lies beside it can be imported by name.

**Importing is running.** What a reference names is imported, so a reference must come from the operator of this very
process: its command line or its configuration file. One that came in a message is compared with the operator's, as
text, and never given to `find_task`. Compared are names: `midge.wire.identifiers.task_name` leaves directories out.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

from midge.tasks.base import Task, TaskError
from midge.tasks.references import FILE, did_you_mean, existing_file, no_module, split, target

_MEMBERS = ("name", "initial_state", "load_data", "num_examples", "test_data", "train", "evaluate")
"""What makes an object a task; a test compares it with the protocol."""


def find_task(reference: str) -> Task:
    """The task that `reference` names. It must come from this process's operator, never from a peer.

    Raises:
        TaskError: there is none, its module cannot be imported, or the object is no task; says which, and what to do.
    """
    if match := FILE.fullmatch(reference):
        return _as_task(reference, _load_from_file(reference, Path(match[1]), match[2] or ""))
    return _as_task(reference, _load(reference, target(reference)))


def _load(reference: str, leads_to: str) -> object:
    """The object at `leads_to`; `reference` is what was asked for, and what errors speak of."""
    module_name, path = split(reference, leads_to)
    return _attribute(reference, _import(reference, module_name), path)


def _load_from_file(reference: str, path: Path, name: str) -> object:
    """The object called `name` in a file, or with no name the one task in it."""
    path = existing_file(reference, path)
    directory = str(path.parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)  # as Python does for a program; processes that a task starts get it, too
    importlib.invalidate_caches()  # the file may be new
    if _is_folder(sys.modules.get(path.stem), path.parent):
        del sys.modules[path.stem]  # pytest may have imported the directory flowers, where flowers.py lies
    module = _import(reference, path.stem)
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() != path:
        where = file or ("a directory of that name" if hasattr(module, "__path__") else "one of Python's own")
        raise TaskError(
            f"task {reference!r}: another module called {path.stem} is imported already, {where}: rename the file"
        )
    return _attribute(reference, module, name) if name else _only_task(reference, module)


def _is_folder(module: ModuleType | None, directory: Path) -> bool:
    """Whether it is this directory itself, imported without an `__init__.py`: no code is lost where it is forgotten."""
    return getattr(module, "__file__", None) is None and str(directory) in getattr(module, "__path__", ())


def _only_task(reference: str, module: ModuleType) -> object:
    """What is called `task`, or else the only task there is: an instance, or a class of the file's own without one."""
    if hasattr(module, "task"):
        return module.task
    named = {name: value for name, value in vars(module).items() if not name.startswith("_") and not _lacks(value)}
    instances = {name: value for name, value in named.items() if not isinstance(value, type)}
    classes = {
        name: value
        for name, value in named.items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not inspect.isabstract(value)
    }
    bases = {base for each in classes.values() for base in each.__mro__[1:]}
    bases.update(base for each in instances.values() for base in type(each).__mro__)
    found = instances | {name: value for name, value in classes.items() if value not in bases}
    names = sorted({id(value): name for name, value in found.items()}.values())  # one of each that has several
    if len(names) == 1:
        return found[names[0]]
    if not names:
        raise TaskError(
            f"task {reference!r}: nothing in it is a task. Make one, as `task = ...`; docs/tasks.md shows how"
        )
    raise TaskError(
        f"task {reference!r}: it holds {len(names)} tasks, {', '.join(names)}: name one, as {reference}:{names[0]}"
    )


def _attribute(reference: str, module: ModuleType, path: str) -> object:
    found: object = module
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            public = [name for name in dir(found) if not name.startswith("_")]
            hint = did_you_mean(attribute, public)
            raise TaskError(f"task {reference!r}: module {module.__name__} was imported and has no {path!r}.{hint}")
        found = getattr(found, attribute)
    return found


def _import(reference: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise TaskError(no_module(reference, module_name, missing)) from None
        remedy = "pip install 'midge[torch]'" if module_name.startswith("midge.") else "install what provides it"
        raise TaskError(f"task {reference!r}: it imports {missing!r}, which is not installed: {remedy}") from None
    except TaskError as error:
        raise TaskError(f"task {reference!r}: {error}") from None
    except Exception as error:  # a module may raise anything while it runs
        raise TaskError(f"task {reference!r}: importing {module_name} failed: {_described(error)}") from error


def _as_task(reference: str, found: object) -> Task:
    """`found` where it is a task; else what calling it gives."""
    if isinstance(found, type) or (callable(found) and _lacks(found)):
        try:
            found = found()
        except Exception as error:  # as above: it is somebody's code
            raise TaskError(f"task {reference!r}: calling it with no arguments failed: {_described(error)}") from error
    lacks = _lacks(found)
    if lacks:
        kind = f"is of type {type(found).__name__}, which is no task"
        raise TaskError(f"task {reference!r}: it {kind}: it lacks {', '.join(lacks)}. See midge.tasks.base.Task.")
    return cast("Task", found)


def _lacks(found: object) -> list[str]:
    return [member for member in _MEMBERS if not hasattr(found, member)]


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
