"""Who owns a worker's scheduler and blocks: one of two threads at a time. One takes events from any thread as they
come, so that a question to this worker, or a grant, does not wait for a step that it has nothing to do with. The other
runs the steps, and between two of them does what is due itself: to wake a thread twice for every token costs more than
the scheduler. Every batch of effects goes to the event loop in one call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from engine.events import Effect, Event
from engine.scheduler_output import SchedulerOutput, StepResult
from engine.worker_core import WorkerCore
from protos.types import WorkerStats

logger = logging.getLogger("twinring.engine")

STATS_INTERVAL_S = 0.2


@dataclass(slots=True)
class _Step:
    output: SchedulerOutput
    started_at: float
    duration_s: float = 0.0
    result: StepResult | None = None  # set last, by the step thread


class EngineThread:
    """Invariant: once the threads have started, whoever touches `core` holds `_owning`, and nobody holds it during a
    step. At most one step is under way; it reads what the core has lent it (ScheduledRequest), which no event changes,
    and writes to blocks that nobody else has."""

    def __init__(
        self,
        core: WorkerCore,
        execute: Callable[[SchedulerOutput], StepResult],
        deliver: Callable[[Sequence[Effect]], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        """`deliver` and `on_crash` are called on either thread, the former with the core held; they only pass on.
        `execute` is called on its own."""
        self._core = core
        self._execute = execute
        self._deliver = deliver
        self._on_crash = on_crash
        self._inbox: list[Event] = []
        self._fence_reason: str | None = None
        self._stopping = False
        self._has_news = False
        self._wake = threading.Condition()  # taken with or without _owning, never before it
        self._owning = threading.Lock()
        self._step: _Step | None = None  # under way, or over and not yet taken over
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        self.stats: WorkerStats = core.stats()
        self._stats_due_at = 0.0
        self._thread = threading.Thread(target=self._run, name="twinring-engine", daemon=True)
        self._step_thread = threading.Thread(target=self._run_steps, name="twinring-step", daemon=True)

    def start(self) -> None:
        self._step_thread.start()
        self._thread.start()

    def post(self, *events: Event) -> None:
        with self._wake:
            self._inbox.extend(events)
            self._tell()

    def fence(self, reason: str) -> None:
        """End every request here without a word to the router: somebody else may own them by now."""
        with self._wake:
            self._fence_reason = reason
            self._tell()

    def stop(self, timeout_s: float) -> bool:
        """False where a thread was still in a step, or in the core, after timeout_s."""
        give_up_at = time.monotonic() + timeout_s
        with self._wake:
            self._stopping = True
            self._tell()
        self._steps.put(None)
        for thread in (self._thread, self._step_thread):
            thread.join(max(0.0, give_up_at - time.monotonic()))
        return not (self._thread.is_alive() or self._step_thread.is_alive())

    def step_age_s(self, now: float) -> float:
        """How long the current step has been running; 0 between steps."""
        step = self._step
        return 0.0 if step is None else now - step.started_at

    # --- what is due --------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """After an error nobody touches the core again: half of a change may be in it."""
        with self._owning:
            if self._stopping:
                return
            try:
                self._do_what_is_due()
            except BaseException:
                self._stopping = True
                raise

    def _do_what_is_due(self) -> None:
        with self._wake:
            events, self._inbox = self._inbox, []
        self._handle(events)
        if self._step is not None and self._step.result is not None:
            self._end_step(self._step, self._step.result)
        if self._step is None:
            self._start_step()

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

    def _start_step(self) -> None:
        output, opened = self._core.schedule(time.monotonic())
        if opened:
            self._deliver(opened)
        if output is not None:
            self._step = _Step(output, time.monotonic())
            self._steps.put(self._step)

    def _end_step(self, step: _Step, result: StepResult) -> None:
        self._step = None
        self._core.note_step(step.output, step.duration_s)
        effects = self._core.update_from_output(step.output, result, time.monotonic())
        if effects:
            self._deliver(effects)

    def _tell(self) -> None:
        """With the lock held."""
        self._has_news = True
        self._wake.notify()

    # --- the thread of the events -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wait()
                self._turn()
        except BaseException as error:  # the thread is the worker: whatever ended it must end the worker
            logger.exception("engine thread ended")
            self._on_crash(error)

    def _wait(self) -> None:
        """For events, a deadline where no step is under way, or the time of the next stats.

        Those come with no event: taken with one, they would nearly always show what it brought as waiting."""
        with self._owning:
            deadline = self._core.deadline if self._step is None else None
        due_at = self._stats_due_at if deadline is None else min(self._stats_due_at, deadline)
        with self._wake:
            self._wake.wait_for(lambda: self._has_news, max(0.0, due_at - time.monotonic()))
            self._has_news = False

    # --- the thread of the steps --------------------------------------------------------------------------------------

    def _run_steps(self) -> None:
        try:
            while (step := self._steps.get()) is not None and not self._stopping:
                started_at = time.monotonic()
                result = self._execute(step.output)
                step.duration_s, step.result = time.monotonic() - started_at, result
                self._turn()
                if self._step is None:  # the other thread waits for the core's deadline from now on
                    with self._wake:
                        self._tell()
        except BaseException as error:  # a step that failed may have written half of its blocks
            logger.exception("step thread ended")
            self._on_crash(error)
