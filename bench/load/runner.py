"""Carries a plan out against a server: each load level in turn, open or closed loop. Keeps the time; what is due when
and what came of it are decided in arrivals.py, trace.py and report.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from bench.load.arrivals import schedule
from bench.load.client import LoadClient, connected
from bench.load.outcome import Outcome
from bench.load.plan import Plan, Target
from bench.load.probe import Manner, find_manner
from bench.load.report import LevelReport, level_report
from bench.load.trace import replayed
from bench.load.wording import random_prompt, traced_prompt
from simulator.traces import read_trace

LAG_PERIOD_S = 0.01
PAUSE_AFTER_FAILURE_S = 0.1  # of a closed loop's client: a dead server must not be hammered

BodyOf = Callable[[int], bytes]  # the index-th request of a level


class Watcher(Protocol):
    """Told how a run goes on."""

    def level_began(self, name: str, num_requests: int | None, duration_s: float | None) -> None: ...
    def request_ended(self, outcome: Outcome) -> None: ...
    def level_ended(self, report: LevelReport) -> None: ...


@dataclass(frozen=True, slots=True)
class Level:
    """Open loop where there is a schedule, else closed."""

    name: str
    load: float | None
    body_of: BodyOf
    schedule: tuple[float, ...] | None = None
    num_requests: int | None = None
    duration_s: float | None = None

    @property
    def offered_s(self) -> float:
        return self.duration_s or (self.schedule[-1] if self.schedule else 0.0)


async def run_plan(target: Target, plan: Plan, watcher: Watcher) -> list[str]:
    """Notes on the whole run; the levels' reports go to the watcher as they come. ValueError where the server does not
    answer, or the trace cannot be read."""
    notes: list[str] = []
    allow_many_connections()
    async with connected(target) as client:
        manner = await find_manner(client, target)
        notes += [f"model {manner.dialect.model}", *manner.notes]
        levels = levels_of(plan, manner, notes)
        await warm_up(client, plan, manner)
        for level in levels:
            watcher.level_began(level.name, level.num_requests, level.duration_s)
            watcher.level_ended(await run_level(client, level, plan, watcher))
    return notes


def allow_many_connections() -> None:
    """An open loop against a server that hangs needs a connection per request."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# --- from a plan to levels ------------------------------------------------------------------------------------------


def levels_of(plan: Plan, manner: Manner, notes: list[str]) -> list[Level]:
    if plan.trace is not None:
        return [trace_level(plan, plan.trace, manner, notes)]
    return [open_level(plan, rate, manner) for rate in plan.rates] + [
        closed_level(plan, concurrency, manner) for concurrency in plan.concurrencies
    ]


def open_level(plan: Plan, rate: float, manner: Manner) -> Level:
    name = f"rate {rate:g}"
    due = schedule(
        plan.arrivals,
        rate,
        Random(f"{plan.seed}/{name}"),
        duration_s=plan.level_duration_s,
        num_requests=plan.num_requests,
        burst_size=plan.burst_size,
    )
    return Level(name, rate, body_maker(plan, manner, name), tuple(due), len(due), plan.level_duration_s)


def closed_level(plan: Plan, concurrency: int, manner: Manner) -> Level:
    name = f"concurrency {concurrency}"
    body_of = body_maker(plan, manner, name)
    return Level(name, concurrency, body_of, None, plan.num_requests, plan.level_duration_s)


def trace_level(plan: Plan, path: str, manner: Manner, notes: list[str]) -> Level:
    trace = read_trace(Path(path))
    notes += trace.notes()
    requests = replayed(
        trace,
        speed=plan.speed,
        scale=plan.trace_scale,
        duration_s=plan.duration_s,
        num_requests=plan.num_requests,
    )

    def body_of(index: int) -> bytes:
        request = requests[index]
        prompt = traced_prompt(manner.lexicon, Random, plan.seed, request)
        return manner.dialect.body(prompt, request.num_output_tokens)

    due = tuple(request.at_s for request in requests)
    return Level("trace", None, body_of, due, len(due), plan.duration_s)


def body_maker(plan: Plan, manner: Manner, name: str) -> BodyOf:
    def body_of(index: int) -> bytes:
        prompt = random_prompt(
            manner.lexicon, Random, plan.seed, f"{name}/{index}", plan.num_prompt_tokens, plan.num_shared_tokens
        )
        return manner.dialect.body(prompt, plan.num_output_tokens)

    return body_of


# --- sending --------------------------------------------------------------------------------------------------------


async def warm_up(client: LoadClient, plan: Plan, manner: Manner) -> None:
    """Requests whose outcomes do not count, one after another."""
    body_of = body_maker(plan, manner, "warmup")
    for index in range(plan.num_warmup):
        await client.ask(body_of(index))


async def run_level(client: LoadClient, level: Level, plan: Plan, watcher: Watcher) -> LevelReport:
    async with lag_watch() as lags_s:
        send = closed_loop if level.schedule is None else open_loop
        outcomes = await send(client, level, watcher)
    return level_report(
        level.name,
        level.load,
        outcomes,
        plan.slo,
        offered_s=level.offered_s,
        loop_lags_s=lags_s,
        num_shared_tokens=plan.num_shared_tokens if plan.trace is None else None,
    )


async def open_loop(client: LoadClient, level: Level, watcher: Watcher) -> Sequence[Outcome]:
    """Sends at each instant of the schedule, whatever has come of earlier requests."""
    assert level.schedule is not None

    async def one(body: bytes, due_at: float) -> Outcome:
        outcome = await client.ask(body, due_at)
        watcher.request_ended(outcome)
        return outcome

    bodies = map(level.body_of, itertools.count())  # each is made before its instant, not at it
    tasks = []
    body = next(bodies) if level.schedule else b""
    client.restart_clock()
    async with asyncio.TaskGroup() as group:
        for index, due_at in enumerate(level.schedule):
            await asyncio.sleep(max(0.0, due_at - client.now))
            tasks.append(group.create_task(one(body, due_at)))
            if index + 1 < len(level.schedule):
                body = next(bodies)
    return [task.result() for task in tasks]


async def closed_loop(client: LoadClient, level: Level, watcher: Watcher) -> Sequence[Outcome]:
    """Clients that ask again when they have their answer, until the time is up or the requests are all sent."""
    assert level.load is not None
    outcomes: list[Outcome] = []
    indices: Iterator[int] = itertools.islice(itertools.count(), level.num_requests)

    async def one_client() -> None:
        for index in indices:
            if level.duration_s is not None and client.now >= level.duration_s:
                return
            outcome = await client.ask(level.body_of(index))
            outcomes.append(outcome)
            watcher.request_ended(outcome)
            if not outcome.is_ok:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    client.restart_clock()
    async with asyncio.TaskGroup() as group:
        for _ in range(int(level.load)):
            group.create_task(one_client())
    return outcomes


@contextlib.asynccontextmanager
async def lag_watch() -> AsyncIterator[list[float]]:
    """How much later than asked this process's event loop wakes up: what it adds to each instant it notes."""
    lags_s: list[float] = []

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_PERIOD_S)
            lags_s.append(time.monotonic() - before - LAG_PERIOD_S)

    task = asyncio.create_task(watch())
    try:
        yield lags_s
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
