"""What lies in a state directory beside what its database names: agents' models, leftovers, files of others. See verify.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.agent_models import DIRECTORY as AGENT_MODELS
from coordinator.disk import LEFTOVER
from coordinator.models import ModelError, ModelFile, is_abandoned
from coordinator.state_dir import LOCK, MODELS, SPOOL
from coordinator.store import DATABASE
from coordinator.upkeep.findings import Finding, Report
from coordinator.upkeep.verify_runs import DIGEST, RunRows
from midge.wire.identifiers import is_identifier

_OURS = {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal", LOCK, MODELS, SPOOL, AGENT_MODELS}


def strays(state_dir: Path, *, is_running: bool) -> Iterator[Finding]:
    """What does not belong there, and what a coordinator that died left behind."""
    for path in files_in(state_dir):
        if path.name == "service.json":
            if not is_running:
                text = "it says where a coordinator serves, and none is running"
                yield Finding("leftover", path.name, text, "the next coordinator replaces it", removable=True)
        elif path.name == LEFTOVER:
            if not is_running:
                text = "left by a coordinator that looked whether there was room"
                yield Finding("leftover", path.name, text, "--repair removes it", removable=True)
        elif path.name not in _OURS and not path.name.startswith("service."):
            yield Finding("note", path.name, "it is not a coordinator's; it is left alone")
    for path in files_in(state_dir / MODELS):
        where = f"{MODELS}/{path.name}"
        if _is_unfinished(path):
            yield from _unfinished(path, where, is_running=is_running)
        elif path.suffix != ".safetensors" or DIGEST.fullmatch(path.stem) is None:
            yield Finding("note", where, "it is not a model's file; it is left alone")
    for run_dir in files_in(state_dir / SPOOL):
        where = f"{SPOOL}/{run_dir.name}"
        if not run_dir.is_dir():
            yield Finding("note", where, "it is not a run's directory; it is left alone")
            continue
        for path in files_in(run_dir):
            if path.suffix != ".spool" or not path.stem.isdecimal():
                yield Finding("note", f"{where}/{path.name}", "it is no segment of the spool; it is left alone")


def check_agent_models(state_dir: Path, runs: Sequence[RunRows], report: Report) -> None:
    """Agents' models are kept because an operator asked for it, and no run needs them: none is ever removable."""
    known = {run.run_id for run in runs}
    for run_dir in files_in(state_dir / AGENT_MODELS):
        where = f"{AGENT_MODELS}/{run_dir.name}"
        if not run_dir.is_dir():
            report.findings.append(Finding("note", where, "it is not a run's directory; it is left alone"))
            continue
        if run_dir.name not in known:
            text = "agents' models of a run that the database does not know"
            report.findings.append(Finding("note", where, text, "they are left alone, and go when a run begins"))
        for path in files_in(run_dir):
            report.findings += _check_agent_model(path, f"{where}/{path.name}", report)


def _check_agent_model(path: Path, where: str, report: Report) -> Iterator[Finding]:
    agent_id, _, number = path.stem.rpartition(".")
    if _is_unfinished(path):
        yield from _unfinished(path, where, is_running=report.is_running)
    elif path.suffix == ".safetensors" and DIGEST.fullmatch(path.stem):
        if not report.is_running:  # a running one is about to give it its name
            text = "an agent's model that did not get its agent's name; it goes when another run begins"
            yield Finding("note", where, text, "it is left alone")
    elif path.suffix != ".safetensors" or not (is_identifier(agent_id) and number.isdecimal()):
        yield Finding("note", where, "it is not an agent's model; it is left alone")
    else:
        wrong = _wrong_with_file(path)
        if wrong is None:
            return
        report.agent_models += 1
        if wrong:
            cure = "delete the file: no run needs it, and the agent's next update replaces it"
            yield Finding("damage", where, wrong, cure)


def _wrong_with_file(path: Path) -> str | None:
    """What is wrong with an agent's model, as far as can be told without its digest; None where it is gone."""
    try:
        ModelFile(path, "").close()
    except FileNotFoundError:
        return None
    except ModelError as error:
        return str(error).removeprefix(f"{path} ")
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return ""


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


def _unfinished(path: Path, where: str, *, is_running: bool) -> Iterator[Finding]:
    if not is_running and is_abandoned(path):  # `coordinator models push` may be writing it
        text = "a model that was never finished"
        yield Finding("leftover", where, text, "the next coordinator removes it, or --repair", removable=True)


def files_in(directory: Path, pattern: str = "*") -> Iterator[Path]:
    """What is in a directory, in order; nothing where it is not there, or goes while we look."""
    try:
        yield from sorted(directory.glob(pattern))
    except OSError:
        return
