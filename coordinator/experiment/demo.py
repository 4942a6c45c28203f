"""The demonstration: label-skewed agents learn together what none of them can learn alone, as processes over MQTT.

    1  a broker, the coordinator (in this process) and the agents train together             federation, agents
    2  a process trains on the first agent's data alone, then on all data in one place       baselines
    3  it tests all three, and draws the picture; the tables and the verdict follow          demo_report, demo_picture

One after the other, so that what each takes on a small machine can be compared. This process loads neither torch nor
matplotlib: it is always free to redraw the screen, and to end within a moment of Ctrl-C. How it ends: `interrupts`.
"""

from __future__ import annotations

import importlib.util
import queue
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.console import Console

from coordinator.experiment import baselines
from coordinator.experiment.agents import DEF_PROB, SEL_PROB
from coordinator.experiment.demo_report import Report, judge, summary, table
from coordinator.experiment.demo_screen import LiveScreen, PlainScreen, Screen
from coordinator.experiment.federation import DemoError, Federation, Outcome, Plan
from coordinator.experiment.interrupts import Interrupted, Interrupts
from midge import log
from midge.tasks.process import Child

_NEEDED = {"torch": "torch", "sklearn": "torch", "matplotlib": "coordinator"}

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)


def run(rounds: int, num_agents: int, out: Path, *, as_json: bool, broker: str | None, seed: int) -> int:
    """`coordinator demo`.

    Args:
        rounds: of the federation; the other two make as many epochs.
        num_agents: 2 to 10.
        out: directory for report.json, report.png, the coordinator's state and everybody's log.
        as_json: print the report, and no progress.
        broker: URL of one to use; "mosquitto" or "embedded" to start that one; None for whichever is there.
        seed: of every random choice.

    Returns:
        The exit code: 0 all is well, 1 something failed or learned less than it should, 2 wrong use, 130 after Ctrl-C.
    """
    plan = Plan(rounds=rounds, num_agents=num_agents, seed=seed, broker=broker, out=out)
    try:
        with Interrupts() as interrupts:
            _prepare(plan)
            report = _demonstrate(plan, interrupts, as_json=as_json)
    except Interrupted as interrupted:
        _errors.print(f"coordinator: {interrupted}")
        return interrupted.status
    except DemoError as error:
        _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
        return error.status
    _show(plan, report, as_json=as_json)
    return 1 if report.problems else 0


def _prepare(plan: Plan) -> None:
    """See to it that everything needed is there, before anything is started."""
    for module, extra in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise DemoError(f"{module} is not installed: pip install 'midge[{extra}]'", status=2)
    try:
        plan.log_dir.mkdir(parents=True, exist_ok=True)
        stream = (plan.log_dir / "coordinator.log").open("w", encoding="utf-8")
    except OSError as error:
        raise DemoError(f"{plan.out}: {error.strerror}; choose another directory with --out", status=2) from error
    log.setup(stream=stream)


def _demonstrate(plan: Plan, interrupts: Interrupts, *, as_json: bool) -> Report:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="midge-demo-") as scratch, ExitStack() as at_end:
        with Federation(plan, Path(scratch)) as federation:
            interrupts.check()
            screen = at_end.enter_context(_screen(plan, federation, as_json=as_json))
            outcome = federation.run(interrupts, screen.look)
        # Its processes have ended, and the machine is free.
        helper = _Helper(interrupts, screen)
        at_end.callback(helper.stop)
        report = _compare(plan, federation, outcome, helper)
        helper.ask(baselines.Draw(report=report, path=str(plan.out / "report.png")))
    interrupts.check()
    report.wall_s = time.monotonic() - began
    (plan.out / "report.json").write_bytes(_json(report))
    return report


def _compare(plan: Plan, federation: Federation, outcome: Outcome, helper: _Helper) -> Report:
    settings, first = federation.settings, plan.agents[0]
    reply = helper.ask(
        baselines.Compare(
            models_dir=str(plan.state_dir / "models"),
            last_digest=outcome.last_digest,
            rounds=plan.rounds,
            local_epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=plan.seed,
            data_seed=plan.seed,
            agent_id=first.agent_id,
            classes=first.classes,
            sel_prob=SEL_PROB,
            def_prob=DEF_PROB,
        )
    )
    assert isinstance(reply, baselines.Compared)
    federated = msgspec.structs.replace(reply.federated, rounds=list(outcome.rounds), wall_s=outcome.wall_s)
    report = Report(
        federated=federated,
        single_agent=reply.single_agent,
        centralized=reply.centralized,
        broker=federation.broker,
        wall_s=0.0,
        run_id=outcome.run_id,
        task=settings.task,
        seed=plan.seed,
        local_epochs=settings.local_epochs,
        agents={agent.agent_id: list(agent.classes) for agent in plan.agents},
    )
    report.problems = judge(report)
    return report


class _Helper:
    """The process that trains without a federation, and draws."""

    def __init__(self, interrupts: Interrupts, screen: Screen) -> None:
        self._interrupts = interrupts
        self._screen = screen
        self._replies: queue.SimpleQueue[baselines.Reply | None] = queue.SimpleQueue()
        self._child = Child(
            "coordinator.experiment.baselines",
            [],
            lambda reply: self._replies.put(baselines.decode_reply(reply)),
            lambda reason: self._replies.put(baselines.Failed(reason=reason)),
            {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def ask(self, request: baselines.Request) -> baselines.Compared | baselines.Drawn:
        """Have it done, and show how it goes on.

        Raises:
            DemoError: it failed, or the process died.
            Interrupted: a signal came.
        """
        self._child.send(baselines.encode(request))
        # A SimpleQueue may be put to in the midst of a get, so by the signal handler too.
        with self._interrupts.waking(lambda: self._replies.put(None)):
            while True:
                match reply := self._replies.get():
                    case baselines.Advanced():
                        self._screen.advanced(reply.way, reply.round)
                    case baselines.Failed():
                        raise DemoError(f"the comparison failed: {reply.reason}")
                    case None:
                        break
                    case _:
                        return reply
        raise AssertionError("woken without a signal")

    def stop(self) -> None:
        """End it."""
        self._child.stop()


def _screen(plan: Plan, federation: Federation, *, as_json: bool) -> Screen:
    shared = federation.service.shared
    if _errors.is_terminal and not _errors.is_dumb_terminal and not as_json:
        return LiveScreen(plan, shared, federation.broker, _errors)
    return PlainScreen(plan, shared, federation.broker, Console(stderr=True, highlight=False, quiet=as_json))


def _show(plan: Plan, report: Report, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(_json(report).decode())
    else:
        _console.print(table(report))
        _console.print(f"\n{summary(report)}\n")
        for line in _next(plan):
            _console.print(line, soft_wrap=True)
    for problem in report.problems:
        _errors.print(f"[red]not as it should be[/]: {problem}", soft_wrap=True)


def _next(plan: Plan) -> list[str]:
    """Where the results are, and commands to try."""
    program, state = _program(), f"--state-dir {shlex.quote(str(plan.state_dir))}"
    lines = [
        f"The picture is in [bold]{plan.out / 'report.png'}[/], the numbers are in {plan.out / 'report.json'}. Next, try:",
        f"  {program} models {state}",
        f"  {program} export latest {state} --to model.safetensors",
        f"  {program} demo --agents 5 --rounds 60",
    ]
    if Path("docker-compose.yml").exists():
        lines.append("  docker-compose up    the same, watched in Prometheus and Grafana")
    return lines


def _program() -> str:
    """How this program is started from where the user is: in a virtual environment it may not be on the path."""
    if shutil.which("coordinator"):
        return "coordinator"
    started_as = Path(sys.argv[0])
    if started_as.name == "__main__.py":
        return f"{sys.executable} -m coordinator"
    path = started_as.absolute()
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
