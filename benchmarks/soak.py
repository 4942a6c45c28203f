"""A federation for an hour, with faults: is anything kept that should not be?

    python benchmarks/soak.py [--minutes 60] [--seed 1] [--agents 4]

Coordinator, agents and a Mosquitto that this script starts are real processes, and so are their disks. Meanwhile, drawn from
the seed: an agent is killed and started again a little later; the broker is killed and started again, with nothing kept; or
frozen for a while, which is what a cut network looks like from both ends. The coordinator is killed, in the first fifth of the
time alone, so that what follows is the slope of one process; so is never `agent-0`. And 10,000 agents and more come once, say
that they are there, and go for ever.

Memory and descriptors of every process are read once a second. Printed are what straight lines through them gain after the
first two fifths, when caches have filled, and the sizes of what is on disk. Where a promise does not hold the status is 1:

    memory        a process gains less than 0.2 MB a minute, or 4 MB in all where the time is short: what a line makes of the
                  noise of malloc. A hundred bytes kept of each agent would be more. Below 8 minutes what is bounded is still
                  filling: less than 16 MB in all
    descriptors   less than one in ten minutes, or 3 in all
    on disk       never more than the models and segments that are to be kept; rows of each table below its bound
    rounds        are committed to the end; all exit with 0 when asked to; `coordinator verify` finds the state sound
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import long_run
from benchmarks.fuzz import Report
from coordinator.store import KEPT_ROUNDS
from midge import PROTOCOL
from midge.eventqueue import EventQueue
from midge.transport.address import Address
from midge.transport.base import Connected, Disconnected
from midge.transport.brokers import LocalBroker, start_local_broker
from midge.transport.mqtt import MqttTransport
from midge.wire.messages import Presence, encode
from midge.wire.topics import Topics

WARM_SHARE = 0.4
KILLS_SHARE = 0.2
MB_A_MINUTE = 0.2
NOISE_MB = 4.0
SHORT_S = 480
FILLING_MB = 16.0
"""What a run below `SHORT_S` may gain: what the coordinator remembers of 10,000 agents and 1,000 rounds, still filling."""
DESCRIPTORS_A_MINUTE = 0.1
NOISE_DESCRIPTORS = 3.0
KEEP_MODELS = 3
MAX_MODELS = KEEP_MODELS + 4
"""With the best, one that is being written, one that is about to go, and one of a round that was done again."""
NUM_PASSERS_BY = 10_000
_MOST_A_SECOND = 300.0
_RECOVERY_S = 90.0
_STAY_S = 2.0


class PassersBy:
    """Agents that come once, say that they are there, and go for ever: 10,000 in a fifth of the time, if it is not too short.

    So a coordinator that is killed no more has met as many as it remembers before its slope is judged.

    Args:
        url: of the broker.
        seconds: how long it all takes.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.num_seen = 0
        self._a_second = min(_MOST_A_SECOND, NUM_PASSERS_BY / (seconds * (WARM_SHARE - KILLS_SHARE)))
        self._topics = Topics(long_run.NAME)
        self._here: list[tuple[float, int]] = []
        self._queue: EventQueue = EventQueue()
        self._transport = MqttTransport(Address.parse(url), "passers-by", self._queue, session_expiry_s=0)
        self._transport.start()
        self._is_connected = False

    def pass_by(self, now_s: float) -> None:
        for event in self._queue.take(0.0):
            if isinstance(event, Connected | Disconnected):
                self._is_connected = isinstance(event, Connected)
        while self._is_connected and self.num_seen < now_s * self._a_second:
            self._say(self.num_seen, online=True)
            self._here.append((now_s, self.num_seen))
            self.num_seen += 1
        while self._here and now_s > self._here[0][0] + _STAY_S:
            self._say(self._here.pop(0)[1], online=False)

    def stop(self) -> None:
        self._transport.stop()

    def _say(self, number: int, *, online: bool) -> None:
        presence = Presence(
            online=online, incarnation=f"{number:x}", protocol=PROTOCOL, task="another", labels={"site": "street"}
        )
        self._transport.publish(self._topics.presence(f"passer-by-{number}"), encode(presence))


class Harm:
    """What happens to a federation, drawn from a seed.

    Args:
        federation: whose programs are killed.
        broker: of it.
        rng: of the choices.
        kills_until_s: the coordinator is killed no more after that.
    """

    def __init__(
        self, federation: long_run.Federation, broker: LocalBroker, rng: random.Random, kills_until_s: float
    ) -> None:
        self.done: Counter[str] = Counter()
        self.broker = broker
        self._federation = federation
        self._rng = rng
        self._kills_until_s = kills_until_s
        self._next_at_s = 5.0
        self._later: list[tuple[float, str, object]] = []

    def look(self, now_s: float) -> None:
        for at_s, what, program in [due for due in self._later if due[0] <= now_s]:
            self._later.remove((at_s, what, program))
            self._mend(what, program)
        if now_s >= self._next_at_s:
            self._next_at_s = now_s + self._rng.uniform(5.0, 25.0)
            self._begin(now_s)

    def end(self) -> None:
        """Mend all that is broken."""
        for _, what, program in self._later:
            self._mend(what, program)
        self._later = []

    def _begin(self, now_s: float) -> None:
        rng = self._rng
        kinds = ["agent killed", "agent killed", "broker killed", "broker frozen"]
        kinds += ["coordinator killed"] * 2 if now_s < self._kills_until_s else []
        what = rng.choice(kinds)
        if any(broken == what or "broker" in broken for _, broken, _ in self._later):
            return  # one thing of a kind at a time, and nothing while the broker is away
        program = rng.choice(self._federation.agents[1:]) if "agent" in what else self._federation.coordinator
        self.done[what] += 1
        self._later.append((now_s + rng.uniform(0.0, 6.0), what, program))
        match what:
            case "broker killed":
                self.broker.kill()
            case "broker frozen":
                os.kill(self.broker.pid, signal.SIGSTOP)
            case _:
                program.kill()

    def _mend(self, what: str, program: object) -> None:
        match what:
            case "broker killed":
                directory = self._federation.root / "broker"
                self.broker = start_local_broker("mosquitto", directory=directory, port=self.broker.port)
            case "broker frozen":
                os.kill(self.broker.pid, signal.SIGCONT)
            case _:
                assert isinstance(program, long_run.Program)
                program.start()


class Disk:
    """What the coordinator has on disk, at its most."""

    def __init__(self, federation: long_run.Federation) -> None:
        self.most: dict[str, float] = {}
        self.series: dict[str, long_run.Series] = {}
        self._federation = federation

    def look(self, now_s: float) -> None:
        for name, size in self._federation.sizes().items():
            self.most[name] = max(self.most.get(name, 0.0), size)
            self.series.setdefault(name, long_run.Series()).add(now_s, size)


def rows_of(database: Path) -> dict[str, int]:
    """How many rows each table has."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        names = [
            row[0] for row in connection.execute("select name from sqlite_master where type = 'table' order by name")
        ]
        return {name: connection.execute(f"select count(*) from {name}").fetchone()[0] for name in names}  # noqa: S608


def soak(seconds: float, seed: int, num_agents: int, root: Path, report: Report) -> None:
    broker = start_local_broker("mosquitto", directory=root / "broker")
    settings = {"keep_models": KEEP_MODELS, "round_deadline_s": 20}
    federation = long_run.Federation(root, broker.url, num_agents, task="benchmarks.null_task:paced", **settings)
    harm = Harm(federation, broker, random.Random(seed), seconds * KILLS_SHARE)
    try:
        _soak(federation, harm, seconds, report)
    finally:
        harm.end()
        for program in federation.programs:
            if program.is_running:
                program.kill()
        harm.broker.stop()


def _soak(federation: long_run.Federation, harm: Harm, seconds: float, report: Report) -> None:
    if not federation.wait_for(3, 60.0):
        raise SystemExit(f"the federation does not begin: {federation.status()}")
    passers_by = PassersBy(harm.broker.url, seconds)
    sampler = long_run.Sampler(lambda: _pids(federation, harm))
    disk = Disk(federation)
    began, before, look_at_s = time.monotonic(), federation.num_rounds(), 0.0
    while (now_s := time.monotonic() - began) < seconds:
        harm.look(now_s)
        passers_by.pass_by(now_s)
        if now_s >= look_at_s:
            look_at_s = now_s + 1.0
            sampler.look()
            disk.look(now_s)
        time.sleep(0.05)
    passers_by.stop()
    harm.end()
    num_rounds = federation.num_rounds() - before
    stopped = time.monotonic()
    goes_on = federation.wait_for(federation.num_rounds() + 5, _RECOVERY_S)
    after = f"5 in {time.monotonic() - stopped:.1f} s" if goes_on else federation.status()
    series = len(federation.get("/metrics").splitlines())
    codes = federation.stop()
    done = ", ".join(f"{count} times {what}" for what, count in sorted(harm.done.items()))
    print(f"  {num_rounds} rounds, {passers_by.num_seen} agents that passed by; {done}")
    _judge_processes(sampler, seconds, report)
    _judge_disk(federation, disk, len(federation.agents), report)
    found = [line for program in federation.programs for line in program.troubles()]
    report.promise("exceptions in logs", holds=not found, seen=found[:3] or 0)
    report.promise("lines of /metrics below 1000, whoever came", holds=0 < series < 1000, seen=series)
    report.promise("rounds committed meanwhile", holds=num_rounds > 0, seen=num_rounds)
    report.promise("rounds committed after", holds=goes_on, seen=after)
    report.promise("exit codes when asked to stop", holds=not any(codes.values()), seen=sorted(set(codes.values())))
    command = [sys.executable, "-m", "coordinator", "verify", str(federation.state_dir)]
    verified = subprocess.run(command, capture_output=True, text=True, check=False, cwd=long_run.ROOT)
    said = verified.stdout.strip().splitlines()[-1:] or verified.stderr.strip().splitlines()[-1:]
    report.promise("coordinator verify", holds=verified.returncode == 0, seen=" ".join(said))


def _pids(federation: long_run.Federation, harm: Harm) -> dict[str, int]:
    running = {program.name: program.pid for program in federation.programs if program.is_running}
    return running | ({"broker": harm.broker.pid} if harm.broker.is_running() else {})


def _judge_processes(sampler: long_run.Sampler, seconds: float, report: Report) -> None:
    skip_s = seconds * WARM_SHARE
    minutes = (seconds - skip_s) / 60
    memory, descriptors = sampler.longest(sampler.memory), sampler.longest(sampler.descriptors)
    rows = [("process", "lived", "MB at 40 %", "70 %", "100 %", "MB a minute", "descriptors", "a minute")]
    gains: dict[str, tuple[float, float]] = {}
    for name, one in memory.items():
        others = descriptors[name]
        gains[name] = one.slope(skip_s) * 60 / 2**20, others.slope(skip_s) * 60
        lived_s = one.at_s[-1] - one.at_s[0]
        sizes = [f"{one.at(share * seconds) / 2**20:.1f}" for share in (WARM_SHARE, 0.7, 1.0)]
        sizes.append(f"{gains[name][0]:+.3f}")
        rows.append(
            (
                name,
                f"{lived_s:.0f} s",
                *sizes,
                f"{min(others.values):.0f}-{max(others.values):.0f}",
                f"{gains[name][1]:+.3f}",
            )
        )
    print(long_run.table(rows))
    # The slope of a process that was started a moment ago is of its beginning; these two live on.
    for name in ("coordinator", "agent-0"):
        megabytes, number = gains[name]
        limit = max(MB_A_MINUTE, (FILLING_MB if seconds < SHORT_S else NOISE_MB) / minutes)
        report.promise(
            f"memory of {name} gains less than {limit:.2f} MB a minute",
            holds=megabytes < limit,
            seen=f"{megabytes:+.3f}",
        )
        limit = max(DESCRIPTORS_A_MINUTE, NOISE_DESCRIPTORS / minutes)
        report.promise(
            f"descriptors of {name} gain less than {limit:.2f} a minute", holds=number < limit, seen=f"{number:+.3f}"
        )


def _judge_disk(federation: long_run.Federation, disk: Disk, num_agents: int, report: Report) -> None:
    kilobytes = {name: disk.series[name].values for name in ("database_bytes", "models_bytes", "spool_bytes")}
    rows = [("on disk", "KB at first", "KB at last", "KB at most")]
    for name, values in kilobytes.items():
        rows.append(
            (name.removesuffix("_bytes"), *(f"{value / 1024:.0f}" for value in (values[0], values[-1], max(values))))
        )
    print(long_run.table(rows))
    models, segments = disk.most["models"], disk.most["segments"]
    report.promise(f"models at most {MAX_MODELS}", holds=models <= MAX_MODELS, seen=f"{models:.0f}")
    report.promise("segments of the spool at most 3", holds=segments <= 3, seen=f"{segments:.0f}")
    found = rows_of(federation.state_dir / "midge.db")
    print("  rows: " + ", ".join(f"{name} {count}" for name, count in found.items()))
    bound = (KEPT_ROUNDS + 1) * num_agents
    report.promise(f"rows of updates at most {bound}", holds=found["updates"] <= bound, seen=found["updates"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--agents", type=int, default=4)
    options = parser.parse_args()
    long_run.broker_is_there()
    logging.getLogger("midge").setLevel(logging.CRITICAL)  # the broker goes and comes, as it should
    report = Report()
    print(f"{options.agents} agents, {options.minutes:g} minutes, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="midge-soak-") as name:
        soak(options.minutes * 60, options.seed, options.agents, Path(name), report)
    if report.broken:
        raise SystemExit("does not hold: " + "; ".join(report.broken))


if __name__ == "__main__":
    main()
