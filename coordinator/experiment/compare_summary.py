"""What a comparison came to: means and spreads over the seeds, by arm, by round, by label and by agent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import msgspec

from coordinator.experiment.baselines import Surveyed, steps_of
from coordinator.experiment.budget import expected_steps, steps_a_round
from coordinator.experiment.compare_plan import ALONE, CENTRALIZED, FEDERATED, FEDSGD, LOCAL_AVERAGE, ComparePlan
from coordinator.experiment.compare_store import Unit, UnitResult
from coordinator.experiment.scores import Held, RoundScore


class Stat(msgspec.Struct, frozen=True, kw_only=True):
    """A number over the seeds: the mean, the sample standard deviation (none of one seed), and each."""

    mean: float
    spread: float | None
    values: tuple[float, ...]


class RoundStat(msgspec.Struct, frozen=True, kw_only=True):
    """An arm after a round.

    Attributes:
        position: how much of the budget is used, as a round of the federation: comparable across arms.
        num_steps: gradient steps so far, on average over the seeds.
    """

    round: int
    position: float
    num_steps: float
    accuracy: Stat | None
    loss: Stat | None


class ArmSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One way of learning.

    Attributes:
        label: for a person.
        rounds: how many.
        num_steps: gradient steps in all, on average over the seeds; of `local-average`, of all agents together.
        budget: how many there were to make.
        batch: examples in each.
        passes: how often an example was looked at, on average over the data of those who trained.
        seconds: that its rounds took, on average over the seeds.
        by_label: accuracy on the test examples with a label.
        by_agent: on the data that an agent trains on, accuracy or else loss.
    """

    arm: str
    label: str
    rounds: int
    num_steps: float
    budget: int
    batch: str
    passes: float
    seconds: float
    accuracy: Stat | None
    loss: Stat
    by_round: list[RoundStat]
    by_label: dict[str, Stat]
    by_agent: dict[str, Stat]


class AgentSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An agent.

    Attributes:
        words: what it holds, as it was told.
        steps_a_round: gradient steps that it makes in a round.
        alone: how its own model does on the test data, accuracy or else loss; None where it was not trained alone.
    """

    agent_id: str
    words: str
    held: Held
    steps_a_round: int
    alone: Stat | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as `compare.json` has it.

    Attributes:
        metric: what all is told in: `accuracy`, or `loss` where the task has no accuracy.
        budget: gradient steps of the federation, of all agents and rounds together.
        counts_steps: whether the task can end a training after a number of steps.
    """

    task: str
    metric: str
    seeds: tuple[int, ...]
    rounds: int
    agents_a_round: int
    agents: list[AgentSummary]
    central: Held | None
    test: Held
    arms: list[ArmSummary]
    budget: int
    counts_steps: bool
    definition: dict[str, Any]
    versions: dict[str, str]
    broker: str
    finished_at: str

    @property
    def labels(self) -> list[str]:
        """Of the test data, in order."""
        return sorted(self.test.by_label, key=int)

    def arm(self, name: str) -> ArmSummary | None:
        """The arm of this name, if it is there; `alone` is the first of those."""
        return next((one for one in self.arms if one.arm == name or one.arm.partition(":")[0] == name), None)


def summarize(plan: ComparePlan, survey: Surveyed, results: Sequence[UnitResult]) -> Comparison:
    """Put everything together."""
    settings = plan.settings
    by_unit = {result.unit: result for result in results}
    has_accuracy = all(result.tested.score.accuracy is not None for result in results)
    steps = steps_a_round(survey.agents, settings.local_epochs, settings.batch_size)
    budget = sum(expected_steps(steps, settings.rounds, plan.agents_a_round))
    metric = "accuracy" if has_accuracy else "loss"

    def alone(agent_id: str) -> Stat | None:
        units = [by_unit.get(Unit(kind=ALONE, seed=seed, agent=agent_id)) for seed in plan.seeds]
        found = [unit.tested.score for unit in units if unit is not None]
        return stat(getattr(score, metric) for score in found) if found else None

    return Comparison(
        task=settings.task,
        metric=metric,
        seeds=tuple(plan.seeds),
        rounds=settings.rounds,
        agents_a_round=plan.agents_a_round,
        agents=[
            AgentSummary(
                agent_id=agent.agent_id,
                words=agent.holding.words(),
                held=survey.agents[agent.agent_id],
                steps_a_round=steps[agent.agent_id],
                alone=alone(agent.agent_id),
            )
            for agent in plan.agents
        ],
        central=survey.central,
        test=survey.test,
        arms=[_Arm(plan, arm, by_unit, metric, budget).summary(survey) for arm in plan.arms],
        budget=budget,
        counts_steps=survey.counts_steps,
        definition=plan.definition(),
        versions=survey.versions,
        broker=next((result.broker for result in results if result.broker), ""),
        finished_at=max((result.finished_at for result in results), default=datetime.now(UTC).isoformat()),
    )


def stat(numbers: Iterable[float]) -> Stat:
    """Mean and spread of at least one number."""
    values = tuple(numbers)
    return Stat(
        mean=statistics.fmean(values), spread=statistics.stdev(values) if len(values) > 1 else None, values=values
    )


class _Arm:
    """One arm, made of its units: each seed has one, or one an agent for `local-average`, whose mean counts."""

    def __init__(
        self, plan: ComparePlan, arm: str, by_unit: Mapping[Unit, UnitResult], metric: str, budget: int
    ) -> None:
        self._plan = plan
        self._arm = arm
        self._metric = metric
        self._budget = budget
        trainers = plan.trainers(arm)
        kind = ALONE if trainers else arm
        self._seeds = [
            [by_unit[Unit(kind=kind, seed=seed, agent=agent)] for agent in trainers or [""]] for seed in plan.seeds
        ]

    def summary(self, survey: Surveyed) -> ArmSummary:
        """All of it."""
        agents = [agent.agent_id for agent in self._plan.agents]
        labels = sorted(self._seeds[0][0].tested.by_label, key=int)
        return ArmSummary(
            arm=self._arm,
            label=label_of(self._arm, len(agents)),
            rounds=len(self._seeds[0][0].rounds) - 1,
            num_steps=self._mean(lambda units: sum(unit.num_steps for unit in units)),
            budget=self._allotted(),
            batch=self._batch(),
            passes=self._passes(survey),
            seconds=self._mean(lambda units: sum(one.duration_s for unit in units for one in unit.rounds)),
            accuracy=None if self._metric == "loss" else self._stat(lambda unit: unit.tested.score.accuracy or 0.0),
            loss=self._stat(lambda unit: unit.tested.score.loss),
            by_round=[self._round(number) for number in range(len(self._seeds[0][0].rounds))],
            by_label={label: self._by_label(label) for label in labels},
            by_agent={agent_id: found for agent_id in agents if (found := self._by_agent(agent_id)) is not None},
        )

    def _batch(self) -> str:
        size = 0 if self._arm == FEDSGD else self._plan.settings.batch_size
        return str(size) if size else "all"

    def _passes(self, survey: Surveyed) -> float:
        plan = self._plan
        if self._arm == CENTRALIZED and survey.central is not None:
            num_steps = self._mean(lambda units: sum(unit.num_steps for unit in units))
            return num_steps / steps_of(survey.central.num_examples, plan.settings.batch_size)
        rounds = len(self._seeds[0][0].rounds) - 1
        epochs = 1 if self._arm == FEDSGD else plan.settings.local_epochs
        share = plan.agents_a_round / len(plan.agents) if self._arm in (FEDERATED, FEDSGD) else 1.0
        return rounds * epochs * share

    def _allotted(self) -> int:
        """The budget of the arm: that of the federation, or of the agents that train alone."""
        trainers = self._plan.trainers(self._arm)
        return sum(sum(unit.steps) for unit in self._seeds[0]) if trainers else self._budget

    def _stat(self, number_of: Callable[[UnitResult], float]) -> Stat:
        return stat(statistics.fmean(number_of(unit) for unit in units) for units in self._seeds)

    def _mean(self, number_of: Callable[[list[UnitResult]], float]) -> float:
        return statistics.fmean(number_of(units) for units in self._seeds)

    def _round(self, number: int) -> RoundStat:
        num_steps = self._mean(lambda units: sum(_steps_until(unit, number) for unit in units))
        allotted = self._mean(lambda units: sum(unit.num_steps for unit in units))
        whole = self._budget if self._arm == FEDSGD else allotted
        return RoundStat(
            round=number,
            position=self._plan.settings.rounds * num_steps / whole if whole else 0.0,
            num_steps=num_steps,
            accuracy=self._round_stat(number, lambda one: one.accuracy),
            loss=self._round_stat(number, lambda one: one.loss),
        )

    def _round_stat(self, number: int, number_of: Callable[[RoundScore], float | None]) -> Stat | None:
        """Over the seeds that have this number; a version may not have been evaluated."""
        means = []
        for units in self._seeds:
            found = [number_of(unit.rounds[number]) for unit in units]
            known = [one for one in found if one is not None]
            if len(known) == len(found):
                means.append(statistics.fmean(known))
        return stat(means) if means else None

    def _by_label(self, label: str) -> Stat:
        return self._stat(lambda unit: unit.tested.by_label[label].accuracy)

    def _by_agent(self, agent_id: str) -> Stat | None:
        values = [
            getattr(unit.tested.by_agent[agent_id], self._metric)
            for units in self._seeds
            for unit in units
            if agent_id in unit.tested.by_agent
        ]
        return stat(values) if values else None


def label_of(arm: str, num_agents: int) -> str:
    """What a person reads."""
    if arm.startswith(f"{ALONE}:"):
        return f"{arm.partition(':')[2]} alone"
    together = f"{num_agents} agent{'s' if num_agents > 1 else ''}"
    return {
        FEDERATED: f"federated, {together}",
        FEDSGD: f"FedSGD, {together}",
        CENTRALIZED: "all data in one place",
        LOCAL_AVERAGE: "each alone, mean",
    }[arm]


def headline(comparison: Comparison) -> str:
    """One sentence: what was gained by learning together, and what it cost against data in one place."""
    federated = comparison.arm(FEDERATED)
    if federated is None:
        return ""
    ours = _of(federated, comparison.metric)
    parts = []
    for name, words in (
        (LOCAL_AVERAGE, "over an agent alone, on average"),
        (ALONE, "over {}"),
        (CENTRALIZED, "against {}"),
    ):
        other = comparison.arm(name)
        if other is not None:
            theirs = _of(other, comparison.metric)
            difference = ours.mean - theirs.mean
            number = f"{difference * 100:+.1f} points" if comparison.metric == "accuracy" else f"{difference:+.3g}"
            parts.append(f"{number} {words.format(other.label)}")
    word = "" if comparison.metric == "accuracy" else f"{comparison.metric} "
    return f"Together: {word}{shown(ours, comparison.metric)}" + (f"; {', '.join(parts)}." if parts else ".")


def shown(found: Stat | None, metric: str) -> str:
    """The mean and the spread, such as `95.2 ± 0.3 %`, or of a loss `0.123 ± 0.004`."""
    if found is None:
        return ""
    if metric == "accuracy":
        spread = "" if found.spread is None else f" ± {found.spread * 100:.1f}"
        return f"{found.mean * 100:.1f}{spread} %"
    decimals = max(3, 2 - math.floor(math.log10(abs(found.mean)))) if found.mean else 3
    spread = "" if found.spread is None else f" ± {found.spread:.{decimals}f}"
    return f"{found.mean:.{decimals}f}{spread}"


def _of(arm: ArmSummary, metric: str) -> Stat:
    return arm.loss if metric == "loss" or arm.accuracy is None else arm.accuracy


def _steps_until(unit: UnitResult, number: int) -> int:
    return list(accumulate(one.num_steps for one in unit.rounds))[number]
