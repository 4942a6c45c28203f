"""The coordinator as a simulated process: its real driver, on a state directory and computations in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from coordinator import run_events as ev
from coordinator.cohort import Change, Fleet
from coordinator.disk import Parking, survivable
from coordinator.driver import Driver, SupersededError, presence_payload
from coordinator.resume import resume
from coordinator.retention import Retention
from coordinator.run import Run
from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    Published,
    SubscriptionDenied,
    TransportEvent,
    Will,
)
from tests.sim.learning import Trained, average, evaluate, initial_model
from tests.sim.process import Crash, Process, WatchedTransport

if TYPE_CHECKING:
    from tests.sim.federation import Federation

_FROM_BROKER = (Connected, Disconnected, MessageReceived, Published, SubscriptionDenied)
_KEEP_MODELS = 3  # of fewer, one could be gone before it is evaluated


class CoordinatorProcess(Process):
    """The coordinator; `driver` is the one of the present start."""

    driver: Driver

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation, "coordinator")
        self.computation_fails = 0.0
        self.parking = Parking()
        self._inbox: list[TransportEvent | ev.Event | OSError] = []
        self._initial: str | None = None
        self._asked_of = 0
        self._evaluator_free_at = 0.0
        self._retention: Retention
        self._retained_for: tuple[int, int | None] | None = None

    # Starting and ending.

    def _start(self) -> None:
        federation = self.federation
        federation.auditor.restarted()
        federation.spool.restarted()
        self.parking = Parking()
        self._asked_of = 0
        try:
            epoch = federation.store.raise_epoch()
        except OSError:
            raise Crash(self) from None  # it says so, exits, and is started again later
        instance = f"instance-{self.generation}"
        will = Will(federation.topics.coordinator, presence_payload(epoch, instance, online=False), delay_s=0)
        self.transport = federation.broker.transport(f"coordinator-{instance}", self._take, will)
        watched = WatchedTransport(self, self.transport, federation.auditor.published)
        store, spool, models = cast("Any", (federation.store, federation.spool, federation.models))
        self.driver = Driver(
            federation.topics,
            watched if federation.is_audited else self.transport,
            store,
            spool,
            self,
            models.open,
            self,
            epoch=epoch,
            instance=instance,
        )
        self._retention = Retention(store, models, spool, _KEEP_MODELS)
        self._retained_for = self._initial = None
        self.driver.start_run(self._make_run(), self.now())
        self.transport.start()
        self._turn(self.now())

    def _make_run(self) -> Run:
        federation, driver = self.federation, self.driver
        store, models = cast("Any", (federation.store, federation.models))
        return Run(
            federation.config,
            epoch=driver.epoch,
            fleet=driver.fleet,
            now=self.now(),
            resumed=resume(store, models, federation.config.run_id),
            connected=driver.is_connected,
        )

    def _lost(self) -> None:
        self._inbox.clear()
        self._evaluator_free_at = 0.0

    def stop(self) -> None:
        """Stop it as an operator does; it goes on when it is started again."""
        if self.parking.is_parked:
            self._farewell()
            return
        self.driver.step(ev.StopAsked(), self.now())
        self._turn(self.now())  # says farewell, since the run is over for this process

    def close_round(self) -> None:
        """Close the round as an operator does."""
        self._put(ev.CloseAsked())

    def _farewell(self) -> None:
        self.driver.say_farewell()
        assert self.transport is not None
        transport, self.transport = self.transport, None
        transport.stop()
        self.die(0.0)

    # Turns of its loop.

    def _take(self, event: TransportEvent) -> None:
        self._put(event)

    def _put(self, event: TransportEvent | ev.Event | OSError) -> None:
        self._inbox.append(event)
        self.came()
        if len(self._inbox) == 1:
            self.wait_for(self.now() + self.federation.turn_s)

    def _on_deadline(self, now: float) -> None:
        self._turn(now)

    def _turn(self, now: float) -> None:
        """What `coordinator.service` does in a turn."""
        driver, federation = self.driver, self.federation
        events, self._inbox = self._inbox, []
        for event in events:
            self._outlive(functools.partial(self._dispatch, event), now)
        self._outlive(self._unpark if self.parking.is_parked else self._end_turn, now)
        if self.parking.is_parked:
            self.wait_for(self.parking.retry_at)
            return
        assert driver.run is not None
        if federation.is_audited:
            federation.auditor.turned()
        self.wait_for(min(driver.run.deadline(), driver.deadline()))
        if driver.is_over:
            self._farewell()

    def _dispatch(self, event: TransportEvent | ev.Event | OSError, now: float) -> None:
        if isinstance(event, OSError):
            raise event
        if isinstance(event, _FROM_BROKER):
            try:
                self.driver.handle(event, now)
            except (AssertionError, OSError, SupersededError):
                raise
            except Exception as error:
                raise AssertionError(f"I11: {event} raises {error!r}") from error
        else:
            self.driver.step(event, now)

    def _end_turn(self, now: float) -> None:
        driver, federation = self.driver, self.federation
        if self._initial is not None and driver.is_connected:
            model, self._initial = federation.models.open(self._initial), None
            federation.store.set_framing(federation.framing.frame_elements)
            driver.step(ev.ModelPrepared(model.digest, model.layout, federation.framing), now)
        driver.step(ev.TimePassed(), now)
        driver.flush(now)
        self._keep_house()

    # When the disk fails, as `coordinator.service` does it.

    def _outlive(self, work: Callable[[float], None], now: float) -> None:
        try:
            work(now)
        except OSError as error:
            if not survivable(error):
                raise
            self.driver.park()
            self._initial = None
            self._asked_of += 1
            self._evaluator_free_at = 0.0
            if self.parking.failed(str(error), now):
                self.federation.tell("coordinator", f"parked: {error}")

    def _unpark(self, now: float) -> None:
        federation = self.federation
        if now < self.parking.retry_at:
            return
        with federation.disk.write():
            pass  # the room is probed
        federation.store.probe()
        federation.spool.reopen()
        self.driver.write_waiting(federation.config.run_id)
        self.driver.unpark(self._make_run(), now)
        self.parking.resumed(now)
        federation.tell("coordinator", "goes on")
        self._end_turn(now)

    def _keep_house(self) -> None:
        run = self.driver.run
        if run is not None and run.version is not None:
            key = (run.version.round_num, run.best[0] if run.best else None)
            if key != self._retained_for:
                self._retained_for = key
                self._retention.committed(run.config.run_id, *key)

    # Computations, as `coordinator.compute` does them.

    def ask(self, command: ev.Computation, now: float) -> None:
        """See `ComputeLike`."""
        self.tick()
        federation = self.federation
        if isinstance(command, ev.DiscardModel):
            if all(row["digest"] != command.digest for row in federation.store.version_rows):
                federation.models.delete(command.digest)
            return
        if isinstance(command, ev.AggregateUpdates):
            federation.auditor.aggregates(command)
            delay_s = federation.computation_s()
        else:  # by one process, one after the other
            self._evaluator_free_at = max(federation.now, self._evaluator_free_at) + federation.computation_s()
            delay_s = self._evaluator_free_at - federation.now
        asked_of = self._asked_of

        def compute() -> None:
            if asked_of == self._asked_of:
                try:
                    self._compute(command)
                except OSError as error:
                    self._put(error)

        self.call_later(delay_s, compute)

    def _compute(self, command: ev.PrepareModel | ev.EvaluateModel | ev.AggregateUpdates) -> None:
        fails = self.computation_fails and self.federation.rng.random() < self.computation_fails
        models = self.federation.models
        match command:
            case ev.PrepareModel(seed):
                self._initial = models.save(initial_model(seed, self.federation.layout.num_elements))
                self._put(ev.TimePassed())
            case ev.EvaluateModel(round_num, _) if fails:
                self._put(ev.ModelEvaluated(round_num, None, "the evaluation was made to fail"))
            case ev.EvaluateModel(round_num, digest):
                self._put(ev.ModelEvaluated(round_num, evaluate(models.open(digest).elements, 100)))
            case ev.AggregateUpdates() if fails:
                self._put(ev.AggregationBroke("the disk was made to fail"))
            case ev.AggregateUpdates():
                self._put(ev.UpdatesAggregated(self._aggregate(command), 1.0))

    def _aggregate(self, command: ev.AggregateUpdates) -> str:
        federation = self.federation
        updates = [
            Trained(
                update.agent_id,
                command.round_num,
                command.base_digest,
                update.num_examples,
                update.counters,
                federation.spool.elements(command.round_num, update, federation.num_frames),
            )
            for update in command.updates
        ]
        return federation.models.save(average(federation.models.open(command.base_digest), updates))

    # The observer.

    def note(self, note: ev.Note) -> None:
        """See `coordinator.driver.Observer`; so do all that follow."""
        self.tick()
        match note:
            case ev.UpdateReceived():
                self.federation.auditor.noted_update("received")
            case ev.UpdateSettled(_, outcome, reason, _):
                self.federation.auditor.noted_update(outcome, reason)
            case _:
                self.federation.tell("coordinator", note)

    def saved(self, save: ev.Save) -> None:
        self.tick()

    def traffic(self, direction: str, kind: str, size_bytes: int) -> None:
        pass

    def refused(self, kind: str, error: Exception) -> None:
        self.federation.num_refused += 1

    def broker(self, event: Connected | Disconnected) -> None:
        self.federation.tell("coordinator", event)

    def fleet(self, fleet: Fleet, agent_id: str, change: Change | None) -> None:
        if change is not None:
            self.federation.tell("coordinator", (agent_id, change))

    def broker_says(self, topic: str, payload: bytes) -> None:
        raise AssertionError("the simulated broker has no $SYS topics")
