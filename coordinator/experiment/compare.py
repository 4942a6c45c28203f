"""`coordinator compare`: what federating buys, against all data in one place and against agents that learn alone.

    1  the plan: configuration file, options, what each agent holds        compare_plan
    2  the units that are not done yet, one after the other                compare_runner, compare_store, budget
    3  means and spreads over the seeds                                    compare_summary
    4  tables, pictures, one page                                          compare_tables, compare_pictures, compare_page

This process loads neither torch nor matplotlib: `helper` does. How it ends on a signal: `interrupts`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from coordinator.experiment import baselines
from coordinator.experiment.compare_page import page
from coordinator.experiment.compare_plan import ComparePlan, load_plan
from coordinator.experiment.compare_runner import Runner
from coordinator.experiment.compare_screen import LiveScreen, PlainScreen
from coordinator.experiment.compare_store import CompareStore, UnitResult, write_whole
from coordinator.experiment.compare_summary import Comparison, headline, summarize
from coordinator.experiment.compare_tables import table, write_csv
from coordinator.experiment.federation import LOCAL_BROKERS, ExperimentError
from coordinator.experiment.helper import Helper
from coordinator.experiment.interrupts import Interrupted, Interrupts
from midge import log

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)


def run(
    config: Path | None,
    *,
    options: Mapping[str, Any],
    compare: Mapping[str, Any],
    assignments: Sequence[str],
    broker: str | None,
    out: Path,
    as_json: bool,
) -> int:
    """`coordinator compare`; see `load_plan` for the arguments.

    Returns:
        The exit code: 0 done, 1 something failed, 2 wrong use, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with Interrupts() as interrupts:
            plan = load_plan(config, options=options, compare=compare, assignments=assignments, broker=broker, out=out)
            comparison = _compare(plan, interrupts, as_json=as_json)
    except Interrupted as interrupted:
        _errors.print(f"coordinator: {interrupted}")
        _errors.print(f"Start it again in the same way, and it goes on where it was, in {out}.", soft_wrap=True)
        return interrupted.status
    except ExperimentError as error:
        _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
        return error.status
    if as_json:
        sys.stdout.write(_json(comparison).decode())
        return 0
    _console.print(table(comparison))
    if sentence := headline(comparison):
        _console.print(f"\n{sentence}", soft_wrap=True)
    _console.print(f"\nThe page to look at, or to send, is [bold]{out / PAGE_FILE}[/].", soft_wrap=True)
    return 0


PAGE_FILE = "compare.html"
JSON_FILE = "compare.json"


def _compare(plan: ComparePlan, interrupts: Interrupts, *, as_json: bool) -> Comparison:
    own_broker = plan.broker is None or plan.broker in LOCAL_BROKERS
    with ExitStack() as at_end:
        store = at_end.enter_context(CompareStore(plan, own_broker=own_broker))
        at_end.callback(log.setup)
        log.setup(stream=at_end.enter_context((plan.out / "coordinator.log").open("a", encoding="utf-8")))
        screen = _screen(plan, as_json=as_json)
        at_end.enter_context(screen)
        runner = Runner(plan, store, interrupts, screen)
        helper = Helper(interrupts, runner.advanced, plan.compare.threads)
        at_end.callback(helper.stop)
        survey, results = runner.run(helper)
        comparison = summarize(plan, survey, results)
        _write(plan.out, comparison, results, helper)
    interrupts.check()
    return comparison


def _write(out: Path, comparison: Comparison, results: Sequence[UnitResult], helper: Helper) -> None:
    try:
        write_whole(out / JSON_FILE, _json(comparison))
        write_csv(out, comparison, results)
        write_whole(out / PAGE_FILE, page(comparison).encode())
    except OSError as error:
        raise ExperimentError(f"{out}: {error.strerror or error}") from error
    helper.draw(baselines.DrawComparison(path=str(out / JSON_FILE), directory=str(out)))


def _screen(plan: ComparePlan, *, as_json: bool) -> LiveScreen | PlainScreen:
    if _errors.is_terminal and not _errors.is_dumb_terminal and not as_json:
        return LiveScreen(plan, _errors)
    return PlainScreen(plan, Console(stderr=True, highlight=False, quiet=as_json))


def _json(comparison: Comparison) -> bytes:
    return msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n"
