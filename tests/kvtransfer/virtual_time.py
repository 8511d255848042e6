"""A clock that jumps to the next event, and threads that take turns with the event loop under it: a run of real shells
then depends on its seed alone, and an hour takes no time. Knows nothing of what runs."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Generic, TypeVar

import pytest

from kvtransfer import lane_thread, memory_link

T = TypeVar("T")


class DeadlockError(Exception):
    """Nothing will ever happen any more."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Its own selector: nothing comes from outside, so waiting is setting the clock forward."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self  # what BaseEventLoop waits with
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def select(self, timeout_s: float | None) -> list[Any]:
        if timeout_s is None:
            raise DeadlockError("everybody waits for somebody else")
        self._now += timeout_s
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        future: asyncio.Future[T] = self.create_future()

        def run() -> None:
            result = func(*args)
            if not future.cancelled():
                future.set_result(result)

        turns().thread(run, name="executor").start()
        return future


class Turns:
    """Invariant: of the event loop and its threads exactly one runs; a thread hands over only where it waits."""

    def __init__(self, loop: VirtualLoop, rng: Random) -> None:
        self.loop = loop
        self.rng = rng
        self.alive: list[VirtualThread] = []
        self.bugs: list[BaseException] = []  # what threads died of
        self._running: VirtualThread | None = None
        self._loops_turn = threading.Lock()
        self._loops_turn.acquire()

    def thread(self, target: Callable[[], None], name: str = "", daemon: bool = True) -> VirtualThread:
        return VirtualThread(self, target, name)

    def give_to(self, thread: VirtualThread) -> None:
        """Let it run until it waits. On the event loop."""
        thread.is_due = False
        if thread in self.alive:
            self._running = thread
            thread.turn.release()
            self._loops_turn.acquire()
            self._running = None

    def give_back(self) -> None:
        self._loops_turn.release()

    def wait_for(self, holds: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Of a thread: others run until it holds, or time is up."""
        if holds():
            return True
        thread = self._running
        assert thread is not None, "the event loop must not block"
        thread.awaits, has_expired = holds, threading.Event()
        timer = None if timeout_s is None else self.loop.call_later(timeout_s, self._expire, thread, has_expired)
        while not holds() and not has_expired.is_set():
            self.give_back()
            thread.turn.acquire()
        if timer is not None:
            timer.cancel()
        thread.awaits = None
        return holds()

    def _expire(self, thread: VirtualThread, has_expired: threading.Event) -> None:
        has_expired.set()
        self.give_to(thread)

    def sleep(self, seconds: float) -> None:
        self.wait_for(lambda: False, seconds)

    def changed(self) -> None:
        """Whoever waits for what holds now gets its turn, after a moment of chance."""
        for thread in self.alive:
            if thread.awaits is not None and not thread.is_due and thread.awaits():
                thread.is_due = True
                self.loop.call_later(self.rng.choice((0.0, 0.0, 0.001)), self.give_to, thread)


class VirtualThread:
    """A real thread, so that what runs on it may block anywhere, but only when it has its turn."""

    def __init__(self, turns: Turns, target: Callable[[], None], name: str) -> None:
        self.name = name
        self.turn = threading.Lock()
        self.turn.acquire()
        self.awaits: Callable[[], bool] | None = None
        self.is_due = False
        self._turns = turns
        self._target = target
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._turns.alive.append(self)
        self._thread.start()
        self._turns.loop.call_soon(self._turns.give_to, self)

    def join(self, timeout_s: float | None = None) -> None:
        self._turns.wait_for(lambda: not self.is_alive(), timeout_s)

    def is_alive(self) -> bool:
        return self in self._turns.alive

    def _run(self) -> None:
        self.turn.acquire()
        try:
            self._target()
        except BaseException as bug:  # noqa: BLE001 - a thread that dies is what the run reports
            self._turns.bugs.append(bug)
        self._turns.alive.remove(self)
        self._turns.changed()
        self._turns.give_back()


class VirtualCondition:
    def __enter__(self) -> VirtualCondition:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for(self, holds: Callable[[], object], timeout_s: float | None = None) -> bool:
        return turns().wait_for(lambda: bool(holds()), timeout_s)

    def notify_all(self) -> None:
        turns().changed()


class VirtualQueue(Generic[T]):
    def __init__(self) -> None:
        self._items: deque[T] = deque()

    def put(self, item: T) -> None:
        self._items.append(item)
        turns().changed()

    def get(self) -> T:
        turns().wait_for(lambda: bool(self._items))
        return self._items.popleft()


class VirtualThreading:
    """Stands where a module says `threading`. Its locks are never held across a wait."""

    Lock = staticmethod(threading.Lock)
    Condition = VirtualCondition

    @staticmethod
    def Thread(target: Callable[[], None], name: str = "", daemon: bool = True) -> VirtualThread:
        return turns().thread(target, name)


_current: list[Turns] = []


def turns() -> Turns:
    return _current[-1]


@contextmanager
def taking_turns(loop: VirtualLoop, rng: Random) -> Iterator[Turns]:
    """While it lasts, the lanes and links that are made have virtual threads, and `turns()` is this run's."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lane_thread, memory_link):
            patch.setattr(module, "threading", VirtualThreading)
        patch.setattr(lane_thread, "SimpleQueue", VirtualQueue)
        _current.append(Turns(loop, rng))
        try:
            yield turns()
        finally:
            _current.pop()
