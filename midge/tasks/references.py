"""References to tasks, as an operator types them: what they may look like, and whether they could lead to a task.

registry.py says what they look like, and follows them. Here nothing is imported that a reference names, and no NumPy: so a
process that must never hold torch can tell its operator of a slip before it does anything else.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from midge.tasks.errors import TaskError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "midge.tasks"
BUILT_IN = {
    "digits": "midge.tasks.digits:DigitsTask",
    "mnist": "midge.tasks.mnist:MnistTask",
    "fashion-mnist": "midge.tasks.mnist:FashionMnistTask",
    "emnist": "midge.tasks.mnist:EmnistTask",
    "cifar10": "midge.tasks.cifar10:Cifar10Task",
}
FILE = re.compile(r"(.+\.py)(?::(.+))?")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_BINDS_OTHERWISE = ("import *", "__getattr__", "globals(", "exec(", "sys.modules", "global ")
"""A module whose text has one of these may hold names that cannot be read off it."""


def task_names() -> tuple[str, ...]:
    """The names that need no module: built-in tasks and entry points, in alphabetical order. Imports none of them."""
    return tuple(sorted({*BUILT_IN, *_entry_points()}))


def check_reference(reference: str) -> None:
    """Look, by names and files alone, whether `reference` could name a task: for processes that import none.

    A module is looked for where a child process of this one would find it, and no package is run on the way. So what passes may
    still turn out to be no task.

    Raises:
        TaskError: it cannot; says which part, and what to do.
    """
    _place_of(reference)


def check_source(reference: str) -> None:
    """Look, as `check_reference`, and then into the text of the module: whether it is Python, and has that name.

    Raises:
        TaskError: it cannot name a task; says which part, and what to do.
    """
    path, name = _place_of(reference)
    if path is None or path.suffix != ".py":
        return
    bound = _names_in(reference, path)
    first = name.partition(".")[0]
    if name and bound is not None and first not in bound:
        public = [each for each in bound if not each.startswith("_")]
        raise TaskError(f"task {reference!r}: {path} has no {first!r}.{did_you_mean(first, public)}")


def target(reference: str) -> str:
    """The `package.module:object` that a reference to no file leads to.

    Raises:
        TaskError: it is a name, and there is none such.
    """
    if ":" in reference:
        return reference
    if reference in BUILT_IN:
        return BUILT_IN[reference]
    points = _entry_points()
    if reference in points:
        return points[reference].value
    raise TaskError(_unknown(reference))


def split(reference: str, target: str) -> tuple[str, str]:
    """The module and the object that `target` names; `reference` is what was asked for, and what errors speak of."""
    if not _REFERENCE.fullmatch(target):
        leads = "" if target == reference else f" leads to {target!r}"
        raise TaskError(
            f"task {reference!r}{leads}: expected package.module:object, such as my_tasks.images:ImageTask, or a "
            "file, such as ./my_task.py"
        )
    module_name, _, path = target.partition(":")
    return module_name, path


def existing_file(reference: str, path: Path) -> Path:
    """The file, if it is there and can be a module."""
    path = path.expanduser().resolve()
    if not path.is_file():
        hint = did_you_mean(path.name, [each.name for each in path.parent.glob("*.py")])
        raise TaskError(
            f"task {reference!r}: there is no file {path}. A path is relative to the directory that the program was started "
            f"in.{hint}"
        )
    if "." in path.stem:
        raise TaskError(f"task {reference!r}: no module can have the name {path.stem!r}: rename the file")
    return path


def no_module(reference: str, module_name: str, missing: str, known: Iterable[str] = ()) -> str:
    """That no module `missing` is found, on the way to `module_name`; `known` are those that are beside it."""
    hint = did_you_mean(missing, known)
    file = Path(module_name.replace(".", "/") + ".py")
    if file.is_file():
        hint = f" Did you mean the file, './{file}'?"
    return (
        f"task {reference!r}: no module {missing!r} is found. Install it into this environment, or name its "
        f"directory in PYTHONPATH.{hint}"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of what is known, as a question; empty where none is near."""
    import difflib  # noqa: PLC0415  only where something is wrong

    nearest = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _place_of(reference: str) -> tuple[Path | None, str]:
    """The file that a reference leads to, None where there is none to read, and the name that is wanted of it."""
    if match := FILE.fullmatch(reference):
        return existing_file(reference, Path(match[1])), match[2] or ""
    module_name, name = split(reference, target(reference))
    spec = _spec_of(reference, module_name)
    return (Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None), name


def _spec_of(reference: str, module_name: str) -> ModuleSpec | None:
    """Where the module is; None where that cannot be told without running a package.

    Raises:
        TaskError: it is nowhere.
    """
    first, *rest = module_name.split(".")
    try:
        # An editable installation may have hooked itself in: only then has anybody but the path finder to be asked.
        spec = PathFinder.find_spec(first, [str(Path.cwd()), *sys.path]) or importlib.util.find_spec(first)
    except ValueError:  # it is imported already, and has no specification
        return None
    if spec is None:
        raise TaskError(no_module(reference, module_name, first))
    name = first
    for part in rest:
        parent, name = name, f"{name}.{part}"
        places = list(spec.submodule_search_locations or ())
        # By its own name alone: with the package's, a directory without __init__.py would have to be imported first.
        found = PathFinder.find_spec(part, places)
        if found is None:
            raise TaskError(no_module(reference, module_name, name, _modules_in(parent, places)))
        spec = found
    return spec


def _modules_in(package: str, places: list[str]) -> list[str]:
    import pkgutil  # noqa: PLC0415  only where something is wrong

    return [f"{package}.{found.name}" for found in pkgutil.iter_modules(places)]


def _names_in(reference: str, path: Path) -> set[str] | None:
    """The names that a module's text binds; None where they cannot all be read off it.

    Raises:
        TaskError: it is no Python.
    """
    import symtable  # noqa: PLC0415  agents at rest do without

    try:
        text = path.read_text(encoding="utf-8")
        table = symtable.symtable(text, str(path), "exec")
    except SyntaxError as error:
        raise TaskError(f"task {reference!r}: {path}, line {error.lineno}: {error.msg}") from None
    except (OSError, ValueError):  # another encoding, say: it is for the import to judge
        return None
    if any(word in text for word in _BINDS_OTHERWISE):
        return None
    bound = {each.get_name() for each in table.get_symbols() if each.is_assigned() or each.is_imported()}
    beside = {each.stem for each in path.parent.iterdir()} if path.name == "__init__.py" else set()
    return bound | beside


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # noqa: PLC0415  a built-in task needs none of it

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _unknown(reference: str) -> str:
    known = task_names()
    hint = did_you_mean(reference, known)
    module, dot, name = reference.rpartition(".")
    if dot and not hint:
        hint = f" Did you mean '{module}:{name}'?"
    return (
        f"task {reference!r}: not known.{hint} Known are {', '.join(known)}; yours is named as package.module:object, or by "
        "its file, as ./my_task.py."
    )
