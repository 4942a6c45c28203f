"""`coordinator new`: write a small project that works, for its owner to change.

The templates are that project, under the name `my_project`, which is replaced wherever it stands.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.markup import escape

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_PLACEHOLDER = "my_project"
_RENAMED = {"gitignore": ".gitignore"}
"""A file that git would obey in our own tree."""

_errors = Console(stderr=True, highlight=False)


class ProjectError(Exception):
    """The project cannot be made; the message says why and what to do."""


def create(name: str, directory: Path | None) -> int:
    """`coordinator new`; returns its exit code."""
    target = Path(name) if directory is None else directory
    try:
        paths = write_project(name, target)
    except ProjectError as error:
        _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
        return 2
    _errors.print(
        f"made [bold]{escape(str(target))}[/]: {escape(', '.join(path.name for path in paths))}", soft_wrap=True
    )
    _errors.print(escape(f"next: cd {target} && python -m pytest; README.md says how to train"), soft_wrap=True)
    return 0


def write_project(name: str, directory: Path) -> list[Path]:
    """Write the project `name` into `directory`, which is made; returns its files.

    Raises:
        ProjectError: the name will not do, the directory holds something, or it cannot be written.
    """
    check_name(name)
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ProjectError(f"{directory} is there already: nothing was written; choose another --dir")
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for template, text in templates():
            paths.append(directory / template.replace(_PLACEHOLDER, name))
            paths[-1].write_text(text.replace(_PLACEHOLDER, name), encoding="utf-8")
    except OSError as error:
        raise ProjectError(f"{directory}: {error.strerror}; choose another --dir") from None
    return paths


def check_name(name: str) -> None:
    """Check that a federation and a module may have this name.

    Raises:
        ProjectError: they may not.
    """
    if not _NAME.fullmatch(name):
        likely = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_")[:40]
        hint = f"; did you mean {likely}?" if _NAME.fullmatch(likely) else ""
        raise ProjectError(f"name {name!r}: expected 1 to 40 of a-z, 0-9 and _, starting with a letter{hint}")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or _is_installed(name):
        raise ProjectError(
            f"name {name!r}: Python has a module or a word of that name; choose another, such as my_{name}"
        )


def templates() -> Iterator[tuple[str, str]]:
    """The project's files by name, in alphabetical order, with their text."""
    folder = resources.files("coordinator") / "templates" / "project"
    files = {_RENAMED.get(file.name, file.name): file for file in folder.iterdir() if file.is_file()}
    for name in sorted(files):
        yield name, files[name].read_text(encoding="utf-8")


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere directory of that name is no module
