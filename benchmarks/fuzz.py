"""Bad input, for ten minutes: mutated bytes at every decoder, then at every topic of a federation of real processes.

    python benchmarks/fuzz.py [--seconds 600] [--seed 1] [--decoders-only] [--rate 400] [--agents 3]

A third of the time goes to the decoders, in this process: each gets valid bytes that were changed (bits, cuts, numbers, texts,
nesting, bombs, headers of frames with their checksum made right again). They may refuse, and nothing else.

The rest goes to a coordinator and agents over a Mosquitto that this script starts, without an access list. A stranger
reads all topics, and publishes to all of them: what it heard, changed or as it was, long after; valid messages, changed;
retained and not; as agents that are there and as agents that never were. It forges everything but one thing: the presence of
another live coordinator, which is an order to step down. Where it takes back what the coordinator retains, or makes an agent
drop its work, rounds are slower meanwhile; none may be wrong, and they must go on.

Printed are the inputs by decoder and by topic, and what was promised: no exception but the decoders' own, none in a network
thread, no process that ends, memory and descriptors that do not grow, no file outside the state directories, rounds that are
committed meanwhile, and after: the coordinator and an agent are killed then, and come back to what was left at the broker.
Where one does not hold the status is 1. A seed gives the same inputs to the decoders again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import long_run
from benchmarks.fuzz_inputs import SEEDS, decoders, mutated
from midge.eventqueue import EventQueue
from midge.transport.address import Address
from midge.transport.base import Connected, MessageReceived, PacketTooLargeError, Published
from midge.transport.brokers import start_local_broker
from midge.transport.mqtt import MqttTransport
from midge.wire.errors import WireError
from midge.wire.messages import CoordinatorStatus, decode
from midge.wire.topics import Topics

DECODER_SHARE = 1 / 3
LONGEST_DECODE_S = 1.0
"""No input of the largest size, 4 MiB, may hold the coordinator's loop for longer; two busy cores are allowed for."""
HIGHEST_MB = 256
"""To make inputs of up to 4 MiB, and to read them, takes up to 150 MB; what one asks for may be a thousand times that."""
MEMORY_SLOPE = 2 * 2**20 / 60
"""Bytes a second. Of what a peer sends nothing is kept: 1 KiB kept of each of 200 messages a second would be 12 MB a minute."""
DESCRIPTOR_SLOPE = 1 / 60
"""A descriptor a minute: a leak at each message, reconnection or round would be hundreds."""
SHORT_S = 120
"""Below this, what a line through the samples gains says nothing."""
NUM_INVENTED = 500
"""Agents that never were."""
_NOT_OURS = ("/agent/../outbox", "/agent/A/presence", "/agent/" + "x" * 300 + "/outbox", "/agent/a/update/0/-1", "/x")
_WINDOW = 64
_NUM_HEARD = 100
NUM_AFTER = 3
_RECOVERY_S = 240.0
"""So many rounds: each may take as long as its deadline, since agents that never were have said that they are there."""


@dataclass
class Report:
    """What was seen, and what was promised and does not hold."""

    broken: list[str] = field(default_factory=list)

    def promise(self, what: str, *, holds: bool, seen: object) -> None:
        print(f"  {'ok  ' if holds else 'NO  '} {what}: {seen}", flush=True)
        if not holds:
            self.broken.append(f"{what}: {seen}")


# The decoders.


class Thrower:
    """Throws at each decoder, again and again.

    Attributes:
        ends: by decoder, how many inputs met which end: "refused", "taken", or the name of an exception.
        slowest: seconds, decoder and size in bytes of the input that took longest.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._table = decoders()
        self._every = list(SEEDS.values())
        self.ends: dict[str, Counter[str]] = {name: Counter() for name in self._table}
        self.slowest = (0.0, "", 0)

    @property
    def exceptions(self) -> dict[str, dict[str, int]]:
        """By decoder, what was raised that should not have been."""
        others = {
            name: {end: count for end, count in counts.items() if end not in ("refused", "taken")}
            for name, counts in self.ends.items()
        }
        return {name: counts for name, counts in others.items() if counts}

    def turn(self, number: int = 20) -> None:
        """Throw so many inputs at each."""
        for name, (read, kinds) in self._table.items():
            for _ in range(number):
                self._throw(name, read, mutated(self._rng, SEEDS[self._rng.choice(kinds)], self._every))

    def _throw(self, name: str, read: Callable[[bytes], object], payload: bytes) -> None:
        began = time.perf_counter()
        try:
            read(payload)
            end = "taken"
        except WireError:
            end = "refused"
        except Exception as error:  # noqa: BLE001  it is what is looked for
            end = type(error).__name__
            if not self.ends[name][end]:
                print(f"{name}: {payload[:200]!r} of {len(payload)} bytes")
                traceback.print_exc()
        self.slowest = max(self.slowest, (time.perf_counter() - began, name, len(payload)))
        self.ends[name][end] += 1


def fuzz_decoders(seconds: float, seed: int, report: Report) -> int:
    """Throw until the time is up. Returns how many inputs."""
    thrower = Thrower(seed)
    before_kb = _peak_kb()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        thrower.turn()
    rows = [("decoder", "inputs", "refused", "taken")]
    rows += [(name, str(c.total()), str(c["refused"]), str(c["taken"])) for name, c in thrower.ends.items()]
    print(long_run.table(rows))
    others = thrower.exceptions
    report.promise("exceptions but the decoders' own", holds=not others, seen=others or 0)
    grown_mb = (_peak_kb() - before_kb) / 1024
    limit = f"memory at its highest, over the beginning, below {HIGHEST_MB} MB"
    report.promise(limit, holds=grown_mb < HIGHEST_MB, seen=f"{grown_mb:.1f} MB")
    took, name, size = thrower.slowest
    seen = f"{took * 1e3:.0f} ms ({name}, {size} bytes)"
    report.promise(f"slowest input below {LONGEST_DECODE_S:g} s", holds=took < LONGEST_DECODE_S, seen=seen)
    return sum(counts.total() for counts in thrower.ends.values())


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# A federation.


class Stranger:
    """A client without an access list to hold it.

    Args:
        url: of the broker.
        agent_ids: of the agents that there are.
        seed: of its choices.
    """

    def __init__(self, url: str, agent_ids: list[str], seed: int) -> None:
        self.num_sent: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._topics = Topics(long_run.NAME)
        self._agent_ids = agent_ids
        self._run_id = "null-0"
        self._instance = ""
        self._heard: dict[str, deque[tuple[str, bytes]]] = {}
        self._outstanding: set[int] = set()
        self._seeds = list(SEEDS.values())
        self._queue: EventQueue[Any] = EventQueue()
        self._transport = MqttTransport(Address.parse(url), "mallory", self._queue, session_expiry_s=0)
        self._transport.start()

    def stop(self) -> None:
        self._transport.stop()

    def listen(self, wait_s: float) -> None:
        """Remember some of what comes."""
        for event in self._queue.take(wait_s):
            match event:
                case Connected():
                    self._outstanding.clear()
                    self._transport.subscribe([f"{self._topics.prefix}/#"])
                case Published(token):
                    self._outstanding.discard(token)
                case MessageReceived(topic, payload):
                    self._hear(topic, payload)

    def speak(self) -> bool:
        """Say one thing; false where too much is on its way."""
        rng = self._rng
        if len(self._outstanding) >= _WINDOW:
            return False
        kind, topic = self._some_topic()
        retain = rng.random() < 0.3
        payload = self._some_payload(kind)
        if retain and rng.random() < 0.02:
            payload = b""  # takes back what is retained there
        if self._is_order_to_step_down(topic, payload):
            return True
        with contextlib.suppress(PacketTooLargeError):
            qos = rng.choice((0, 1, 1))
            token = self._transport.publish(topic, payload, qos=qos, retain=retain)
            self.num_sent[kind] += bool(token)
            if token and qos:
                self._outstanding.add(token)
        return True

    def _some_topic(self) -> tuple[str, str]:
        rng, topics = self._rng, self._topics
        agent_id = rng.choice((rng.choice(self._agent_ids), "mallory", f"never-{rng.randrange(NUM_INVENTED)}"))
        run_id = rng.choice((self._run_id, self._run_id, "another"))
        index = rng.choice((0, 0, 1, 3, 999_999_999))
        made = {
            "coordinator": topics.coordinator,
            "rollcall": topics.rollcall,
            "head": topics.head(run_id),
            "model frame": topics.model_frame(run_id, rng.randrange(2), index),
            "presence": topics.presence(agent_id),
            "inbox": topics.inbox(agent_id),
            "outbox": topics.outbox(agent_id),
            "update frame": topics.update_frame(agent_id, rng.choice((0, 0, 1)), index),
            "no topic of ours": topics.prefix + rng.choice(_NOT_OURS),
        }
        kind = rng.choice(list(made))
        return kind, made[kind]

    def _some_payload(self, kind: str) -> bytes:
        rng = self._rng
        heard = self._heard.get(kind)
        if heard and rng.random() < 0.7:
            payload = rng.choice(heard)[1]
            return payload if rng.random() < 0.3 else mutated(rng, payload, self._seeds)
        return mutated(rng, rng.choice(self._seeds), self._seeds)

    def _is_order_to_step_down(self, topic: str, payload: bytes) -> bool:
        if topic != self._topics.coordinator:
            return False
        try:
            status = decode(payload, CoordinatorStatus)
        except WireError:
            return False
        return status.online and status.instance != self._instance

    def _hear(self, topic: str, payload: bytes) -> None:
        kind = _kind_of(topic)
        if kind == "coordinator" and not self._instance:
            with contextlib.suppress(WireError):
                self._instance = decode(payload, CoordinatorStatus).instance
        if kind == "head" and self._run_id == "null-0":
            self._run_id = topic.split("/")[-2]
        if kind not in self._heard or (payload and self._rng.random() < 0.05):
            self._heard.setdefault(kind, deque(maxlen=_NUM_HEARD)).append((topic, payload))


def _kind_of(topic: str) -> str:
    parts = topic.split("/")
    if "model" in parts:
        return "head" if parts[-1] == "head" else "model frame"
    return "update frame" if "update" in parts else parts[-1]


def fuzz_federation(seconds: float, seed: int, rate: float, num_agents: int, report: Report) -> Counter[str]:
    """Have a stranger at the broker of a federation. Returns how many messages it sent, by kind of topic."""
    with (
        tempfile.TemporaryDirectory(prefix="midge-fuzz-") as name,
        start_local_broker("mosquitto", directory=Path(name) / "broker") as broker,
    ):
        federation = long_run.Federation(Path(name), broker.url, num_agents)
        try:
            return _fuzz(federation, broker.url, seconds, seed, rate, report)
        finally:
            for program in federation.programs:
                if program.is_running:
                    program.kill()


def _fuzz(
    federation: long_run.Federation, url: str, seconds: float, seed: int, rate: float, report: Report
) -> Counter[str]:
    if not federation.wait_for(3, 60.0):
        raise SystemExit(f"the federation does not begin: {federation.status()}")
    stranger = Stranger(url, [agent.name for agent in federation.agents], seed)
    sampler = long_run.Sampler(lambda: {program.name: program.pid for program in federation.programs})
    before = federation.num_rounds()
    began = time.monotonic()
    look_at = began
    num_said = 0
    while (now := time.monotonic()) < began + seconds:
        stranger.listen(0.002)
        while num_said < (now - began) * rate and stranger.speak():
            num_said += 1
        num_said = max(num_said, int((now - began) * rate) - 100)  # what could not be said in time is not made up for
        if now >= look_at:
            look_at = now + 1.0
            sampler.look()
    stranger.stop()
    meanwhile = federation.num_rounds() - before
    ended = [program.name for program in federation.programs if not program.is_running]
    status = federation.status()
    invalid = sum(federation.counts("midge_messages_invalid_total").values())
    stale = sum(federation.counts("midge_messages_stale_total").values())
    by_agents = sum(federation.agent_counts("midge_agent_messages_invalid_total").values())
    for program in (federation.coordinator, federation.agents[0]):  # what is retained, awaits them as they come back
        program.kill()
        program.start()
    stopped = time.monotonic()
    goal = federation.num_rounds() + NUM_AFTER
    goes_on = federation.wait_for(goal, _RECOVERY_S)
    took = f"{NUM_AFTER} in {time.monotonic() - stopped:.1f} s"
    after = took if goes_on else f"not {NUM_AFTER} in {_RECOVERY_S:g} s: {federation.status()}"
    codes = federation.stop()
    _print_messages(stranger.num_sent, seconds)
    print(f"  the coordinator refused {invalid:.0f} messages and ignored {stale:.0f} as stale; then it said: {status}")
    print(f"  the agents refused {by_agents:.0f} messages")
    report.promise("what is refused is counted", holds=invalid > 0 and by_agents > 0, seen=f"{invalid + by_agents:.0f}")
    report.promise("processes that ended", holds=not ended, seen=", ".join(ended) or 0)
    troubles = {program.name: program.troubles() for program in federation.programs}
    found = [line for lines in troubles.values() for line in lines]
    report.promise("exceptions in logs, of network threads among them", holds=not found, seen=found[:3] or 0)
    _judge_growth(sampler, seconds, report)
    stray = federation.stray_files()
    report.promise("files outside the state directories", holds=not stray, seen=", ".join(stray[:5]) or 0)
    report.promise("rounds committed meanwhile", holds=meanwhile > 0, seen=meanwhile)
    report.promise("rounds committed after, one agent and the coordinator killed", holds=goes_on, seen=after)
    report.promise("exit codes when asked to stop", holds=not any(codes.values()), seen=sorted(set(codes.values())))
    return stranger.num_sent


def _print_messages(num_sent: Counter[str], seconds: float) -> None:
    total = num_sent.total()
    rows = [("topic", "messages"), *((kind, str(count)) for kind, count in sorted(num_sent.items()))]
    print(long_run.table([*rows, ("in all", str(total)), ("a second", f"{total / seconds:.0f}")]))


def _judge_growth(sampler: long_run.Sampler, seconds: float, report: Report) -> None:
    skip_s = seconds / 3  # caches fill at first
    memory, descriptors = sampler.longest(sampler.memory), sampler.longest(sampler.descriptors)
    rows = [("process", "MB at first", "MB at last", "KB/s", "descriptors")]
    for name, one in memory.items():
        count = descriptors[name].values
        first, last = one.values[0] / 2**20, one.values[-1] / 2**20
        rows.append(
            (name, f"{first:.1f}", f"{last:.1f}", f"{one.slope(skip_s) / 1024:.2f}", f"{count[0]:.0f}-{count[-1]:.0f}")
        )
    print(long_run.table(rows))
    if seconds < SHORT_S:  # too short for a slope to mean anything: what is there must be small
        grown = {name: (one.values[-1] - one.values[0]) / 2**20 for name, one in memory.items()}
        worst = max(grown, key=lambda name: grown[name])
        report.promise("memory grew by less than 64 MB", holds=grown[worst] < 64, seen=f"{worst} {grown[worst]:.1f} MB")
        return
    steepest = max(memory, key=lambda name: memory[name].slope(skip_s))
    slope = memory[steepest].slope(skip_s)
    limit = f"memory grows by less than {MEMORY_SLOPE / 1024:.0f} KB/s"
    report.promise(limit, holds=slope < MEMORY_SLOPE, seen=f"{steepest} {slope / 1024:.2f} KB/s")
    steepest = max(descriptors, key=lambda name: descriptors[name].slope(skip_s))
    slope = descriptors[steepest].slope(skip_s) * 60
    holds = slope < DESCRIPTOR_SLOPE * 60
    report.promise("descriptors grow by less than 1 a minute", holds=holds, seen=f"{steepest} {slope:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--decoders-only", action="store_true", help="no processes, no broker")
    parser.add_argument("--federation-only", action="store_true", help="no decoders in this process")
    parser.add_argument("--rate", type=float, default=400.0, help="messages a second, at most")
    parser.add_argument("--agents", type=int, default=3)
    options = parser.parse_args()
    report = Report()
    if not options.decoders_only:
        long_run.broker_is_there()
    share = 1.0 if options.decoders_only else 0.0 if options.federation_only else DECODER_SHARE
    if share:
        print(f"decoders, {options.seconds * share:.0f} s, seed {options.seed}", flush=True)
        num_inputs = fuzz_decoders(options.seconds * share, options.seed, report)
        print(f"  {num_inputs} inputs in all", flush=True)
    if share < 1.0:
        left_s = options.seconds * (1 - share)
        print(f"federation of {options.agents} agents, {left_s:.0f} s, seed {options.seed}", flush=True)
        fuzz_federation(left_s, options.seed, options.rate, options.agents, report)
    if report.broken:
        raise SystemExit("does not hold: " + "; ".join(report.broken))


if __name__ == "__main__":
    main()
