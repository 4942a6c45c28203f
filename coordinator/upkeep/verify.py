"""`coordinator verify`: walks a state directory, checks every digest and invariant, and says what is wrong and what helps.

It only looks, so it works beside a running coordinator too. Then what it sees may move under it: a model is deleted between a
look at the database and a look at the disk, a record is half written. So it looks again, and reports what is wrong each time:
damage stays, what moves does not. Each look reads the database at one moment, and then the files.

findings.py says what can be wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from coordinator.models import ModelError, verify_file
from coordinator.run_events import AcceptedUpdate
from coordinator.state_dir import LOCK, MODELS, SPOOL, is_in_use, lock
from coordinator.store import DATABASE, Store, StoreError
from coordinator.upkeep.findings import RESTORE, Finding, Report
from coordinator.upkeep.spool_scan import Scan, SeenFrame, scan
from coordinator.upkeep.strays import check_agent_models, files_in, strays
from coordinator.upkeep.verify_runs import DIGEST, Rows, RunRows, broken, rows_of
from midge.wire.frames import Framing, content_tag, update_digest
from midge.wire.layout import Layout

_MOST_LOOKS = 4
_PAUSE_S = 0.25


class WrongDirectoryError(Exception):
    """There is nothing of a coordinator's there; the message says what to do."""


def verify(state_dir: Path) -> Report:
    """Check a state directory, and change nothing.

    Raises:
        WrongDirectoryError: it is no coordinator's.
    """
    verifier = Verifier(state_dir)
    report = verifier.look(is_running=is_in_use(state_dir))
    for number in range(1, _MOST_LOOKS):
        is_running = is_in_use(state_dir)
        # Without a coordinator, too, somebody may just be giving a base model its name, or taking it back.
        may_move = number == 1 and any(finding.where.startswith(MODELS) for finding in report.findings)
        if not report.findings or not (report.is_running or is_running or may_move):
            break
        time.sleep(_PAUSE_S)
        seen = {(finding.severity, finding.where) for finding in report.findings}
        report = verifier.look(is_running=is_running)
        report.findings = [finding for finding in report.findings if (finding.severity, finding.where) in seen]
    return report


def repair(state_dir: Path) -> Report:
    """Remove what nobody needs, while no coordinator can start; the report is of what is left.

    Raises:
        WrongDirectoryError: it is no coordinator's.
        InUseError: a coordinator is running in it.
        OSError: something cannot be removed.
    """
    fd = lock(state_dir) if (state_dir / LOCK).exists() else -1
    try:
        findings = Verifier(state_dir).look(is_running=False).findings
        removed = _remove(state_dir, [finding.where for finding in findings if finding.removable])
        report = Verifier(state_dir).look(is_running=False)
    finally:
        if fd >= 0:
            os.close(fd)
    report.removed = removed
    return report


def _remove(state_dir: Path, wheres: list[str]) -> list[str]:
    """Remove these files but those that became base models meanwhile; returns which."""
    if not wheres:
        return []
    removed = []
    with (
        closing(Store(state_dir)) as store,
        store.snapshot(alone=True),
    ):  # nobody gives a model a name before this is done
        named = {f"{MODELS}/{row['digest']}.safetensors" for row in store.base_models()}
        for where in wheres:
            if where not in named:
                (state_dir / where).unlink(missing_ok=True)
                removed.append(where)
    return removed


class Verifier:
    """Looks at one directory, again and again. A model that was read is not read again as long as its file is the same."""

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir
        self._known: dict[tuple[str, int, int, int], Layout | str] = {}

    def look(self, *, is_running: bool) -> Report:
        """Look once."""
        if not any((self._dir / name).exists() for name in (DATABASE, MODELS, SPOOL)):
            raise WrongDirectoryError(
                f"{self._dir} holds no {DATABASE}: no coordinator has run there; name its state_dir"
            )
        report = Report(str(self._dir), is_running)
        try:
            rows = self._read_database(report)
        except (StoreError, msgspec.MsgspecError, ValueError) as error:
            text = str(error).removeprefix(f"{self._dir / DATABASE}: ").partition("; ")[0]
            report.findings = [Finding("damage", DATABASE, text, RESTORE)]
            return report
        runs = rows.runs
        report.runs, report.versions = len(runs), sum(len(run.versions) for run in runs)
        layouts = self._check_models(rows, report)
        self._check_spool(runs, layouts, report)
        check_agent_models(self._dir, runs, report)
        report.findings += strays(self._dir, is_running=report.is_running)
        report.findings.sort(
            key=lambda finding: (("damage", "leftover", "note").index(finding.severity), finding.where)
        )
        return report

    # The database.

    def _read_database(self, report: Report) -> Rows:
        if not (self._dir / DATABASE).exists():
            raise StoreError(f"it is not there, and {MODELS} or {SPOOL} is: nothing says what they are of")
        store = Store(self._dir, read_only=True)
        try:
            report.findings += [Finding("damage", DATABASE, line, RESTORE) for line in store.damage()]
            with store.snapshot():
                rows = rows_of(store)
            if (
                store.epoch() < 1 and rows.runs
            ):  # without a run, no coordinator need have started: base models are enough
                report.findings.append(Finding("damage", DATABASE, "it has no epoch: expected 1 or more", RESTORE))
        finally:
            store.close()
        for run in rows.runs:
            report.findings += [Finding("damage", where, what, RESTORE) for where, what in broken(run)]
        return rows

    # Models.

    def _check_models(self, rows: Rows, report: Report) -> dict[str, Layout]:
        """Check every file, and that every model that is needed has one; the layouts of those that are sound, by digest."""
        needed, named = rows.needed(), rows.named()
        layouts: dict[str, Layout] = {}
        there = set()
        for path in files_in(self._dir / MODELS, "*.safetensors"):
            digest, where = path.stem, f"{MODELS}/{path.name}"
            if DIGEST.fullmatch(digest) is None:
                continue  # not ours: `strays` says so
            there.add(digest)
            checked = self._check_model(path, report)
            if checked is None:
                there.discard(digest)  # it went while we looked
            elif digest not in named:
                text = "nothing names it: it was made, and what wanted it ended before it was committed"
                report.findings.append(Finding("leftover", where, text, "--repair removes it", removable=True))
            elif isinstance(checked, str):
                cure = RESTORE if digest in needed else f"{RESTORE}, or delete the file: no round needs that version"
                report.findings.append(Finding("damage", where, checked, cure))
            else:
                layouts[digest] = checked
        for digest in needed.keys() - there:
            text = f"it is not there: {needed[digest]} needs it"
            report.findings.append(Finding("damage", f"{MODELS}/{digest}.safetensors", text, RESTORE))
        report.findings += _other_layouts(rows.runs, layouts)
        return layouts

    def _check_model(self, path: Path, report: Report) -> Layout | str | None:
        """Its layout, or what is wrong with it; None where it is gone."""
        try:
            seen = path.stat()
            key = (path.stem, seen.st_ino, seen.st_size, seen.st_mtime_ns)
            if key not in self._known:
                try:
                    self._known[key] = verify_file(path, path.stem)
                except ModelError as error:
                    self._known[key] = str(error)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"
        report.models += 1
        report.model_bytes += seen.st_size
        return self._known[key]

    # The spool.

    def _check_spool(self, runs: Sequence[RunRows], layouts: Mapping[str, Layout], report: Report) -> None:
        by_id = {run.run_id: run for run in runs}
        for run in runs:
            report.updates += len(run.current_updates)
            report.findings += self._check_updates(run, layouts)
        for run_dir in files_in(self._dir / SPOOL, "*"):
            if not run_dir.is_dir():
                continue
            run_of_dir = by_id.get(run_dir.name)
            segments = list(files_in(run_dir, "*.spool"))
            for path in segments:
                why = _why_unneeded(run_of_dir, path)
                if why:
                    where = f"{SPOOL}/{run_dir.name}/{path.name}"
                    report.findings.append(Finding("leftover", where, why, "--repair removes it", removable=True))

    def _check_updates(self, run: RunRows, layouts: Mapping[str, Layout]) -> Iterator[Finding]:
        """That the frames of each update that counts in the current round are all there, and add up to its digest."""
        where = f"{SPOOL}/{run.run_id}/{run.last_round + 1}.spool"
        found = _scan(self._dir / where)
        if isinstance(found, str):
            if run.current_updates:
                lost = ", ".join(update.agent_id for update in run.current_updates)
                yield Finding("damage", where, f"{found}; it held the updates of {lost}", RESTORE)
            return
        counted = {(update.agent_id, content_tag(update.update_digest)) for update in run.current_updates}
        if not run.is_over and found.damaged:
            text = f"{len(found.damaged)} damaged frames, the first {found.damaged[0]}"
            yield Finding("note", where, text, "" if counted else "an agent sends them again")
        layout = layouts.get(run.versions[-1]["digest"]) if run.versions else None
        if layout is None or not run.row["frame_elements"]:
            return
        framing = Framing(layout.num_elements, run.row["frame_elements"])
        for update in run.current_updates:
            frames = found.frames.get((update.agent_id, content_tag(update.update_digest)), {})
            wrong = _wrong_with(update, frames, framing)
            if wrong:
                yield Finding("damage", f"{where}, {update.agent_id}", wrong, RESTORE)


def _other_layouts(runs: Sequence[RunRows], layouts: Mapping[str, Layout]) -> Iterator[Finding]:
    """I4: the models of a run share one layout."""
    for run in runs:
        seen = [(version, layouts[version["digest"]]) for version in run.versions if version["digest"] in layouts]
        for version, layout in seen[1:]:
            if layout.digest != seen[0][1].digest:
                where = f"{run.run_id}, version {version['round_num']}"
                text = (
                    f"I4: layout {layout.digest[:12]}, version {seen[0][0]['round_num']} has {seen[0][1].digest[:12]}"
                )
                yield Finding("damage", where, text, RESTORE)


def _why_unneeded(run: RunRows | None, path: Path) -> str:
    """Why nobody needs this segment; empty where it is of the current round."""
    if run is None:
        return "the database knows of no such run"
    if run.is_over:
        return f"run {run.run_id} is {run.row['state']}"
    if path.stem == str(run.last_round + 1):
        return ""
    return f"the current round of {run.run_id} is {run.last_round + 1}"


def _wrong_with(update: AcceptedUpdate, frames: Mapping[int, SeenFrame], framing: Framing) -> str:
    spans = [framing.span(index) for index in range(framing.num_frames)]
    whole = [
        index in frames and frames[index].num_elements == stop - start for index, (start, stop) in enumerate(spans)
    ]
    if not all(whole):
        return f"{whole.count(False)} of the {len(whole)} frames of this accepted update are missing or damaged"
    seen = update_digest(frames[index].body_digest for index in range(len(spans)))
    if seen != update.update_digest:
        return f"its frames add up to {seen[:12]}..., it was accepted as {update.update_digest[:12]}..."
    return ""


def _scan(path: Path) -> Scan | str:
    """What a segment holds, or why that cannot be said."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return "it is not there" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error.strerror}"
    try:
        return scan(fd)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    finally:
        os.close(fd)
