"""The coordinator's settings: what a run is, and how the coordinator works.

Some settings *define* a run: its rounds would give other bits with other values. They are `run_definition`, and their
digest is the run's fingerprint, by which a restarted coordinator knows whether it may go on with a run that it finds. The
rest (deadlines, addresses, logs) may change from one start to the next.

docs/configuration.md lists them all; `midge.settings` says where values come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from coordinator.original_config import translate
from coordinator.strategies.base import Strategy, StrategyError
from coordinator.strategies.registry import make_strategy, options_of
from midge import failpoints
from midge import settings as sources
from midge.settings import CommonSettings, Problem, Seconds, Text
from midge.wire.identifiers import task_name
from midge.wire.messages import Labels, Parameters

MAX_AGENTS = 100_000
NOT_SETTINGS = frozenset({"MIDGE_CONFIG", failpoints.VARIABLE})
"""Names in the environment that belong to the command line, and to tests."""
COMPARE_TABLE = "compare"
"""A table of the configuration file that is about `coordinator compare` alone."""


class Settings(CommonSettings, frozen=True, kw_only=True):
    """Everything that an operator may tell the coordinator."""

    rounds: Annotated[int, Meta(ge=1, le=1_000_000, description="Rounds of the run.")] = 30
    seed: Annotated[
        int, Meta(ge=0, le=2**53, description="Seed of every random choice: initial model, cohorts, training.")
    ] = 0
    min_agents: Annotated[
        int, Meta(ge=1, le=MAX_AGENTS, description="Agents to wait for before the run, and least agents of a round.")
    ] = 2
    start_agents: Annotated[
        int,
        Meta(ge=0, le=MAX_AGENTS, description="Agents to wait for before the first round, if more than `min_agents`."),
    ] = 0
    cohort: Annotated[
        int, Meta(ge=0, le=MAX_AGENTS, description="Agents wanted in a round; 0: every agent that is there.")
    ] = 0
    quorum: Annotated[
        int, Meta(ge=0, le=MAX_AGENTS, description="Accepted updates that a round needs; 0: as many as `min_agents`.")
    ] = 0
    over_select: Annotated[
        float, Meta(ge=1, le=10, description="Agents invited for each one wanted, where there are as many.")
    ] = 1.3
    select: Annotated[
        Labels,
        Meta(description="Labels that an agent must have to be invited, as `site=lab`; empty: all may take part."),
    ] = msgspec.field(default_factory=dict)
    local_epochs: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Passes over its own data that an agent makes in a round.")
    ] = 1
    batch_size: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="Examples in a batch; 0: all at once, which makes it FedSGD.")
    ] = 10
    learning_rate: Annotated[float, Meta(gt=0, le=1_000_000, description="Step size on the agents.")] = 0.1
    momentum: Annotated[float, Meta(ge=0, lt=1, description="Momentum of the agents' optimiser.")] = 0.0
    task_options: Annotated[
        Parameters, Meta(description="What the task alone knows, as `width=32`; sent to agents with each invitation.")
    ] = msgspec.field(default_factory=dict)
    base_model: Annotated[
        str,
        Meta(max_length=64, description="Registered model that the run begins from; empty: the task's own, by `seed`."),
    ] = ""
    strategy: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=1000,
            description="How updates become the next model: a name of docs/strategies.md, or yours as `package.module:object`. "
            "Robust ones (median, trimmed-mean, krum, multi-krum) cost accuracy where agents' labels differ.",
        ),
    ] = "fedavg"
    strategy_options: Annotated[
        Parameters, Meta(description="What the strategy alone knows, as `beta1=0.9`; docs/strategies.md has them.")
    ] = msgspec.field(default_factory=dict)
    weighting: Annotated[
        Literal["examples", "uniform", "sum"],
        Meta(description="Weight of an update in the mean: its examples, or 1; or deltas are added up, not averaged."),
    ] = "examples"
    server_learning_rate: Annotated[
        Annotated[float, Meta(gt=0, le=1_000_000)] | None,
        Meta(
            description="Factor on the server's step; 1 takes the mean itself.",
            extra={"default": "the strategy's own, 1 or 0.1"},
        ),
    ] = None
    clip_to_median: Annotated[
        float,
        Meta(
            ge=0,
            le=1_000_000,
            description="A delta above this many times the round's median norm is shortened to it; at least 1, or 0: no bound.",
        ),
    ] = 0.0
    visit_order: Annotated[
        tuple[str, ...],
        Meta(
            max_length=1000,
            description="Agents in the order of their turns, with `strategy` cyclic; empty: all, by name.",
        ),
    ] = ()
    max_step_ratio: Annotated[
        float,
        Meta(
            ge=0, le=1e15, description="Largest L2 norm of a step over that of the model; more is refused; 0: no bound."
        ),
    ] = 10.0
    max_loss_ratio: Annotated[
        float,
        Meta(
            ge=0,
            le=1_000_000,
            description="Largest loss on test data of a new version over that of the one before; more is refused; 0: no bound.",
        ),
    ] = 0.0
    max_accuracy_drop: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Most accuracy on test data that a new version may lose, as a fraction; more is refused; 0: no bound.",
        ),
    ] = 0.0
    quarantine_after: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="Rejected updates of an agent after which it is not invited for a while; 0: never.",
        ),
    ] = 3
    quarantine_window: Annotated[int, Meta(ge=1, le=1000, description="Rounds that these rejections lie in.")] = 20
    quarantine_rounds: Annotated[
        int, Meta(ge=1, le=1000, description="Rounds for which such an agent is not invited.")
    ] = 10
    norm_bound: Annotated[
        float, Meta(ge=0, le=1e15, description="Largest L2 norm of an acceptable delta; 0: no bound.")
    ] = 0.0
    max_examples: Annotated[
        int, Meta(ge=1, le=2**53, description="Most examples that an update may claim; more, and it is rejected.")
    ] = 10_000_000
    start_deadline_s: Annotated[
        Seconds, Meta(description="Longest wait for `min_agents` at the start; then the run fails.")
    ] = 3600.0
    selection_deadline_s: Annotated[
        Seconds,
        Meta(description="Longest wait for enough agents to take part in a round; then the attempt is abandoned."),
    ] = 60.0
    acceptance_deadline_s: Annotated[
        Seconds, Meta(description="An invited agent that has not answered after this is passed over.")
    ] = 20.0
    round_deadline_s: Annotated[
        Seconds, Meta(description="Longest wait for updates; then the round takes what is there, or is abandoned.")
    ] = 600.0
    aggregation_deadline_s: Annotated[
        Seconds, Meta(description="Longest time that averaging may take; then the attempt is abandoned.")
    ] = 3600.0
    max_attempts: Annotated[int, Meta(ge=1, le=1000, description="Attempts at a round; then the run fails.")] = 5
    evaluate: Annotated[
        bool, Meta(description="Whether the coordinator evaluates each version, where the task has test data.")
    ] = True
    evaluate_every: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Versions 0, n, 2n and so on are evaluated, by agents and coordinator; by the latter also the last.",
        ),
    ] = 1
    data_dir: Annotated[
        Text, Meta(description="Where the data lie that versions are evaluated on; empty: the task's own place.")
    ] = ""
    download: Annotated[
        bool,
        Meta(description="Whether the task may download those that are not there: built-in ones do, to `data_dir`."),
    ] = False
    evaluation_deadline_s: Annotated[
        Seconds, Meta(description="Longest evaluation on the coordinator; then it is given up.")
    ] = 600.0
    best_metric: Annotated[
        str, Meta(min_length=1, max_length=64, description="Metric that tells the best version, or `loss`.")
    ] = "accuracy"
    best_mode: Annotated[Literal["max", "min"], Meta(description="Which end of `best_metric` is best.")] = "max"
    state_dir: Annotated[
        str, Meta(min_length=1, max_length=1000, description="Directory of the database, models and received updates.")
    ] = "midge-state"
    keep_models: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="Latest versions that are kept, besides the best one; at least 3 are."),
    ] = 10
    keep_agent_models: Annotated[
        bool,
        Meta(
            description="Whether each agent's last accepted model is kept, of 100 agents at most; it tells of its data."
        ),
    ] = False
    aggregation_threads: Annotated[
        int, Meta(ge=1, le=256, description="Threads that aggregate; their number does not change the result.")
    ] = 1
    http_host: Annotated[
        str, Meta(min_length=1, max_length=255, description="Address that metrics, health and the API are served at.")
    ] = "127.0.0.1"
    http_port: Annotated[int, Meta(ge=0, le=65_535, description="Its port; 0: any free one.")] = 8080
    tensorboard_dir: Annotated[
        str, Meta(max_length=1000, description="Directory of TensorBoard's event files; empty: none are written.")
    ] = ""
    mlflow_uri: Annotated[
        str, Meta(max_length=1000, description="MLflow server or database that is told of runs; empty: none is.")
    ] = ""
    keepalive_s: Annotated[
        int, Meta(ge=1, le=65_535, description="Longest silence towards the broker, which else thinks us gone.")
    ] = 30
    agent_metrics: Annotated[
        int,
        Meta(ge=0, le=1000, description="Agents that metrics and trackers show each by itself: the first that report."),
    ] = 50

    @property
    def needed_updates(self) -> int:
        """The quorum, as a number of updates."""
        return 1 if self.in_turn else self.quorum or self.min_agents

    @property
    def in_turn(self) -> bool:
        """Whether agents are visited one after the other."""
        return strategy_of(self).in_turn


def load_settings(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, object | None] | None = None,
    assignments: Sequence[str] = (),
    ignore: Collection[str] = NOT_SETTINGS,
) -> Settings:
    """The coordinator's settings from all sources, see `midge.settings.load`.

    Raises:
        midge.settings.SettingsError: something is wrong; it says everything that is.
    """
    return sources.load(
        Settings,
        file=file,
        environ=environ,
        options=options,
        assignments=assignments,
        check=check,
        ignore=ignore,
        other_tables=(COMPARE_TABLE,),
        translate=translate,
    )


def check(settings: Settings) -> list[Problem]:
    """What is wrong between settings that are each right."""
    found = sources.check_common(settings)
    for key in ("min_agents", "quorum"):
        number = getattr(settings, key)
        if 0 < settings.cohort < number:
            text = f"is {number}, above cohort ({settings.cohort}): lower it, raise cohort, or let cohort be 0 (every agent)"
            found.append(Problem(key, text, ("cohort",)))
    for key in ("max_loss_ratio", "max_accuracy_drop"):
        if getattr(settings, key) and not settings.evaluate:
            text = f"is {getattr(settings, key):g}, and versions are not evaluated (evaluate): switch that on, or leave it out"
            found.append(Problem(key, text, ("evaluate",)))
    return found + _check_strategy(settings)


def strategy_of(settings: Settings) -> Strategy:
    """The strategy that the settings ask for, with its options.

    Raises:
        StrategyError: there is none; `check` has said so of settings that were loaded.
    """
    weighting = None if settings.weighting == "examples" else settings.weighting  # which is every strategy's own
    return make_strategy(
        settings.strategy,
        settings.strategy_options,
        server_learning_rate=settings.server_learning_rate,
        weighting=weighting,
        clip_to_median=settings.clip_to_median or None,
    )


def _check_strategy(settings: Settings) -> list[Problem]:
    involved = ("strategy", "strategy_options", "weighting", "server_learning_rate", "clip_to_median")
    try:
        strategy = strategy_of(settings)
    except StrategyError as error:
        return [Problem(error.key or "strategy_options", error.text if error.key else f"of {error.text}", involved)]
    found = []
    if settings.needed_updates < strategy.min_updates:
        text = (
            f"is {settings.needed_updates}, and strategy {strategy.name} with its options needs {strategy.min_updates} updates "
            "a round: raise quorum or min_agents"
        )
        found.append(Problem("quorum", text, ("min_agents", *involved)))
    if not strategy.in_turn:
        if settings.visit_order:
            found.append(
                Problem("visit_order", f"is given, and strategy {strategy.name} visits nobody in turn", involved)
            )
        return found
    for key in ("cohort", "quorum"):
        if (number := getattr(settings, key)) > 1:
            text = f"is {number}, and strategy {strategy.name} visits one agent a round: leave it out"
            found.append(Problem(key, text, ("strategy",)))
    for agent_id in settings.visit_order:
        found += [
            Problem("visit_order", f"has an id that {one.text}") for one in sources.check_identifier("", agent_id)
        ]
    if twice := {one for one in settings.visit_order if settings.visit_order.count(one) > 1}:
        found.append(Problem("visit_order", f"has {min(twice)} more than once: expected each agent once"))
    if 0 < len(settings.visit_order) < settings.min_agents:
        text = f"has {len(settings.visit_order)} agents, below min_agents ({settings.min_agents}): name more, or lower that"
        found.append(Problem("visit_order", text, ("min_agents",)))
    return found


def run_definition(settings: Settings, base_digest: str = "") -> dict[str, Any]:
    """The settings that a run's results depend on, in JSON's types.

    Equal runs have equal definitions: `quorum` is the number of updates that it stands for, numbers have the field's type, a
    task in a file is the same one in whatever directory, and a base model is told by its digest, not by its name.
    """
    # Settings that were made in code may hold 1 for 1.0.
    typed = msgspec.convert(msgspec.structs.asdict(settings), Settings)
    strategy = strategy_of(typed)
    definition = {key: getattr(typed, key) for key in _DEFINING} | {
        "quorum": typed.needed_updates,
        "task": task_name(typed.task),
    }
    # A strategy's own defaults count as if they were given, and what says nothing is left out: stored runs lack it.
    definition["server_learning_rate"] = getattr(strategy, "server_learning_rate", None) or typed.server_learning_rate
    if options := options_of(strategy, typed.strategy_options):
        definition["strategy_options"] = options
    if typed.clip_to_median:
        definition["clip_to_median"] = typed.clip_to_median
    if typed.visit_order:
        definition["visit_order"] = list(typed.visit_order)
    if base_digest:
        definition["base_model"] = base_digest
    return definition


def run_fingerprint(settings: Settings, base_digest: str = "") -> str:
    """The 64 hexadecimal digits that two settings share only if they define the same run."""
    canonical = msgspec.json.encode(run_definition(settings, base_digest), order="sorted")
    return hashlib.sha256(b"midge-run-1\n" + canonical).hexdigest()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two run definitions differ; empty where the fingerprints are equal."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


_DEFINING = (
    "task",
    "rounds",
    "seed",
    "cohort",
    "quorum",
    "min_agents",
    "over_select",
    "select",
    "local_epochs",
    "batch_size",
    "learning_rate",
    "momentum",
    "task_options",
    "strategy",
    "weighting",
    "norm_bound",
)
