"""The demonstration: label-skewed agents learn together what none of them can learn alone, as processes over MQTT.

    1  a broker, the coordinator (in this process) and the agents train together             federation, agents
    2  a process trains on the first agent's data alone, then on all data in one place       baselines
    3  it tests all three, and draws the picture; the tables and the verdict follow          demo_report, demo_picture

One after the other, so that what each takes on a small machine can be compared. This process loads neither torch nor
matplotlib: it is always free to redraw the screen, and to end within a moment of Ctrl-C. How it ends: `interrupts`.
"""

from __future__ import annotations

import importlib.util
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
from coordinator.experiment.agents import AgentPlan, last_words
from coordinator.experiment.demo_plan import CENTRALIZED, SINGLE_AGENT, Plan
from coordinator.experiment.demo_report import Learned, Report, Round, judge, summary, table
from coordinator.experiment.demo_screen import LiveScreen, PlainScreen, Screen
from coordinator.experiment.federation import ExperimentError, Federation, Outcome
from coordinator.experiment.helper import Helper
from coordinator.experiment.holding import Holding
from coordinator.experiment.interrupts import Interrupted, Interrupts
from coordinator.experiment.scores import Assessed, RoundScore
from midge import log

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
    except ExperimentError as error:
        _errors.print(f"coordinator: {error}", markup=False, soft_wrap=True)
        return error.status
    _show(plan, report, as_json=as_json)
    return 1 if report.problems else 0


def _prepare(plan: Plan) -> None:
    """See to it that everything needed is there, before anything is started."""
    for module, extra in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise ExperimentError(f"{module} is not installed: pip install 'midge[{extra}]'", status=2)
    try:
        plan.log_dir.mkdir(parents=True, exist_ok=True)
        stream = (plan.log_dir / "coordinator.log").open("w", encoding="utf-8")
    except OSError as error:
        raise ExperimentError(f"{plan.out}: {error.strerror}; choose another directory with --out", status=2) from error
    log.setup(stream=stream)


def _demonstrate(plan: Plan, interrupts: Interrupts, *, as_json: bool) -> Report:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="midge-demo-") as scratch, ExitStack() as at_end:
        with Federation(plan.federation(Path(scratch))) as federation:
            interrupts.check()
            screen = at_end.enter_context(_screen(plan, federation, as_json=as_json))
            outcome = federation.run(interrupts, screen.look)
        # Its processes have ended, and the machine is free.
        helper = Helper(interrupts, lambda way, done: screen.advanced(way, _round(done)))
        at_end.callback(helper.stop)
        report = _compare(plan, federation, outcome, helper)
        helper.draw(baselines.Draw(report=report, path=str(plan.out / "report.png")))
    interrupts.check()
    report.wall_s = time.monotonic() - began
    (plan.out / "report.json").write_bytes(_json(report))
    return report


def _compare(plan: Plan, federation: Federation, outcome: Outcome, helper: Helper) -> Report:
    settings, first = federation.settings, plan.agents[0]
    models_dir = str(plan.state_dir / "models")
    federated = helper.assess(
        baselines.Assess(task=settings.task, test=Holding(), models_dir=models_dir, digest=outcome.last_digest)
    )

    def train(way: str, trainer: str, holding: Holding) -> Learned:
        request = baselines.Train(
            task=settings.task,
            test=Holding(),
            way=way,
            trainer=trainer,
            holding=holding,
            seed=plan.seed,
            rounds=plan.rounds,
            training=plan.training,
        )
        learnt = helper.train(request)
        rounds = [_round(one) for one in learnt.rounds[1:]]
        return learned(learnt.tested, first, rounds, learnt.start_s + sum(one.duration_s for one in rounds))

    report = Report(
        federated=learned(federated, first, _federated_rounds(plan, outcome), outcome.wall_s),
        single_agent=train(SINGLE_AGENT, first.agent_id, first.holding),
        centralized=train(CENTRALIZED, baselines.CENTRALIZED, Holding()),
        broker=federation.broker,
        wall_s=0.0,
        run_id=outcome.run_id,
        task=settings.task,
        seed=plan.seed,
        local_epochs=settings.local_epochs,
        agents={agent.agent_id: list(agent.holding.classes) for agent in plan.agents},
    )
    report.problems = judge(report)
    return report


def learned(tested: Assessed, first: AgentPlan, rounds: list[Round], wall_s: float) -> Learned:
    """What one way of learning came to, as the report has it."""
    return Learned(
        accuracy=tested.score.accuracy or 0.0,
        loss=tested.score.loss,
        accuracy_other_labels=tested.accuracy_without(first.holding.classes),
        accuracy_by_label={label: one.accuracy for label, one in tested.by_label.items()},
        wall_s=wall_s,
        rounds=rounds,
    )


def _federated_rounds(plan: Plan, outcome: Outcome) -> list[Round]:
    rounds = []
    for one in outcome.rounds[1:]:
        if one.score is None:
            log_file = plan.log_dir / "coordinator.log"
            raise ExperimentError(f"the model of round {one.round_num} was not evaluated. {last_words(log_file)}")
        rounds.append(
            Round(
                round=one.round_num,
                accuracy=one.score.metrics["accuracy"],
                loss=one.score.loss,
                duration_s=one.duration_s,
                num_updates=one.num_updates,
            )
        )
    return rounds


def _round(done: RoundScore) -> Round:
    return Round(round=done.round, accuracy=done.accuracy or 0.0, loss=done.loss or 0.0, duration_s=done.duration_s)


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
        for line in next_lines(plan, _console.width):
            _console.print(line, soft_wrap=True)
    for problem in report.problems:
        _errors.print(f"[red]not as it should be[/]: {problem}", soft_wrap=True)


def next_lines(plan: Plan, width: int) -> list[str]:
    """Where the results are, and commands to try; where one is wider than the terminal, it goes on as a shell has it."""
    program, state = _program(), f"--state-dir {shlex.quote(str(plan.state_dir))}"
    commands = [
        [f"{program} models", state],
        [f"{program} export latest", state, "--to model.safetensors"],
        [f"{program} demo --agents 5 --rounds 60"],
    ]
    lines = [
        f"The picture is in [bold]{plan.out / 'report.png'}[/],",
        f"the numbers are in {plan.out / 'report.json'}.",
    ]
    lines += ["", "Next, try:", *(line for parts in commands for line in _folded(parts, width))]
    if Path("docker-compose.yml").exists():
        lines.append("  docker-compose up    the same, watched in Prometheus and Grafana")
    return lines


def _folded(parts: list[str], width: int) -> list[str]:
    """A command, broken between its parts only, so that no path is torn and all of it can be pasted."""
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + len("  \\") <= width:
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"      {part}")
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
