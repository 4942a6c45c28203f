"""What the demonstration shows: how many agents, who owns which digits, how long they train."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from coordinator.config import load_settings
from coordinator.experiment.agents import AgentPlan
from coordinator.experiment.federation import LOCAL_BROKERS, ExperimentError, FederationPlan
from coordinator.experiment.holding import Holding
from midge.settings import SettingsError
from midge.wire.messages import TrainingConfig

SINGLE_AGENT = "single_agent"
CENTRALIZED = "centralized"
"""What the report calls the two ways that the federation is compared with."""

_DEF_PROB = 0.05
_DEADLINES = {"start_deadline_s": 60.0, "selection_deadline_s": 30.0, "round_deadline_s": 120.0, "max_attempts": 2}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be shown.

    Attributes:
        rounds: of the federation.
        num_agents: 2 to 10.
        seed: of every random choice.
        broker: URL of one to use, or which one to start; None for whichever is there.
        out: directory for all results.
    """

    rounds: int
    num_agents: int
    seed: int
    broker: str | None
    out: Path
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(local_epochs=2, batch_size=10, learning_rate=0.1)
    )

    @property
    def agents(self) -> list[AgentPlan]:
        """Who takes part. Elsewhere than on a broker of our own, `agent-1` may be the name of somebody."""
        stem = "agent" if self.broker is None or self.broker in LOCAL_BROKERS else "demo-agent"
        hands = deal_labels(self.num_agents)
        return [
            AgentPlan(
                agent_id=f"{stem}-{number}",
                holding=Holding(classes=hand, def_prob=_DEF_PROB, data_seed=self.seed),
            )
            for number, hand in enumerate(hands, start=1)
        ]

    @property
    def state_dir(self) -> Path:
        """Of the coordinator."""
        return self.out / "state"

    @property
    def log_dir(self) -> Path:
        """Of everybody."""
        return self.out / "logs"

    def federation(self, scratch: Path) -> FederationPlan:
        """The federation; `scratch` is a directory for what nobody wants to keep.

        Raises:
            ExperimentError: its settings are wrong.
        """
        options = {
            "federation": f"demo-{secrets.token_hex(3)}",
            "task": "digits",
            "rounds": self.rounds,
            "min_agents": self.num_agents,
            "seed": self.seed,
            "state_dir": str(self.state_dir),
            "http_port": 0,
            "local_epochs": self.training.local_epochs,
            "batch_size": self.training.batch_size,
            "learning_rate": self.training.learning_rate,
            **_DEADLINES,
        }
        try:
            settings = load_settings(options=options)
        except SettingsError as error:
            raise ExperimentError(error, status=2) from error
        return FederationPlan(
            settings=settings,
            agents=self.agents,
            broker=self.broker,
            agents_dir=scratch / "agents",
            log_dir=self.log_dir,
        )


def deal_labels(num_agents: int) -> list[tuple[int, ...]]:
    """Deal the ten labels, 1 to 9 and then 0, in order and as evenly as possible, smaller hands first.

    For three agents that is STADLE's skew: 1,2,3 and 4,5,6 and 7,8,9,0.
    """
    labels = [*range(1, 10), 0]
    cuts = [index * len(labels) // num_agents for index in range(num_agents + 1)]
    return [tuple(labels[start:stop]) for start, stop in pairwise(cuts)]
