"""The coordinator process: connects driver, MQTT, disk, computations and HTTP, and runs them until the run is over.

One loop takes what waits in the queue, a turn at a time, hands it to the driver, and ends the turn with `flush`.
With nothing to do it turns once a second, so that `/healthz` can tell that it lives.

A disk that fails ends neither the loop nor the run: see disk_guard.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from coordinator import run_events as ev
from coordinator.agent_models import AgentModels
from coordinator.base_models import digest_of
from coordinator.board import AGENT_ROUNDS, Board, Shared
from coordinator.compute import Compute, Computed
from coordinator.config import Settings, differences, run_definition, run_fingerprint, strategy_of
from coordinator.control import Asked, Closed, Closing, Control, unsaved
from coordinator.disk_guard import DiskGuard
from coordinator.driver import Driver, SupersededError, presence_payload
from coordinator.evaluator import EvaluatorSpoke, Made
from coordinator.framing import choose_framing
from coordinator.http import Heart, HttpServer, make_app
from coordinator.metrics import SYS_TOPICS, CollectorRegistry, Metrics
from coordinator.models import ModelStore
from coordinator.observer import Watch
from coordinator.resume import lately_stored, resume, unfinished
from coordinator.retention import Retention
from coordinator.run import FINAL, Run, RunState, Version
from coordinator.run_config import Resumed, RunConfig
from coordinator.run_settings import run_config
from coordinator.run_spool import RunSpool
from coordinator.spool import Spool
from coordinator.state_dir import InUseError, lock
from coordinator.store import Store, StoreError
from coordinator.trackers import make_trackers
from coordinator.tracking import Teller, Tracking, history
from coordinator.waits import Wait
from midge.eventqueue import EventQueue
from midge.failpoints import fail_point
from midge.log import log_event
from midge.transport.address import Address
from midge.transport.base import TransportEvent, Will
from midge.transport.mqtt import MqttTransport
from midge.wire.errors import FrameError
from midge.wire.frames import ELEMENT_BYTES
from midge.wire.identifiers import task_name
from midge.wire.topics import Topics

_log = logging.getLogger("coordinator")
_LONGEST_WAIT_S = 1.0
_TRACKERS_S = 2.0
"""Who asks for a stop waits for all of it at most 10 s: so long for trackers, and the rest for broker, threads and HTTP."""

_Event = TransportEvent | EvaluatorSpoke | Computed | Asked


class Service:
    """One coordinator.

    Args:
        settings: checked.
        address: of the broker.
        serve_http: whether to serve HTTP.
        keep_serving: go on after the run is over.

    Raises:
        StoreError: the state directory cannot be used, or another coordinator has it.
        HttpError: the port cannot be served.
        TrackerError: a tracker's library is not installed.
    """

    def __init__(
        self, settings: Settings, address: Address, *, serve_http: bool = True, keep_serving: bool = False
    ) -> None:
        self.settings = settings
        self.address = address
        self.shared = Shared(Board(federation=settings.federation, broker=str(address)))
        self.heart = Heart()
        self.queue: EventQueue[_Event] = EventQueue()
        self.reason = ""
        self._keep_serving = keep_serving
        self._state_dir = Path(settings.state_dir)
        self._trackers = make_trackers(settings)
        self.store = Store(self._state_dir)
        self._lock_fd = _lock(self._state_dir)
        self.models = ModelStore(self._state_dir / "models")
        self._agent_models = AgentModels(self._state_dir)
        self._spool = Spool(self._state_dir / "spool")
        self._registry = CollectorRegistry()
        metrics = Metrics(settings.federation, self._registry, max_agents=settings.agent_metrics)
        self._watch = Watch(metrics, self.shared)
        self._compute: Compute | None = None
        self._made: Made | None = None
        self._retention = Retention(self.store, self.models, self._spool, settings.keep_models)
        self._retained_for: tuple[int, int | None] | None = None
        self._to_clear: list[tuple[str, int]] = []
        self._base_digest = ""
        self._stop_asked = False
        self._to_answer: list[tuple[Future[Closed], Closed]] = []
        self._config: RunConfig | None = None
        self._idle_status = "no run"
        topics = Topics(settings.federation)
        self._run_spool = RunSpool(self._spool)
        epoch = self.store.raise_epoch()
        fail_point("coordinator.epoch.raised")
        instance = secrets.token_hex(8)
        self._transport = MqttTransport(
            address,
            f"coordinator-{settings.federation}-{instance[:6]}",
            self.queue,
            will=Will(topics.coordinator, presence_payload(epoch, instance, online=False), delay_s=0),
            keepalive_s=settings.keepalive_s,
            clean_start=True,
            session_expiry_s=0,  # its client id is new at each start: a session left behind would only fill a queue
        )
        self._driver = Driver(
            topics,
            self._transport,
            self.store,
            self._run_spool,
            _LateCompute(self),
            self.models.open,
            self._watch,
            epoch=epoch,
            instance=instance,
            broker_topics=tuple(SYS_TOPICS),
        )
        self._guard = DiskGuard(
            self._state_dir, self.store, self._spool, self._driver, self._watch, self._let_go, self._go_on
        )
        self._http = None
        if serve_http:
            control = Control(self.queue.put)
            app = make_app(self._registry, self.shared, self.store, self.heart, control)
            self._http = HttpServer(app, settings.http_host, settings.http_port, self._state_dir, control.token)

    @property
    def http_url(self) -> str:
        """Where HTTP is served; empty where it is not."""
        return self._http.url if self._http else ""

    @property
    def state(self) -> RunState | None:
        """Where the run stands; None where there is none."""
        if self._config is not None and self._guard.is_parked:
            return RunState.STOPPED if self._stop_asked else RunState.WAITING
        return self._driver.run.state if self._driver.run else None

    @property
    def run_id(self) -> str:
        """Of the current run; empty where there is none."""
        return self._config.run_id if self._config is not None else ""

    def begin_run(self, *, again: bool = True) -> str:
        """Begin the run that the settings define, or go on with it where it is unfinished.

        Args:
            again: begin another one where the latest is done; else show that one, and begin nothing.

        Returns:
            "begins", "goes on" or "is done".

        Raises:
            BaseModelError: the model that it should begin from is not registered.
            ModelError: the run's last version is missing or damaged.
        """
        settings = self.settings
        if not settings.keep_agent_models:
            self._agent_models.forget()
        self._base_digest = digest_of(self.store, settings.base_model)
        fingerprint = run_fingerprint(settings, self._base_digest)
        run_id, state = self.store.latest(settings.federation, fingerprint)
        if state == "done" and run_id is not None and not again:
            self._show_done(run_id)
            return "is done"
        if state in ("done", "failed"):
            run_id = None
        goes_on = run_id is not None
        self._look_at_other_runs(run_id)
        self._agent_models.forget(but=run_id or "")
        if run_id is None:
            run_id = self.store.create_run(
                federation=settings.federation,
                task=task_name(settings.task),
                fingerprint=fingerprint,
                definition=run_definition(settings, self._base_digest),
                rounds=settings.rounds,
            )
            fail_point("coordinator.run.created")
        strategy = strategy_of(settings)
        config = self._config = run_config(run_id, settings, strategy)
        resumed = resume(self.store, self.models, run_id)
        self._compute = Compute(
            run_id,
            settings.task,
            self._spool,
            self.models,
            strategy,
            self.queue.put,
            num_threads=settings.aggregation_threads,
            max_step_ratio=settings.max_step_ratio,
            aggregation_deadline_s=settings.aggregation_deadline_s,
            evaluation_deadline_s=settings.evaluation_deadline_s,
            data_dir=settings.data_dir,
            download=settings.download,
            base_digest=self._base_digest,
        )
        if strategy.caution:
            log_event(_log, logging.WARNING, "strategy has its price", strategy=strategy.name, caution=strategy.caution)
        self._run_spool.run_id = self._guard.run_id = run_id
        if resumed is not None:
            self._compute.framing = resumed.framing
            # Another run may have had the broker forget this one: it is about to be published again.
            self.store.set_framing(run_id, resumed.framing.frame_elements, resumed.framing.num_frames)
        self._show_run(config, "goes on" if goes_on else "begins")
        self._to_clear = [each for each in self.store.published(settings.federation) if each[0] != run_id]
        self._begin_tracking(run_id)
        self._driver.start_run(self._make_run(config, resumed), time.monotonic())
        return "goes on" if goes_on else "begins"

    def _make_run(self, config: RunConfig, resumed: Resumed | None) -> Run:
        return Run(
            config,
            epoch=self._driver.epoch,
            fleet=self._driver.fleet,
            now=time.monotonic(),
            resumed=resumed,
            connected=self._driver.is_connected,
        )

    def run(self, each_turn: Callable[[], None] = lambda: None) -> RunState | None:
        """Work until the run is over, or for ever where it keeps serving, or until `stop`.

        Returns:
            Where the run stands then.

        Raises:
            SupersededError: a newer coordinator of this federation is at work.
            OSError: the state directory failed, and not in a way that may pass (disk.py).
        """
        if self._http is not None:
            self._http.start()
        self._transport.start()
        try:
            while not self._is_over():
                self._turn()
                each_turn()
        except SupersededError as error:
            self.reason = str(error)
            raise
        finally:
            self._close()
        return self.state

    def stop(self) -> None:
        """End `run`, from any thread or signal handler; an unfinished run can be resumed."""
        self.queue.put(Asked(ev.StopAsked()))

    def _turn(self) -> None:
        now = time.monotonic()
        deadline = min(
            self._driver.run.deadline() if self._driver.run else math.inf,
            self._compute.deadline() if self._compute else math.inf,
            self._guard.retry_at if self._guard.is_parked else self._driver.deadline(),
            now + _LONGEST_WAIT_S,
        )
        for event in self.queue.take(max(0.0, deadline - now)):
            self._guard.outlive(functools.partial(self._dispatch, event))
        self._guard.outlive(self._try_again if self._guard.is_parked else self._end_turn)
        self._answer()
        self.heart.problem = self._guard.problem() or self._driver.problem
        self.heart.beat()
        self.heart.network_is_stuck = not self._transport.healthy
        run = self._driver.run
        missing = run.num_missing if run else 0
        self._watch.look(self._status(), missing, self.queue.size_bytes, self._wait(), time.monotonic())

    def _end_turn(self, now: float) -> None:
        late = self._compute.tick(now) if self._compute is not None else None
        if late is not None:
            self._driver.step(late, now)
        self._try_prepare(now)
        self._driver.step(ev.TimePassed(), now)
        self._driver.flush(now)
        self._keep_house()

    def _answer(self) -> None:
        """Tell whoever asked for something in this turn what came of it: it is stored, or the run is parked."""
        for answer, closed in self._to_answer:
            if answer.set_running_or_notify_cancel():  # false where whoever asked has gone
                answer.set_result(closed)
        self._to_answer = []

    def _status(self) -> str:
        if self._guard.is_parked:
            return self._guard.status()
        if self._driver.run is None:
            return self._idle_status
        problem = self._driver.problem if self._driver.is_connected and self.state not in FINAL else ""
        return "; ".join(filter(None, [self._driver.run.status(), problem]))

    def _wait(self) -> Wait | None:
        if self._guard.is_parked:
            return Wait("disk", 0, self._guard.retry_at)
        wait = self._driver.run.wait() if self._driver.run else None
        if wait is None or self._compute is None:
            return wait
        return Wait(wait.reason, wait.num_missing, min(wait.until, self._compute.ends_by(wait.reason)))

    # When the disk fails: see disk_guard.py.

    def _let_go(self, reason: str) -> None:
        self._made = None
        if self._compute is not None:
            self._compute.reset()
        self._to_answer = [(answer, unsaved(closed, reason)) for answer, closed in self._to_answer]

    def _try_again(self, now: float) -> None:
        framing = self._compute.framing if self._compute is not None else None
        self._guard.try_again(now, framing.num_elements * ELEMENT_BYTES if framing is not None else 0)

    def _go_on(self, now: float) -> None:
        if self._config is not None:
            resumed = resume(self.store, self.models, self.run_id)
            self._watch.catch_up(lately_stored(self.store, self.run_id))
            self._driver.unpark(self._make_run(self._config, resumed), now)

    # What a turn does.

    def _dispatch(self, event: _Event, now: float) -> None:
        match event:
            case EvaluatorSpoke():
                assert self._compute is not None
                result = self._compute.handle(event, now)
                if isinstance(result, Made):
                    self._made = result
                elif result is not None:
                    self._on_evaluation(result, now)
            case Computed():
                assert self._compute is not None
                computed = self._compute.take(event)
                if computed is not None:
                    self._driver.step(computed, now)
            case Asked():
                self._stop_asked = self._stop_asked or isinstance(event.event, ev.StopAsked)
                closing = Closing(self._driver.run, self._status() if self._guard.is_parked else "there is no run")
                self._driver.step(event.event, now)
                if event.answer is not None:
                    self._to_answer.append((event.answer, closing.result()))
            case _:
                self._driver.handle(event, now)

    def _on_evaluation(self, result: ev.Event, now: float) -> None:
        assert self._compute is not None
        if isinstance(result, ev.ModelEvaluated):
            if result.score is not None:
                self._watch.evaluated_in(self._compute.last_evaluation_s)
            elif result.reason:
                log_event(
                    _log,
                    logging.WARNING,
                    "evaluation failed",
                    run=self.run_id,
                    round=result.round_num,
                    reason=result.reason,
                )
        self._driver.step(result, now)

    def _try_prepare(self, now: float) -> None:
        """The first model is there; how to cut it is known once the broker's packet limit is."""
        if self._made is None or not self._driver.is_connected or self._compute is None:
            return
        made, self._made = self._made, None
        with self.models.open(made.digest) as model:
            layout = model.layout
        try:
            framing = choose_framing(
                layout.num_elements, self._driver.packet_limit_bytes, self._driver.fleet.packet_limit_bytes()
            )
        except FrameError as error:
            self._driver.step(ev.PreparationFailed(str(error)), now)
            return
        self.store.set_framing(self.run_id, framing.frame_elements, framing.num_frames)
        self._compute.framing = framing
        fail_point("coordinator.model.prepared")
        self._driver.step(ev.ModelPrepared(made.digest, layout, framing), now)

    def _keep_house(self) -> None:
        run = self._driver.run
        if run is None:
            return
        if self._to_clear and self._driver.is_connected:
            for run_id, num_frames in self._to_clear:
                self._driver.clear_run(run_id, num_frames)
                self.store.set_unpublished(run_id)
            self._to_clear = []
        if run.version is not None:
            key = (run.version.round_num, run.best[0] if run.best else None)
            if key != self._retained_for:
                assert self._compute is not None
                if self.settings.keep_agent_models and (self._retained_for or (0, None))[0] != key[0]:
                    # Before the frames go.
                    self._compute.later(functools.partial(self._keep_agent_models, run.config.run_id, run.version))
                self._retained_for = key
                self._compute.later(functools.partial(self._retention.committed, run.config.run_id, *key))

    def _keep_agent_models(self, run_id: str, version: Version) -> None:
        """On the thread that aggregates: write the models of the round that was just committed."""
        assert self._compute is not None
        framing = self._compute.framing
        updates = self.store.updates(run_id, version.round_num)
        if framing is None or not updates:
            return
        with self.models.open(version.digest) as model:
            spool = self._spool.round(run_id, version.round_num)
            self._agent_models.keep(run_id, version.round_num, model.layout, framing, spool, updates)

    def _is_over(self) -> bool:
        state = self.state
        if self._stop_asked and (state is None or state in FINAL):
            return True
        return not self._keep_serving and state in FINAL

    def _show_run(self, config: RunConfig, word: str) -> None:
        settings = self.settings
        wanted = config.round.target or settings.min_agents
        self._watch.begin_run(config.run_id, wanted, config.round.quorum)
        with self.shared.lock:
            board = self.shared.board
            board.run_id, board.task, board.rounds = config.run_id, config.task, config.rounds
            for version in self.store.versions(config.run_id):
                view = board.round_view(version["round_num"])
                for name in (
                    "duration_s",
                    "num_updates",
                    "num_examples",
                    "delta_norm",
                    "attempts",
                    "central",
                    "federated",
                ):
                    setattr(view, name, version[name])
            for round_num in list(board.history)[-AGENT_ROUNDS:]:
                for update in self.store.updates(config.run_id, round_num):
                    board.add_update(round_num, update)
        log_event(_log, logging.INFO, f"run {word}", run=config.run_id, task=config.task, rounds=config.rounds)

    def _begin_tracking(self, run_id: str) -> None:
        """Tell the trackers that the settings name of this run, from its beginning."""
        if not self._trackers:
            return
        settings = self.settings
        definition = run_definition(settings, self._base_digest)
        known = history(self.store, run_id, settings.agent_metrics)
        tellers = [Teller(tracker, run_id, settings.task, definition, known) for tracker in self._trackers]
        self._watch.tracking = Tracking(tellers, settings.agent_metrics, known)

    def _look_at_other_runs(self, run_id: str | None) -> None:
        """Frames of runs that are over are not needed any more; an unfinished run of another definition is worth a word."""
        definition = run_definition(self.settings, self._base_digest)
        for row in self.store.runs():
            if row["state"] in ("done", "failed"):
                self._spool.prune(row["run_id"], sys.maxsize)
        others = unfinished(self.store.runs(), self.settings.federation, but=run_id)
        if others:
            differs = ", ".join(differences(definition, json.loads(others[0]["definition"])))
            hint = "to go on with one, start it with its own settings; one that is left does no harm"
            shown: dict[str, Any] = {
                "run": others[0]["run_id"],
                "differs_in": differs,
                "num_unfinished": len(others),
                "hint": hint,
            }
            log_event(_log, logging.INFO, "another run is left unfinished", **shown)

    def _show_done(self, run_id: str) -> None:
        config = run_config(run_id, self.settings, strategy_of(self.settings))
        self._show_run(config, "is done")
        with self.shared.lock:
            board = self.shared.board
            row = self.store.run(run_id)
            board.state, board.round_num = "done", config.rounds
            self._idle_status = f"done: {config.rounds} rounds; change the configuration for another run"
            board.best_round, board.best_value = (row["best_round"], row["best_value"]) if row else (None, None)

    def _close(self) -> None:
        self._driver.say_farewell()  # first: what follows may take its seconds
        self._transport.stop()
        if self._compute is not None:
            self._compute.stop()
        if self._watch.tracking is not None:
            timeout = {"timeout_s": _TRACKERS_S} if self._stop_asked else {}
            self._watch.tracking.stop(self.state or "", **timeout)
        with contextlib.suppress(OSError):  # its file cannot be removed where nothing can be written
            if self._http is not None:
                self._http.stop()
        self._spool.close()
        self.store.close()
        os.close(self._lock_fd)


class _LateCompute:
    """Passes on to the service's `Compute`, which is made with the run, after the driver."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def ask(self, command: ev.Computation, now: float) -> None:
        compute = self._service._compute  # noqa: SLF001  one class in two parts
        assert compute is not None
        if isinstance(command, ev.DiscardModel):
            compute.later(functools.partial(self._service._retention.refused, command.digest, command.server_state))  # noqa: SLF001
        else:
            compute.ask(command, now)


def _lock(state_dir: Path) -> int:
    try:
        return lock(state_dir)
    except InUseError as error:
        raise StoreError(f"{error}; stop it, or give this one its own state_dir") from None
