"""Two threads and one core: who may touch it when, what is waited for, and what an error leaves behind. The core is a
stand-in that notes what it is asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine import engine_thread
from engine.engine_thread import EngineThread
from engine.scheduler_output import StepResult
from tests.cluster.server import eventually


class Core:
    """Every event is work for one step. Invariant: `inside` threads at a time, which must never be two."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.work = 0
        self.deadline: float | None = None
        self.sets_deadline_s = 0.0
        self.fails_at = ""
        self.inside = 0

    def _note(self, what: str) -> None:
        self.inside += 1
        assert self.inside == 1, "two threads in the core"
        self.asked.append(what)
        time.sleep(0.0005)
        self.inside -= 1
        if what == self.fails_at:
            raise RuntimeError(f"{what} failed")

    def on(self, event: str, now: float) -> list[str]:
        self._note("on")
        self.work += 1
        return [event]

    def schedule(self, now: float) -> tuple[object | None, list[str]]:
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self._note("deadline")
        if not self.work:
            return None, []
        self.work -= 1
        self._note("schedule")
        return object(), []

    def note_step(self, *_: object) -> None: ...

    def update_from_output(self, *_: object) -> list[str]:
        self._note("update")
        if self.sets_deadline_s and not self.work:
            self.deadline = time.monotonic() + self.sets_deadline_s
        return ["token"]

    def stats(self) -> object:
        return object()

    def abort_all(self, *_: object) -> list[str]:
        self.work = 0
        return ["aborted"]


class Engine:
    def __init__(self, step_s: float = 0.002) -> None:
        self.core = Core()
        self.effects: list[str] = []
        self.crashes: list[str] = []
        self.step_may_end = threading.Event()
        self.step_may_end.set()
        self.num_steps = 0
        core: Any = self.core

        def execute(_output: object) -> StepResult:
            self.num_steps += 1
            time.sleep(step_s)
            assert self.step_may_end.wait(10)
            return StepResult()

        self.thread = EngineThread(core, execute, self.effects.extend, lambda error: self.crashes.append(str(error)))  # type: ignore[arg-type]
        self.thread.start()

    def post(self, *events: Any) -> None:
        self.thread.post(*events)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """No clock helps: the next stats are due when the test is long over."""
    monkeypatch.setattr(engine_thread, "STATS_INTERVAL_S", 100.0)
    made = Engine()
    yield made
    made.step_may_end.set()
    assert made.thread.stop(5.0)


def test_every_event_and_every_step_counts_once(engine: Engine) -> None:
    for number in range(200):
        engine.post(str(number))
        time.sleep(0.0005)
    assert eventually(lambda: engine.effects.count("token") == 200, 10.0)
    assert [effect for effect in engine.effects if effect != "token"] == [str(number) for number in range(200)]
    assert engine.num_steps == 200
    assert not engine.crashes


def test_an_event_does_not_wait_for_the_step(engine: Engine) -> None:
    engine.step_may_end.clear()
    engine.post("first")
    assert eventually(lambda: engine.num_steps == 1, 5.0)
    engine.post("second")
    assert eventually(lambda: engine.effects == ["first", "second"], 5.0)
    assert engine.thread.step_age_s(time.monotonic()) > 0


def test_a_deadline_that_a_step_leaves_behind_is_kept(engine: Engine) -> None:
    engine.core.sets_deadline_s = 0.05
    engine.post("work")
    assert eventually(lambda: "deadline" in engine.core.asked, 5.0)


def test_no_step_begins_after_stop(engine: Engine) -> None:
    engine.step_may_end.clear()
    engine.post("first", "second")
    assert eventually(lambda: engine.num_steps == 1, 5.0)
    assert not engine.thread.stop(0.05), "a step is under way"
    engine.step_may_end.set()
    assert engine.thread.stop(5.0)
    assert engine.num_steps == 1
    assert "token" not in engine.effects


@pytest.mark.parametrize("fails_at", ["on", "schedule", "update"])
def test_after_an_error_nobody_touches_the_core(fails_at: str) -> None:
    """Whichever thread it was on, and however long the log takes."""
    engine = Engine()
    logger = logging.getLogger("twinring.engine")

    class EventsMeanwhile(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            engine.post("late")
            time.sleep(0.05)

    handler = EventsMeanwhile()
    logger.addHandler(handler)
    try:
        engine.core.fails_at = fails_at
        engine.post("early")
        assert eventually(lambda: bool(engine.crashes), 5.0)
        time.sleep(0.02)
    finally:
        logger.removeHandler(handler)
    assert engine.crashes == [f"{fails_at} failed"]
    assert engine.core.asked[-1] == fails_at
    assert "late" not in engine.effects
    assert engine.thread.stop(5.0)
