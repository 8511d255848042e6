"""The one thread that owns a worker's scheduler and blocks. Takes events from any thread between steps, runs the step,
and hands every batch of effects to the event loop in one call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from engine.events import Effect, Event
from engine.scheduler_output import SchedulerOutput, StepResult
from engine.worker_core import WorkerCore
from protos.types import WorkerStats

logger = logging.getLogger("twinring.engine")

STATS_INTERVAL_S = 0.2


class EngineThread:
    """Invariant: nobody else touches `core` once the thread has started."""

    def __init__(
        self,
        core: WorkerCore,
        execute: Callable[[SchedulerOutput], StepResult],
        deliver: Callable[[Sequence[Effect]], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        """`deliver` and `on_crash` are called on the engine thread; they only pass on."""
        self._core = core
        self._execute = execute
        self._deliver = deliver
        self._on_crash = on_crash
        self._inbox: list[Event] = []
        self._fence_reason: str | None = None
        self._stopping = False
        self._wake = threading.Condition()
        self._step_started_at: float | None = None
        self.stats: WorkerStats = core.stats()
        self._stats_due_at = 0.0
        self._thread = threading.Thread(target=self._run, name="twinring-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, *events: Event) -> None:
        with self._wake:
            self._inbox.extend(events)
            self._wake.notify()

    def fence(self, reason: str) -> None:
        """End every request here without a word to the router: somebody else may own them by now."""
        with self._wake:
            self._fence_reason = reason
            self._wake.notify()

    def stop(self, timeout_s: float) -> bool:
        """False where the thread was still in a step after timeout_s."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def step_age_s(self, now: float) -> float:
        """How long the current step has been running; 0 between steps."""
        started_at = self._step_started_at
        return 0.0 if started_at is None else now - started_at

    def _run(self) -> None:
        try:
            busy = False
            while not self._stopping:
                self._handle(self._take(wait=not busy))
                busy = self._step()
        except BaseException as error:  # the thread is the worker: whatever ended it must end the worker
            logger.exception("engine thread ended")
            self._on_crash(error)

    def _take(self, wait: bool) -> list[Event]:
        with self._wake:
            if wait and not self._inbox and not self._stopping and self._fence_reason is None:
                self._wake.wait(STATS_INTERVAL_S)
            events, self._inbox = self._inbox, []
            return events

    def _handle(self, events: list[Event]) -> None:
        now = time.monotonic()
        effects: list[Effect] = []
        for event in events:
            effects += self._core.on(event, now)
        if self._fence_reason is not None:
            effects += self._core.abort_all(now, self._fence_reason)
        if effects:
            self._deliver(effects)
        if now >= self._stats_due_at:
            self.stats = self._core.stats()
            self._stats_due_at = now + STATS_INTERVAL_S

    def _step(self) -> bool:
        """Run one step; False where there was nothing to compute."""
        output, opened = self._core.schedule(time.monotonic())
        if opened:
            self._deliver(opened)
        if output is None:
            return False
        started_at = self._step_started_at = time.monotonic()
        result = self._execute(output)
        ended_at = time.monotonic()
        self._step_started_at = None
        self._core.note_step(output, ended_at - started_at)
        effects = self._core.update_from_output(output, result, ended_at)
        if effects:
            self._deliver(effects)
        return True
