"""What `coordinator verify`, `backup` and `runs forget` do, once their options are read. Each returns its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape

from coordinator.state_dir import InUseError
from coordinator.store import StoreError, StoreWriteError
from coordinator.upkeep.backup import BackupError, WrongTargetError
from coordinator.upkeep.backup import backup as back_up
from coordinator.upkeep.findings import Report
from coordinator.upkeep.forget import UnknownRunError
from coordinator.upkeep.forget import forget as forget_run
from coordinator.upkeep.verify import WrongDirectoryError
from coordinator.upkeep.verify import repair as repair_directory
from coordinator.upkeep.verify import verify as verify_directory

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)
_STYLES = {"damage": "bold red", "leftover": "yellow", "note": "dim"}


def verify(state_dir: Path, *, as_json: bool, repair: bool) -> int:
    """`coordinator verify`: 0 where nothing is damaged, 1 where something is, 2 for wrong use."""
    try:
        report = repair_directory(state_dir) if repair else verify_directory(state_dir)
    except InUseError:
        return _wrong(f"{state_dir}: a coordinator is running in it; stop it, then repair")
    except WrongDirectoryError as error:
        return _wrong(error)
    except OSError as error:
        return _wrong(f"{error.filename or state_dir}: {error.strerror or error}")
    if as_json:
        content = {**msgspec.to_builtins(report), "is_sound": report.is_sound}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n")
    else:
        _show(report)
    return 0 if report.is_sound else 1


def backup(state_dir: Path, to: Path, *, as_json: bool) -> int:
    """`coordinator backup`: 0 where it is made, 1 where it cannot be, 2 for wrong use."""
    try:
        made = back_up(state_dir, to)
    except (WrongTargetError, StoreError) as error:
        _wrong(error)
        return 1 if isinstance(error, StoreWriteError) else 2
    except BackupError as error:
        _wrong(error)
        return 1
    except OSError as error:
        _wrong(f"{error.filename or to}: {error.strerror or error}")
        return 1
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(made), indent=2).decode() + "\n")
        return 0
    content = [
        _counted(made.runs, "run"),
        _counted(made.models, "model"),
        _counted(made.updates, "accepted update"),
        *([_counted(made.agent_models, "model") + " of agents"] if made.agent_models else []),
    ]
    _console.print(escape(f"{made.path}: {', '.join(content)}, {made.size_bytes / 1e6:.1f} MB"), soft_wrap=True)
    for run_id, round_num in made.standing.items():
        _console.print(f"run {run_id} as it was in round {round_num + 1}", soft_wrap=True)
    return 0


def forget(state_dir: Path, run_id: str, *, as_json: bool) -> int:
    """`coordinator runs forget`: 0 where it is gone, 1 where the disk does not let it go, 2 for wrong use."""
    try:
        gone = forget_run(state_dir, run_id)
    except InUseError:
        return _wrong(f"{state_dir}: a coordinator is running in it; stop it, then forget the run")
    except (UnknownRunError, StoreError) as error:
        _wrong(error)
        return 1 if isinstance(error, StoreWriteError) else 2
    except OSError as error:
        _wrong(f"{error.filename or state_dir}: {error.strerror or error}; see what `coordinator verify` says")
        return 1
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(gone), indent=2).decode() + "\n")
        return 0
    kept = "1 model stays, since other runs or base models need it"
    if gone.shared > 1:
        kept = f"{gone.shared} models stay, since other runs or base models need them"
    shared = f"; {kept}" if gone.shared else ""
    content = f"{_counted(gone.versions, 'version')}, {_counted(gone.models, 'model')}, {gone.size_bytes / 1e6:.1f} MB"
    _console.print(escape(f"forgot {gone.run_id}: {content}{shared}"), soft_wrap=True)
    return 0


def _show(report: Report) -> None:
    for where in report.removed:
        _console.print(escape(f"removed   {where}"), soft_wrap=True)
    for finding in report.findings:
        cure = f"; {finding.cure}" if finding.cure else ""
        style = _STYLES[finding.severity]
        text = escape(f"{finding.where}: {finding.what}{cure}")
        _console.print(f"[{style}]{finding.severity:9}[/] {text}", soft_wrap=True)
    checked = [
        _counted(report.runs, "run"),
        _counted(report.versions, "version"),
        f"{_counted(report.models, 'model')} ({report.model_bytes / 1e6:.1f} MB)",
        f"{_counted(report.updates, 'accepted update')} of rounds under way",
        *([_counted(report.agent_models, "model") + " of agents"] if report.agent_models else []),
    ]
    running = ", beside a running coordinator" if report.is_running else ""
    verdict = "[green]sound[/]" if report.is_sound else "[bold red]damaged[/]"
    _console.print(f"{verdict}: {escape(report.state_dir)}: checked {', '.join(checked)}{running}", soft_wrap=True)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _wrong(error: object) -> int:
    _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
    return 2
