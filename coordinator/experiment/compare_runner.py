"""Works off a comparison, unit by unit: what is done already stays, a federation goes on in the round where it was."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from coordinator.board import Shared
from coordinator.config import Settings, run_fingerprint
from coordinator.experiment import baselines, budget
from coordinator.experiment.compare_plan import CENTRALIZED, FEDERATED, FEDSGD, ComparePlan
from coordinator.experiment.compare_store import CompareStore, Unit, UnitResult
from coordinator.experiment.federation import Federation, FederationPlan, Outcome, outcome_of
from coordinator.experiment.helper import Helper
from coordinator.experiment.interrupts import Interrupts
from coordinator.experiment.scores import Assessed, RoundScore
from coordinator.store import Store, StoreError


class Watcher(Protocol):
    """Is told how it goes on."""

    def surveyed(self, survey: baselines.Surveyed, rounds: dict[str, int]) -> None:
        """The data were looked at; `rounds` is how many each kind of unit has."""

    def began(self, unit: Unit, shared: Shared | None) -> None:
        """A unit is under way; of a federation, its board."""

    def look(self) -> None:
        """The board may say something new."""

    def advanced(self, unit: Unit, done: RoundScore) -> None:
        """A round is done."""

    def finished(self, result: UnitResult, *, is_new: bool) -> None:
        """A unit is done, now or at an earlier start."""


class Runner:
    """Does what is to be done.

    Args:
        plan: what is compared.
        store: where results are kept.
        interrupts: that end it.
        watcher: is told how it goes on.
    """

    def __init__(self, plan: ComparePlan, store: CompareStore, interrupts: Interrupts, watcher: Watcher) -> None:
        self._plan = plan
        self._store = store
        self._interrupts = interrupts
        self._watcher = watcher
        self._unit = Unit(kind="", seed=0)
        self._survey: baselines.Surveyed | None = None

    def run(self, helper: Helper) -> tuple[baselines.Surveyed, list[UnitResult]]:
        """Do all units that are not done.

        Raises:
            ExperimentError: something failed.
            Interrupted: a signal came.
        """
        plan = self._plan
        central = plan.central if CENTRALIZED in plan.arms else None
        settings = plan.settings
        survey = helper.survey(
            baselines.Survey(task=settings.task, test=plan.test, agents=plan.holdings, central=central)
        )
        self._survey = survey
        self._steps = budget.steps_a_round(survey.agents, settings.local_epochs, settings.batch_size)
        expected = budget.expected_steps(self._steps, settings.rounds, plan.agents_a_round)
        self._fedsgd_rounds = budget.fedsgd_rounds(expected, plan.agents_a_round, plan.compare.fedsgd_rounds)
        self._watcher.surveyed(survey, {FEDSGD: self._fedsgd_rounds})
        results: list[UnitResult] = []
        for unit in units_of(plan):
            self._interrupts.check()
            steps = self._budget(unit, expected, results)
            result = self._store.result(unit)
            is_new = result is None or result.steps != steps
            if result is None or result.steps != steps:
                self._unit = unit
                result = self._do(unit, steps, helper)
                self._store.save(result)
            results.append(result)
            self._watcher.finished(result, is_new=is_new)
        return survey, results

    def advanced(self, way: str, done: RoundScore) -> None:
        """A round of the unit under way is done in the helper's process."""
        assert way == self._unit.name
        self._watcher.advanced(self._unit, done)

    def _budget(self, unit: Unit, expected: tuple[int, ...], results: list[UnitResult]) -> tuple[int, ...]:
        """The steps that a unit is to make, by round; nothing for a federation that counts them as they come."""
        if unit.kind == CENTRALIZED:
            made = [one for one in results if one.unit == Unit(kind=FEDERATED, seed=unit.seed)]
            return tuple(one.num_steps for one in made[0].rounds[1:]) if made else expected
        if unit.kind == FEDSGD:
            return (self._plan.agents_a_round,) * self._fedsgd_rounds
        if unit.kind == FEDERATED:
            return expected
        return (self._steps[unit.agent],) * self._plan.settings.rounds

    def _do(self, unit: Unit, steps: tuple[int, ...], helper: Helper) -> UnitResult:
        if unit.kind in (FEDERATED, FEDSGD):
            return self._federate(unit, steps, helper)
        self._watcher.began(unit, None)
        plan = self._plan
        is_central = unit.kind == CENTRALIZED
        learnt = helper.train(
            baselines.Train(
                task=plan.settings.task,
                test=plan.test,
                way=unit.name,
                trainer=baselines.CENTRALIZED if is_central else unit.agent,
                holding=plan.central if is_central else plan.holdings[unit.agent],
                seed=unit.seed,
                rounds=plan.settings.rounds,
                training=plan.training,
                steps=steps if is_central else (),
                counts_steps=self._survey is not None and self._survey.counts_steps,
                agents=plan.holdings if is_central else {unit.agent: plan.holdings[unit.agent]},
            )
        )
        return self._result(unit, steps, learnt.rounds, learnt.tested)

    def _federate(self, unit: Unit, steps: tuple[int, ...], helper: Helper) -> UnitResult:
        plan = self._federation_plan(unit)
        outcome, broker = _finished(plan), ""
        if outcome is None:
            with Federation(plan) as federation:
                self._watcher.began(unit, federation.service.shared)
                outcome, broker = federation.run(self._interrupts, self._watcher.look), federation.broker
        request = baselines.Assess(
            task=plan.settings.task,
            test=self._plan.test,
            models_dir=str(plan.state_dir / "models"),
            digest=outcome.last_digest,
            agents=self._plan.holdings,
        )
        result = self._result(unit, steps, _rounds(outcome, plan.settings), helper.assess(request))
        return msgspec.structs.replace(result, run_id=outcome.run_id, broker=broker)

    def _federation_plan(self, unit: Unit) -> FederationPlan:
        directory = self._store.work_dir(unit)
        settings = self._plan.federated_settings(unit.kind, unit.seed, self._fedsgd_rounds)
        log_dir = directory / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        return FederationPlan(
            settings=msgspec.structs.replace(
                settings, federation=self._store.federation, state_dir=str(directory / "state"), http_port=0
            ),
            agents=self._plan.agents,
            broker=self._plan.broker,
            agents_dir=directory / "agents",
            log_dir=log_dir,
            threads=self._plan.compare.threads,
        )

    def _result(self, unit: Unit, steps: tuple[int, ...], rounds: list[RoundScore], tested: Assessed) -> UnitResult:
        assert self._survey is not None
        return UnitResult(
            unit=unit,
            rounds=rounds,
            tested=tested,
            steps=steps,
            versions=self._survey.versions,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def units_of(plan: ComparePlan) -> list[Unit]:
    """All units, those of one seed together, the federation first: what it made is the budget of others."""
    units = []
    for seed in plan.seeds:
        of_seed = [Unit(kind=kind, seed=seed) for kind in (FEDERATED, CENTRALIZED, FEDSGD) if kind in plan.arms]
        alone = dict.fromkeys(agent for arm in plan.arms for agent in plan.trainers(arm))
        units += [*of_seed, *(Unit(kind="alone", seed=seed, agent=agent) for agent in alone)]
    return units


def _finished(plan: FederationPlan) -> Outcome | None:
    """What a federation came to that ended before its result was kept."""
    try:
        store = Store(plan.state_dir, read_only=True)
    except StoreError:
        return None
    with contextlib.closing(store):
        run_id, state = store.latest(plan.settings.federation, run_fingerprint(plan.settings))
    return outcome_of(plan.state_dir, run_id) if run_id is not None and state == "done" else None


def _rounds(outcome: Outcome, settings: Settings) -> list[RoundScore]:
    return [
        RoundScore(
            round=one.round_num,
            loss=None if one.score is None else one.score.loss,
            accuracy=None if one.score is None else one.score.metrics.get("accuracy"),
            num_steps=budget.counted_steps(one.num_examples, settings.local_epochs, settings.batch_size),
            duration_s=one.duration_s,
            num_updates=one.num_updates,
        )
        for one in outcome.rounds
    ]
