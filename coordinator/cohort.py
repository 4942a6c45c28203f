"""The fleet: which agents there are, which are here now, and which could take part in a round.

An agent's presence is retained at the broker, but a retained "online" may be a ghost (the broker lost the will, or was
restored from an old file). So a retained birth makes an agent SILENT until it is heard live: it answers the roll call.

States: ONLINE (heard live, not gone since), SILENT (said to be online, not heard), OFFLINE.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from midge import PROTOCOL
from midge.wire.messages import Presence

MAX_AGENTS = 100_000
"""Agents that are remembered. A new one takes the place of the one that has been gone longest; where all are here, it is not
remembered: neither years of agents that come and go nor a flood of invented ids may fill the memory."""


MAX_GONE = 10_000
"""Of those, agents that are gone. One of which nothing is remembered comes back as any other."""


class AgentState(enum.StrEnum):
    """Where an agent stands with the coordinator."""

    ONLINE = "online"
    SILENT = "silent"
    OFFLINE = "offline"


class Change(enum.StrEnum):
    """What a presence message changed."""

    CAME = "came"
    RESTARTED = "restarted"
    LEFT = "left"


@dataclass(slots=True)
class Agent:
    """One agent as last heard of."""

    agent_id: str
    state: AgentState
    presence: Presence

    def problem(self, task: str, labels: Mapping[str, str]) -> str:
        """Why it cannot take part in a run of `task` among agents with `labels`; empty where it can."""
        if self.state is not AgentState.ONLINE:
            return f"is {self.state}"
        misfit = self.misfit(task)
        if misfit:
            return misfit
        lacking = [f"{key}={value}" for key, value in labels.items() if self.presence.labels.get(key) != value]
        return f"lacks the label {', '.join(lacking)}" if lacking else ""

    def misfit(self, task: str) -> str:
        """What of it, as it was started, keeps it out of every run of `task`; empty where nothing does."""
        if self.presence.protocol != PROTOCOL:
            return (
                f"speaks protocol {self.presence.protocol}, this coordinator {PROTOCOL}: install the same Midge on both"
            )
        if self.presence.task != task:
            return f"was started with --task {self.presence.task}, the run's task is {task}"
        return ""


class Fleet:
    """All agents that were heard of."""

    def __init__(self) -> None:
        self.agents: dict[str, Agent] = {}
        self._num_in = dict.fromkeys(AgentState, 0)
        self._gone: dict[str, None] = {}
        """Who is OFFLINE, in the order in which they left."""
        self._asked: tuple[str, dict[str, str]] = ("", {})
        self._fit: set[str] = set()
        """Who could take part in the run that was asked about last: kept, since a herd of n would else cost n * n."""
        self._available: frozenset[str] | None = frozenset()

    def hear(self, agent_id: str, presence: Presence, *, retained: bool) -> Change | None:
        """Take a presence message; `retained` is true where the broker sent it because we subscribed."""
        agent = self.agents.get(agent_id)
        if not presence.online:
            return self._left(agent, presence)
        if agent is None:
            if not self._make_room():
                return None
            state = AgentState.SILENT if retained else AgentState.ONLINE
            self.agents[agent_id] = Agent(agent_id, state, presence)
            self._num_in[state] += 1
            self._judge(self.agents[agent_id])
            return None if retained else Change.CAME
        restarted = agent.presence.incarnation != presence.incarnation
        was_online = agent.state is AgentState.ONLINE
        if retained and not restarted:
            return None
        agent.presence = presence
        self._move(agent, AgentState.SILENT if retained else AgentState.ONLINE)
        if retained:
            return Change.LEFT if was_online else None
        if was_online:
            return Change.RESTARTED if restarted else None
        return Change.CAME

    def lose_all(self) -> None:
        """Our connection broke: nobody is known to be here until heard again."""
        for agent in self.agents.values():
            if agent.state is AgentState.ONLINE:
                self._move(agent, AgentState.SILENT)

    def available(self, task: str, labels: Mapping[str, str]) -> frozenset[str]:
        """The agents that could take part in a run of `task` now."""
        if (task, labels) != self._asked:
            self._asked = task, dict(labels)
            self._fit = {agent_id for agent_id, agent in self.agents.items() if not agent.problem(task, labels)}
            self._available = None
        if self._available is None:
            self._available = frozenset(self._fit)
        return self._available

    def misfits(self, task: str) -> dict[str, str]:
        """Why agents that are here can take no part in a run of `task`, by agent, in order of their ids."""
        here = (agent for _, agent in sorted(self.agents.items()) if agent.state is AgentState.ONLINE)
        return {agent.agent_id: misfit for agent in here if (misfit := agent.misfit(task))}

    def count(self) -> dict[AgentState, int]:
        """How many agents are in each state."""
        return self._num_in.copy()

    def packet_limit_bytes(self) -> int | None:
        """The smallest packet limit that any agent announced which is not gone; None where none did."""
        here = (agent.presence for agent in self.agents.values() if agent.state is not AgentState.OFFLINE)
        limits = [presence.packet_limit_bytes for presence in here if presence.packet_limit_bytes]
        return min(limits, default=None)

    def _left(self, agent: Agent | None, presence: Presence) -> Change | None:
        if agent is None or agent.state is AgentState.OFFLINE:
            return None
        if agent.presence.incarnation != presence.incarnation:
            return None  # the will of an earlier start, late: a takeover of the connection fires it
        self._move(agent, AgentState.OFFLINE)
        return Change.LEFT

    def _move(self, agent: Agent, state: AgentState) -> None:
        """The agent is in this state now."""
        self._num_in[agent.state] -= 1
        self._num_in[state] += 1
        agent.state = state
        self._judge(agent)
        if state is not AgentState.OFFLINE:
            self._gone.pop(agent.agent_id, None)
            return
        self._gone[agent.agent_id] = None
        if len(self._gone) > MAX_GONE:
            self._forget_longest_gone()

    def _judge(self, agent: Agent) -> None:
        """Look again at whether this agent could take part."""
        fits = not agent.problem(*self._asked)
        if fits != (agent.agent_id in self._fit):
            (self._fit.add if fits else self._fit.discard)(agent.agent_id)
            self._available = None

    def _make_room(self) -> bool:
        """Whether there is room for another agent: for one that is gone, if there has to be."""
        if len(self.agents) >= MAX_AGENTS and self._gone:
            self._forget_longest_gone()
        return len(self.agents) < MAX_AGENTS

    def _forget_longest_gone(self) -> None:
        longest = next(iter(self._gone))
        del self._gone[longest]
        del self.agents[longest]
        self._num_in[AgentState.OFFLINE] -= 1
