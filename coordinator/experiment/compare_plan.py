"""What is compared: from the configuration file and the options to agents, arms and the settings of each.

The arms, that is, the ways of learning:

    federated        the agents together, over MQTT, as CONFIG says
    fedsgd           the same agents with one gradient step a round, each over all of an agent's data
    centralized      one model on all data in one place
    alone            one agent by itself, the first one; `alone:agent-2` for another
    local-average    every agent by itself: the mean over them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from coordinator.config import COMPARE_TABLE, Settings, load_settings, run_definition
from coordinator.experiment.agents import AgentPlan
from coordinator.experiment.federation import LOCAL_BROKERS, ExperimentError
from coordinator.experiment.holding import Classes, Holding, Share
from midge import settings as sources
from midge.settings import SettingsError, Text
from midge.wire.messages import TrainingConfig

FEDERATED, FEDSGD, CENTRALIZED, ALONE, LOCAL_AVERAGE = "federated", "fedsgd", "centralized", "alone", "local-average"
ARMS = (FEDERATED, CENTRALIZED, ALONE, LOCAL_AVERAGE, FEDSGD)

_MAX_AGENTS = 100
_NUM_AGENTS = 3
_PLAIN = Settings()
_NOT_ASKED = "min_agents=1"
"""It is settled here, whatever the configuration says: a smaller `cohort` than it asks for is no contradiction."""
_OF_STRATEGY = ("strategy", "strategy_options", "weighting", "server_learning_rate", "visit_order")
"""Settings of how updates become the next model: FedSGD is plain averaging."""


class CompareSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The table `[compare]` of a configuration file; each is an option of the command too, but for the last two."""

    arms: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="What to compare: `federated`, `centralized`, `alone`, `alone:agent-2`, `local-average`, `fedsgd`.",
            extra={"default": "federated, centralized, alone, local-average"},
        ),
    ] = (FEDERATED, CENTRALIZED, ALONE, LOCAL_AVERAGE)
    seeds: Annotated[
        int, Meta(ge=1, le=100, description="How often, each time with the next seed, from `seed` on.")
    ] = 3
    agents: Annotated[
        int,
        Meta(
            ge=0,
            le=_MAX_AGENTS,
            description="Agent processes: `agent-1`, `agent-2` and so on; 0: as many as `start_agents`, or 3.",
        ),
    ] = 0
    partition: Annotated[
        Text, Meta(description="How the data are dealt among them; empty: `iid`, or as `classes` and `agent` say.")
    ] = ""
    classes: Annotated[
        tuple[Classes, ...],
        Meta(
            max_length=_MAX_AGENTS,
            description="Labels that each agent owns, a list an agent: `[[1, 2, 3], [4, 5, 6]]`.",
            extra={"default": "all"},
        ),
    ] = ()
    sel_prob: Annotated[Share, Meta(description="Share of the examples with its own labels that an agent has.")] = 1.0
    def_prob: Annotated[Share, Meta(description="Share of the examples with other labels that an agent has.")] = 0.0
    data_dir: Annotated[
        Text, Meta(description="Where the agents' data lie; empty: as the coordinator's, or the task's own place.")
    ] = ""
    data_seed: Annotated[int, Meta(ge=0, le=2**53, description="Seed of the partition: the same for all seeds.")] = 0
    fedsgd_rounds: Annotated[int, Meta(ge=1, le=1_000_000, description="Most rounds of the arm `fedsgd`.")] = 500
    fedsgd_learning_rate: Annotated[
        float, Meta(ge=0, le=1_000_000, description="Its step size; 0: `learning_rate`.")
    ] = 0.0
    threads: Annotated[int, Meta(ge=1, le=256, description="Threads of each process that trains.")] = 1
    agent: Annotated[
        tuple[dict[str, Any], ...],
        Meta(
            max_length=_MAX_AGENTS,
            description="A table an agent, `[[compare.agent]]`, of an agent's data settings: they win over the above.",
            extra={"default": "none"},
        ),
    ] = ()
    centralized: Annotated[
        dict[str, Any],
        Meta(
            description="Data settings of the arm `centralized`, where all data are not what the task gives without any.",
            extra={"default": "none"},
        ),
    ] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparePlan:
    """What is compared.

    Attributes:
        settings: the run's, of the first seed.
        compare: the table.
        arms: in the order that they were asked for, each once.
        agents: who takes part, and what each holds.
        central: all data in one place.
        test: where the test data are.
        broker: URL of one to use, or which one to start; None for whichever is there.
        out: directory for all results.
    """

    settings: Settings
    compare: CompareSettings
    arms: tuple[str, ...]
    agents: tuple[AgentPlan, ...]
    central: Holding
    test: Holding
    broker: str | None
    out: Path

    @property
    def seeds(self) -> range:
        """Of the runs."""
        return range(self.settings.seed, self.settings.seed + self.compare.seeds)

    @property
    def holdings(self) -> dict[str, Holding]:
        """By agent."""
        return {agent.agent_id: agent.holding for agent in self.agents}

    @property
    def agents_a_round(self) -> int:
        """How many are counted in a round of the federation, where nothing goes wrong."""
        if self.settings.in_turn:
            return 1
        return self.settings.cohort or len(self.agents)

    @property
    def training(self) -> TrainingConfig:
        """What an agent is told in a round."""
        settings = self.settings
        return TrainingConfig(
            local_epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            momentum=settings.momentum,
            extra=dict(settings.task_options),
        )

    def trainers(self, arm: str) -> list[str]:
        """The agents that train alone for an arm; none for one that is not about training alone."""
        if arm == LOCAL_AVERAGE:
            return [agent.agent_id for agent in self.agents]
        return [agent_of(arm, self.agents)] if arm.partition(":")[0] == ALONE else []

    def federated_settings(self, arm: str, seed: int, fedsgd_rounds: int) -> Settings:
        """The coordinator's settings for `federated` or `fedsgd`, but for its federation and directory."""
        own: dict[str, Any] = {"seed": seed}
        if arm == FEDSGD:
            rate = self.compare.fedsgd_learning_rate or self.settings.learning_rate
            own |= {"local_epochs": 1, "batch_size": 0, "rounds": fedsgd_rounds, "learning_rate": rate, "momentum": 0.0}
            own |= {key: getattr(_PLAIN, key) for key in _OF_STRATEGY}
        return msgspec.structs.replace(self.settings, **own)

    def definition(self) -> dict[str, Any]:
        """All that the results depend on, in JSON's types. Arms and further seeds may be added to what is there already."""

        def given(holding: Holding) -> Any:
            """Not `download`: what is downloaded is what would lie there."""
            return {key: value for key, value in msgspec.to_builtins(holding.given()).items() if key != "download"}

        return {
            **{key: value for key, value in run_definition(self.settings).items() if key != "min_agents"},
            "agents": {agent.agent_id: given(agent.holding) for agent in self.agents},
            "centralized": given(self.central),
            "fedsgd_rounds": self.compare.fedsgd_rounds,
            "fedsgd_learning_rate": self.compare.fedsgd_learning_rate,
            "test": given(self.test),
            "threads": self.compare.threads,
        }


def agent_of(arm: str, agents: Sequence[AgentPlan]) -> str:
    """The agent of `alone` or `alone:agent`."""
    return arm.partition(":")[2] or agents[0].agent_id


def load_plan(
    config: Path | None,
    *,
    options: Mapping[str, Any],
    compare: Mapping[str, Any],
    assignments: Sequence[str],
    broker: str | None,
    out: Path,
) -> ComparePlan:
    """The plan of all sources.

    Args:
        config: the coordinator's configuration file, which may have a table `[compare]`.
        options: the coordinator's settings from the command line.
        compare: those of `CompareSettings`.
        assignments: the coordinator's settings from `--set`.
        broker: see `ComparePlan`.
        out: see `ComparePlan`.

    Raises:
        ExperimentError: something is wrong; it says everything that is.
    """
    problems: list[str] = []
    try:
        base = load_settings(file=config, options=options, assignments=[*assignments, _NOT_ASKED])
    except SettingsError as error:
        problems += error.problems
    try:
        table = sources.load(CompareSettings, file=config, options=compare, table=COMPARE_TABLE)
    except SettingsError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ExperimentError("\n".join(problems), status=2)
    stem = "agent" if broker is None or broker in LOCAL_BROKERS else "compare-agent"
    if base.base_model:
        raise ExperimentError("base_model is given: every arm begins with the task's own first model, leave it out", 2)
    place = {"data_dir": table.data_dir or base.data_dir, "download": base.download}
    agents = _agents(table, base, place, stem, config)
    settings = _run_settings(base, len(agents))
    if settings.cohort > len(agents):
        raise ExperimentError(
            f"cohort is {settings.cohort}: expected at most {len(agents)}, as many as agents", status=2
        )
    arms = _arms(table.arms, agents)
    central = _holding(place | table.centralized, f"{_name(config)}, [compare.centralized]")
    if CENTRALIZED in arms and not table.centralized and len({agent.holding.data_dir for agent in agents}) > 1:
        raise ExperimentError(
            "each agent has a data_dir of its own: say with [compare.centralized] where all data lie in one place, "
            f"or leave the arm {CENTRALIZED} out",
            status=2,
        )
    return ComparePlan(
        settings=settings,
        compare=table,
        arms=arms,
        agents=agents,
        central=central,
        test=Holding(data_dir=base.data_dir or table.data_dir, download=base.download),
        broker=broker,
        out=out,
    )


def _run_settings(base: Settings, num_agents: int) -> Settings:
    """Those of a federation whose agents are all there, and none of which is slow to report: more invitations only waste."""
    minimum = base.cohort or num_agents
    return msgspec.structs.replace(
        base,
        min_agents=minimum,
        start_agents=num_agents,
        quorum=min(base.quorum, minimum),
        over_select=1.0,
        select={},
        evaluate=True,
        evaluate_every=1,
        keep_agent_models=False,
        tensorboard_dir="",
        mlflow_uri="",
    )


def _agents(
    table: CompareSettings, base: Settings, place: Mapping[str, Any], stem: str, config: Path | None
) -> tuple[AgentPlan, ...]:
    num_agents = table.agents or base.start_agents or _NUM_AGENTS
    if num_agents > _MAX_AGENTS:
        raise ExperimentError(f"start_agents is {num_agents}: expected at most {_MAX_AGENTS}, or say agents", status=2)
    for key, given in (("classes", table.classes), ("agent", table.agent)):
        if given and table.agents not in (0, len(given)):
            raise ExperimentError(f"{key} is of {len(given)} agents, and agents is {table.agents}", status=2)
        num_agents = len(given) if given else num_agents
    if table.classes and table.agent and len(table.classes) != len(table.agent):
        raise ExperimentError(
            f"classes is of {len(table.classes)} agents, and there are {len(table.agent)} [[compare.agent]]", status=2
        )
    partition = table.partition or ("" if table.classes or table.agent else "iid")
    agents = []
    for index in range(num_agents):
        values: dict[str, Any] = {
            **place,
            "classes": table.classes[index] if table.classes else (),
            "sel_prob": table.sel_prob,
            "def_prob": table.def_prob,
            "data_seed": table.data_seed,
        }
        if partition:
            values |= {"partition": partition, "index": index, "of": num_agents}
        own = dict(table.agent[index]) if table.agent else {}
        where = f"{_name(config)}, [[compare.agent]] number {index + 1}"
        agents.append(AgentPlan(agent_id=f"{stem}-{index + 1}", holding=_holding(values | own, where)))
    return tuple(agents)


def _holding(values: Mapping[str, Any], where: str) -> Holding:
    try:
        return msgspec.convert(dict(values), Holding)
    except msgspec.ValidationError as error:
        known = ", ".join(Holding.__struct_fields__)
        raise ExperimentError(f"{where}: {error}; its keys are {known}", status=2) from None


def _name(config: Path | None) -> str:
    return config.name if config else "options"


def _arms(asked: Sequence[str], agents: Sequence[AgentPlan]) -> tuple[str, ...]:
    """Each once; `alone` of the first agent by its full name is the same arm."""
    ids = [agent.agent_id for agent in agents]
    arms = []
    for arm in asked:
        name, colon, agent_id = arm.partition(":")
        if name not in ARMS or (colon and name != ALONE):
            raise ExperimentError(f"arm {arm!r}: expected any of {', '.join(ARMS)}, or {ALONE}:agent", status=2)
        if colon and agent_id not in ids:
            raise ExperimentError(f"arm {arm!r}: no such agent; there are {', '.join(ids)}", status=2)
        arms.append(f"{ALONE}:{agent_id or ids[0]}" if name == ALONE else name)
    return tuple(dict.fromkeys(arms))
