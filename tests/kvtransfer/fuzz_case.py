"""One case of the protocol under fire: a few lives of three workers, a few transfers between them, and what the seed
says goes wrong. Real agents, lanes and links; only the clock, the threads' turns and gRPC are stood in for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import grpc
import pytest

from kvtransfer import memory_link
from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.memory_link import MemoryLink, MemoryTransport, MemoryWire
from kvtransfer.messages import LinkOffer
from kvtransfer.transport import OnFailure
from protos.types import PeerRef, Role, TransferKind
from tests.kvtransfer.fuzz_host import LAYOUT, Expecting, FuzzHost, Manners, hashes_of
from tests.kvtransfer.fuzz_weather import KINDS, LONGEST_DELAY_S, Odds, SeededWeather
from tests.kvtransfer.virtual_network import Network
from tests.kvtransfer.virtual_time import DeadlockError, Turns, VirtualCondition, VirtualLoop, taking_turns
from tests.kvtransfer.workers import SECRET

CONFIG = TransferConfig(
    chunk_nbytes=2 * LAYOUT.block_nbytes,
    num_staging_chunks=2,
    chunk_timeout_s=0.4,
    offer_timeout_s=0.8,
    expect_timeout_s=0.5,
    transfer_timeout_s=1.5,
    connect_timeout_s=0.5,
    ping_interval_s=0.4,
    silence_timeout_s=0.9,
    max_lazy_links=1,
)
EVERYTHING_HAS_ENDED_S = 12.0
CALM = Odds()
AVERAGE = Manners()
FAULTS = ("cut stream", "cut wire", "stall wire", "kill", "stop", "leave", "abort", "close")


@dataclass(frozen=True)
class Plan:
    """What a case is made of; drawn by `plan_of`, or written by a test that wants one thing."""

    seed: int
    odds: Odds = CALM
    num_jobs: int = 2
    flips: float = 0.0  # odds of a flipped bit in one staged chunk
    faults: tuple[tuple[int, str], ...] = ()  # at which step, what
    slowness_s: float = 0.0  # of copying one block
    manners: Manners = AVERAGE
    config: TransferConfig = CONFIG
    third: Role | None = None  # of a worker beside a prefill and a decode worker


def plan_of(seed: int) -> Plan:
    rng = Random(f"plan {seed}")
    kinds = tuple(rng.sample(KINDS, rng.choice((1, 2, len(KINDS)))))
    num_faults = rng.choice((0, 0, 1, 1, 2, 3))
    return Plan(
        seed,
        Odds(rng.choice((0.0, 0.03, 0.1, 0.3)), kinds, rng.random() < 0.8),
        num_jobs=rng.randint(1, 4),
        flips=rng.choice((0.0, 0.0, 0.05, 0.3)),
        faults=tuple((rng.randrange(10, 90), rng.choice(FAULTS)) for _ in range(num_faults)),
        slowness_s=rng.choice((0.0, 0.0, 0.002, 0.05)),
        third=rng.choice((None, Role.PREFILL, Role.DECODE)),
    )


@dataclass
class Result:
    violations: list[str]
    trace: list[str]  # what happened, in order: equal for equal seeds
    num_arrived: int = 0
    num_lost: int = 0


def run_case(plan: Plan) -> Result:
    loop = VirtualLoop()
    rng = Random(f"case {plan.seed}")
    result = Result([], [])
    with taking_turns(loop, rng) as turns:
        loop.set_exception_handler(lambda _, context: result.violations.append(f"a bug in a callback: {context}"))
        try:
            loop.run_until_complete(Case(plan, rng, turns, result).run())
            loop.close()
        except DeadlockError as deadlock:
            result.violations.append(str(deadlock))
        result.violations += [f"a thread died of {bug!r}" for bug in turns.bugs]
    return result


class ShakyWire(MemoryWire):
    """Flips a bit of what is staged, by the case's odds, and is a step of the case each time something moves."""

    def __init__(self, case: Case) -> None:
        super().__init__(changed=VirtualCondition())  # type: ignore[arg-type]
        self._case = case

    def move(self) -> None:
        staged = self.sent.get(self.num_done)
        if staged is not None and self.num_done in self.posted and self._case.rng.random() < self._case.plan.flips:
            bit = self._case.rng.randrange(8 * staged.numel())
            staged[bit // 8] ^= 1 << bit % 8
        num_done = self.num_done
        super().move()
        if self.num_done > num_done:
            self._case.step()


class OwnTransport(MemoryTransport):
    """One life's; `wires` is common to all lives, `mine` are those that end here."""

    def __init__(self, config: TransferConfig, wires: dict[str, MemoryWire]) -> None:
        super().__init__(config)
        self.wires = wires
        self.mine: list[MemoryWire] = []

    def listen(self, beacon: str, on_failure: OnFailure) -> memory_link.MemoryReceiverLink:
        link = super().listen(beacon, on_failure)
        self.mine.append(self.wires[link.offer.prefix])
        return link

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> MemoryLink:
        """What nobody listens on is a wire like any other: nobody comes."""
        self.wires.setdefault(offer.prefix, memory_link.MemoryWire())
        self.mine.append(self.wires[offer.prefix])
        return super().dial(offer, on_failure)


class Life:
    """One incarnation of one worker."""

    def __init__(self, case: Case, worker_id: str, number: int, role: Role) -> None:
        self.worker_id, self.role = worker_id, role
        self.incarnation = f"{worker_id}.{number}"
        self.is_killed = self.is_closed = False
        plan = case.plan
        self.host = FuzzHost(case.turns, case.rng, plan.manners, plan.slowness_s, case.result.violations)
        self.transport = OwnTransport(plan.config, case.wires)
        self.agent = TransferAgent(self.ref(self), self.host.store, self.host, plan.config, SECRET, self.transport)
        self.host.agent = self.agent
        self.agent.add_to_server(case.network.join(self.incarnation))  # type: ignore[arg-type]

    def ref(self, seen_by: Life) -> PeerRef:
        return PeerRef(self.worker_id, self.incarnation, f"{seen_by.incarnation}>{self.incarnation}", self.role)


class Case:
    """Invariant: `lives` has every life that ever was; `members` those that the router knows."""

    def __init__(self, plan: Plan, rng: Random, turns: Turns, result: Result) -> None:
        self.plan, self.rng, self.turns, self.result = plan, rng, turns, result
        self.loop = turns.loop
        self.wires: dict[str, MemoryWire] = {}
        self.network: Network
        self.lives: list[Life] = []
        self.members: list[Life] = []
        self._version = 0
        self._num_steps = 0
        self._begins_until = 0.0
        self._faults = sorted(plan.faults)
        self._closing: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        self.weather = SeededWeather(self.rng, self.plan.odds, self.step)
        self.network = Network(self.weather)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpc.aio, "insecure_channel", self.network.channel)
            patch.setattr(memory_link, "MemoryWire", partial(ShakyWire, self))
            for worker_id, role in (("p0", Role.PREFILL), ("d0", Role.DECODE), ("x0", self.plan.third)):
                if role is not None:
                    await self.be_born(worker_id, role)
            await self._until_warm()
            for number in range(self.plan.num_jobs):
                self._begin_later(self.rng.choice((0.0, 0.01, 0.3)), self.start_job, number)
            await self._until_all_ended()
            await self._close()
        self._check()

    async def _until_warm(self) -> None:
        """As far as the weather lets them."""
        num_decode = sum(life.role is Role.DECODE for life in self.members)
        sources = [life for life in self.members if life.role is Role.PREFILL]
        while self.loop.time() < 1.0 and any(len(one.agent.warm_links) < num_decode for one in sources):  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    # --- lives --------------------------------------------------------------------------------------------------------

    async def be_born(self, worker_id: str, role: Role) -> None:
        life = Life(self, worker_id, sum(life.worker_id == worker_id for life in self.lives), role)
        self.lives.append(life)
        self.members.append(life)
        await life.agent.start()
        self.announce_members()

    def announce_members(self) -> None:
        """Each hears of it in its own time, so that views differ for a while."""
        self._version += 1
        for life in self.lives:
            refs = tuple(member.ref(life) for member in self.members)
            self.loop.call_later(self.rng.choice((0.0, 0.002, 0.1)), self._hear, life, self._version, refs)

    def _hear(self, life: Life, version: int, refs: tuple[PeerRef, ...]) -> None:
        if not life.is_killed and not life.is_closed:
            life.agent.set_members(version, refs)

    async def _reborn(self, former: Life) -> None:
        await asyncio.sleep(self.rng.choice((0.01, 0.5)))
        if former in self.members:
            self.members.remove(former)
        await self.be_born(former.worker_id, former.role)

    def _begin_later(self, delay_s: float, what: Callable[..., None], *args: object) -> None:
        self._begins_until = max(self._begins_until, self.loop.time() + delay_s)
        self.loop.call_later(delay_s, what, *args)

    # --- transfers ----------------------------------------------------------------------------------------------------

    def start_job(self, number: int) -> None:
        request, attempt = f"r{number}", 1
        if len(self.members) < 2:
            return
        source, destination = self.rng.sample(self.members, 2)
        hashes = hashes_of(request, self.rng.randint(1, 5))
        kind = self.rng.choice(tuple(TransferKind))
        if self.rng.random() < 0.2:
            self._hold_a_prefix(destination, hashes)
        if kind is TransferKind.HANDOFF:
            by_role = {life.role: life for life in self.rng.sample(self.members, len(self.members))}
            if len(by_role) == 2:
                self.hand_over(by_role[Role.PREFILL], by_role[Role.DECODE], request, attempt, hashes)
            return
        if kind is TransferKind.MIGRATE:
            self.hand_over(source, destination, request, attempt, hashes, kind)
            return
        if (ids := source.host.compute(hashes)) is None:
            return
        source.host.pool.release(ids)  # to its prefix cache
        if kind is TransferKind.PULL:
            destination.host.pull(source.worker_id, request, attempt, hashes, kind)
        else:
            source.agent.offer_return(destination.worker_id, request, attempt, hashes)

    def _hold_a_prefix(self, life: Life, hashes: tuple[bytes, ...]) -> None:
        if ids := life.host.compute(hashes[: self.rng.randint(1, len(hashes))]):
            life.host.pool.release(ids)

    def hand_over(
        self,
        source: Life,
        destination: Life,
        request: str,
        attempt: int,
        hashes: tuple[bytes, ...],
        kind: TransferKind = TransferKind.HANDOFF,
    ) -> None:
        """Or migrate: then with room to grow, and nothing is sent before it is granted."""
        rng, migrates = self.rng, kind is TransferKind.MIGRATE
        if (ids := source.host.compute(hashes)) is None:
            return
        transfer_id, tokens = rng.randbytes(16), (rng.randrange(100),) * rng.randrange(3)
        announced = Expecting(request, attempt, hashes, tokens, kind)
        num_offered = len(ids) + (rng.randrange(3) if migrates else 0)

        def expect() -> None:
            if destination.is_closed:
                return
            destination.host.expect(transfer_id, announced)
            destination.agent.expect(transfer_id, source.ref(destination), request, attempt, kind)

        def offer() -> None:
            if source.is_closed:
                source.host.pool.release(ids)
                return
            source.host.lend(transfer_id, ids)
            compute = partial(self._compute_on, source, transfer_id, tuple(ids), 0, tokens)
            if migrates:
                source.host.when_granted[transfer_id] = compute
            source.agent.open(transfer_id, destination.ref(source), request, attempt, num_offered, kind)
            if not migrates:
                compute()

        for what in (expect, offer):
            self._begin_later(rng.choice((0.0, 0.0, 0.002, 0.1, self.plan.manners.lateness_s)), what)
        if attempt == 1 and rng.random() < 0.3:
            self._begin_later(0.4, self.hand_over, source, destination, request, 2, hashes, kind)

    def _compute_on(
        self, source: Life, transfer_id: bytes, ids: tuple[int, ...], start: int, tokens: tuple[int, ...]
    ) -> None:
        """Chunk after chunk, as prefill does; a few stop for good on the way."""
        if source.is_closed or source.host.sending[transfer_id].end or self.rng.random() < self.plan.manners.abandons:
            return
        if start == len(ids):
            source.agent.commit(transfer_id, len(tokens), tokens)
            return
        stop = self.rng.randint(start + 1, len(ids))
        source.agent.send_blocks(transfer_id, start, ids[start:stop])
        pause_s = self.rng.choice((0.0, 0.003, 0.05))
        self.loop.call_later(pause_s, self._compute_on, source, transfer_id, ids, stop, tokens)

    # --- faults -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Something has moved: a frame now, or bytes."""
        self._num_steps += 1
        while self._faults and self._faults[0][0] <= self._num_steps:
            self.loop.call_soon(self._happen, self._faults.pop(0)[1])

    def _happen(self, fault: str) -> None:
        rng = self.rng
        wires = [wire for wire in self.wires.values() if wire.num_connected == 2 and not wire.failure]
        self.note(fault)
        match fault:
            case "cut stream" if self.network.streams:
                rng.choice(self.network.streams).cut("cut")
            case "cut wire" if wires:
                rng.choice(wires).cut()
            case "stall wire" if wires:
                self._stall(rng.choice(wires), rng.choice((0.1, 0.3, 60.0)))
            case "kill" | "stop" | "leave" | "close" if self.members:
                self._befall(fault, rng.choice(self.members))
            case "abort":
                self._abort_one()

    def _stall(self, wire: MemoryWire, duration_s: float) -> None:
        wire.stall()
        self.loop.call_later(duration_s, wire.stall, False)

    def _befall(self, fault: str, life: Life) -> None:
        if fault == "stop":
            duration_s = self.rng.choice((0.1, 0.5, 2.0))
            self.weather.held_until[life.incarnation] = self.loop.time() + duration_s
            for wire in life.transport.mine:
                self._stall(wire, duration_s)
            return
        if fault in ("kill", "close"):
            if fault == "kill":
                life.is_killed = True
                self.network.kill(life.incarnation)
                for wire in life.transport.mine:
                    wire.cut("killed")
            self._closing.append(self.loop.create_task(self._close_life(life)))
        self.members.remove(life)
        self.loop.call_later(self.rng.choice((0.0, 0.3)), self.announce_members)
        if self.rng.random() < 0.7:
            self._closing.append(self.loop.create_task(self._reborn(life)))

    def _abort_one(self) -> None:
        ids = [
            (life, transfer_id)
            for life in self.lives
            for book in (life.host.sending, life.host.expecting)
            for transfer_id, one in book.items()
            if not one.end and not life.is_closed
        ]
        if ids:
            life, transfer_id = self.rng.choice(ids)
            life.agent.abort(transfer_id, "the client left")

    def note(self, what: str) -> None:
        self.result.trace.append(f"{self.loop.time():.6f} {what}")

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _until_all_ended(self) -> None:
        """At least until the last of them has begun."""
        await asyncio.sleep(0.1)
        while self._begins_until + 0.1 > self.loop.time() or any(life.host.num_open for life in self.lives):
            if self.loop.time() > EVERYTHING_HAS_ENDED_S:
                break
            await asyncio.sleep(0.1)
        self.weather.odds = CALM
        self._faults.clear()  # nobody leaves, and comes again, while all are being closed
        await asyncio.sleep(LONGEST_DELAY_S + CONFIG.expect_timeout_s)  # offers unwanted, or that never come
        open_ones = [life.incarnation for life in self.lives if life.host.num_open or life.agent.open_transfers]
        self._check_that(not open_ones, f"transfers of {open_ones} do not end")

    async def _close_life(self, life: Life) -> None:
        if not life.is_closed:
            life.is_closed = True
            await life.agent.close()

    async def _close(self) -> None:
        await asyncio.gather(*self._closing)
        await asyncio.gather(*(self._close_life(life) for life in self.lives))
        await asyncio.sleep(CONFIG.connect_timeout_s + CONFIG.offer_timeout_s + LONGEST_DELAY_S)  # whoever asked
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        self._check_that(not left, f"tasks are left: {left}")
        self._check_that(not self.turns.alive, f"threads are left: {[thread.name for thread in self.turns.alive]}")
        self._check_that(not self.network.streams, "streams are left")

    def _check(self) -> None:
        for life in self.lives:
            life.host.check_books()
            for number in range(self.plan.num_jobs):
                life.host.check_cache(hashes_of(f"r{number}", 5))
            for transfer_id, one in life.host.expecting.items():
                self.note(f"{life.incarnation} {transfer_id.hex()} {one.kind} {one.end}")
                self._check_that(bool(one.end), f"no end was told of {one}")
                self.result.num_arrived += one.end == "arrived"
                self.result.num_lost += one.end == "lost"
            for transfer_id, sent in life.host.sending.items():
                self.note(f"{life.incarnation} {transfer_id.hex()} {sent.end}")
                self._check_that(bool(sent.end), f"no end was told of {transfer_id.hex()} at its source")
            self._check_that(life.agent.open_transfers == 0, "transfers are open after close")

    def _check_that(self, holds: bool, violation: str) -> None:
        if not holds:
            self.result.violations.append(violation)
