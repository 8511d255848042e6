"""A WorkerCore with a fake model and a fake KV memory, and a fake network that moves KV between such workers.

A fake KV entry is a digest of the whole prefix up to its token, so a block that was reused too early, matched wrongly
or copied to the wrong place is noticed by the first request that attends to it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from zlib import crc32

from engine.config import HostTierConfig, PullConfig, SchedulerConfig
from engine.events import (
    AbortTransfer,
    BlocksSent,
    CommitTransfer,
    Copied,
    CopyBlocks,
    CopyDirection,
    CopyLost,
    Effect,
    Event,
    GrantTransfer,
    OfferReturn,
    OpenTransfer,
    RefusePull,
    RefuseTransfer,
    RequestPull,
    SendBlocks,
    Submitted,
)
from engine.scheduler_output import ScheduledRequest, SchedulerOutput, StepResult
from engine.worker_core import WorkerCore
from protos.types import (
    GenerateRequest,
    Handoff,
    HandoffRefused,
    PeerRef,
    Role,
    SamplingParams,
    TokenOutput,
    TransferKind,
)

KEY = b"k" * 16
PEER = PeerRef("other", "1", "host:1", Role.DECODE)
Change = int | bool | PullConfig | HostTierConfig  # of a setting
T, T2 = b"transfer-one", b"transfer-two"
PROMPT = list(range(10))  # two full blocks and a tail


def config(**changes: Change) -> SchedulerConfig:
    values: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "block_size": 4,
        "hash_block_size": 2,
        **changes,
    }
    return SchedulerConfig(**values)


def generate(
    request_id: str,
    token_ids: Sequence[int],
    *,
    max_tokens: int = 4,
    num_committed: int = 0,
    attempt: int = 1,
    priority: int = 0,
    stop: tuple[int, ...] = (),
    to: bytes | None = None,
    source: bytes | None = None,
    salt: bytes = b"",
    homes: Sequence[str] = (),
    returns_to: str = "",
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        client_request_id=request_id,
        attempt=attempt,
        token_ids=array("i", token_ids),
        num_prompt_tokens=len(token_ids) - num_committed,
        sampling_params=SamplingParams(0.0, 1.0, 0, 0, max_tokens, stop),
        cache_salt=salt,
        priority=priority,
        handoff_to=None if to is None else Handoff(to, PEER),
        handoff_from=None if source is None else Handoff(source, PEER),
        home_worker_ids=tuple(homes),
        return_worker_id=returns_to,
    )


def digest(token_ids: Sequence[int]) -> int:
    return crc32(array("i", token_ids).tobytes())


def next_token(token_ids: Sequence[int]) -> int:
    return digest(token_ids) % 1000


def expected_output(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(token_ids) :]


TOKEN = next_token(PROMPT)


class FakeWorker:
    """Runs steps of a core and keeps what it said."""

    def __init__(self, num_blocks: int = 8, worker_id: str = "w", **changes: Change) -> None:
        self.config = config(**changes)
        self.ref = PeerRef(worker_id, "1", "host:1", Role.PREFILL)
        pull_ids = count(1)
        self.core = WorkerCore(
            self.config, num_blocks, KEY, "model", worker_id, lambda: f"{worker_id} pulls {next(pull_ids)}".encode()
        )
        self.kv: list[list[int | None]] = [[None] * self.config.block_size for _ in range(num_blocks)]
        num_host_blocks = 0 if self.config.host is None else self.config.host.num_blocks
        self.host_kv: list[list[int | None]] = [[None] * self.config.block_size for _ in range(num_host_blocks)]
        self.copies: dict[bytes, CopyBlocks] = {}  # under way
        self.now = 0.0
        self.output: SchedulerOutput | None = None  # of the step under way
        self.effects: list[Effect] = []  # all so far
        self.outputs: list[SchedulerOutput] = []
        self.num_computed: dict[str, int] = {}  # tokens of each request, all of its lives here

    def on(self, event: Event) -> list[Effect]:
        return self._note(self.core.on(event, self.now))

    def submit(self, request: GenerateRequest) -> list[Effect]:
        return self.on(Submitted(request))

    def begin_step(self) -> list[Effect]:
        assert self.output is None
        self.now += 1.0
        self.output, effects = self.core.schedule(self.now)
        if self.output is not None:
            self.outputs.append(self.output)
        return self._note(effects)

    def end_step(self) -> list[Effect]:
        assert self.output is not None
        self.now += 1.0
        output, self.output = self.output, None
        return self._note(self.core.update_from_output(output, self.execute(output), self.now))

    def step(self) -> list[Effect]:
        effects = self.begin_step()
        return effects if self.output is None else effects + self.end_step()

    def run(self, max_steps: int = 1000) -> list[Effect]:
        """Steps until there is nothing to compute."""
        effects: list[Effect] = []
        for _ in range(max_steps):
            effects += self.begin_step()
            if self.output is None:
                return effects
            effects += self.end_step()
            assert self.core.ledger().balanced
        raise AssertionError(f"not done after {max_steps} steps")

    def execute(self, output: SchedulerOutput) -> StepResult:
        sampled: dict[str, tuple[int, ...]] = {}
        assert sum(each.num_scheduled_tokens for each in output.scheduled) == output.num_batched_tokens
        assert output.num_batched_tokens <= self.config.max_num_batched_tokens
        for each in output.scheduled:
            assert each.num_scheduled_tokens > 0
            self.num_computed[each.request_id] = self.num_computed.get(each.request_id, 0) + each.num_scheduled_tokens
            end = each.num_computed_tokens + each.num_scheduled_tokens
            tokens = list(each.token_ids)
            digests = [digest(tokens[: position + 1]) for position in range(end)]
            for position in range(each.num_computed_tokens, end):
                self._row(each.block_table, position)[position % self.config.block_size] = digests[position]
            assert self.read(each.block_table, end) == digests, each.request_id
            assert each.samples == (end == len(tokens))
            if each.samples:
                sampled[each.request_id] = (next_token(tokens),)
        return StepResult(sampled)

    def end_copy(self, copy_id: bytes, is_lost: bool = False) -> list[Effect]:
        """It is done, as late as can be; one that is lost leaves what it was to write spoiled."""
        copy = self.copies.pop(copy_id)
        if is_lost:
            return self.on(CopyLost(copy_id, "lost"))
        is_load = copy.direction is CopyDirection.TO_DEVICE
        source, destination = (self.host_kv, self.kv) if is_load else (self.kv, self.host_kv)
        for from_block, to_block in zip(copy.from_block_ids, copy.to_block_ids, strict=True):
            destination[to_block] = list(source[from_block])
        return self.on(Copied(copy_id))

    def end_copies(self) -> list[Effect]:
        effects: list[Effect] = []
        while self.copies:
            effects += self.end_copy(next(iter(self.copies)))
        return effects

    def row(self, block_id: int) -> list[int | None]:
        """Of a block as SendBlocks names it."""
        return self.kv[block_id] if block_id < len(self.kv) else self.host_kv[block_id - len(self.kv)]

    def read(self, block_table: Sequence[int], num_tokens: int) -> list[int | None]:
        return [self._row(block_table, position)[position % self.config.block_size] for position in range(num_tokens)]

    def tokens_of(self, request_id: str) -> list[int]:
        """The output that was sent for a request; asserts that repeats are equal and that nothing is missing."""
        tokens = self._tokens_by_index(request_id)
        assert not tokens or sorted(tokens) == list(range(min(tokens), max(tokens) + 1))
        return [tokens[index] for index in sorted(tokens)]

    def first_index(self, request_id: str) -> int:
        """Of what tokens_of gives."""
        return min(self._tokens_by_index(request_id), default=0)

    def last_output(self, request_id: str) -> TokenOutput:
        return [e for e in self.effects if isinstance(e, TokenOutput) and e.request_id == request_id][-1]

    def _tokens_by_index(self, request_id: str) -> dict[int, int]:
        tokens: dict[int, int] = {}
        for effect in self.effects:
            if isinstance(effect, TokenOutput) and effect.request_id == request_id:
                for index, token_id in enumerate(effect.token_ids, start=effect.index):
                    assert tokens.setdefault(index, token_id) == token_id
        return tokens

    def _row(self, block_table: Sequence[int], position: int) -> list[int | None]:
        return self.kv[block_table[position // self.config.block_size]]

    def _note(self, effects: list[Effect]) -> list[Effect]:
        self.effects += effects
        for copy in effects:
            if isinstance(copy, CopyBlocks):
                self.copies[copy.copy_id] = copy
                is_load = copy.direction is CopyDirection.TO_DEVICE
                for block_id in copy.to_block_ids:  # from now on it may hold anything
                    (self.kv if is_load else self.host_kv)[block_id] = [None] * self.config.block_size
        return effects


def measured(worker: FakeWorker, s_per_token: float = 1.0) -> FakeWorker:
    """It has seen a step that says what prefill costs."""
    sampling = generate("x", [0]).sampling_params
    chunk = ScheduledRequest("x", array("i", range(16)), 16, 0, 16, [], sampling, samples=False)
    worker.core.note_step(SchedulerOutput(1, (chunk,), 16, ()), 16 * s_per_token)
    return worker


def held_and_leased(worker: FakeWorker) -> tuple[int, int]:
    ledger = worker.core.ledger()
    assert ledger.balanced
    return ledger.held, ledger.leased


def kinds(effects: list[Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


@dataclass(slots=True)
class FakeTransfer:
    """What the network knows of one transfer. Invariant: the source's blocks are read before `closed` only."""

    source: FakeWorker
    destination: FakeWorker
    asked: RequestPull | None = None
    asked_source: bool = False
    pull_refusal: str | None = None
    opened: OpenTransfer | None = None
    told: int | None = None  # how many blocks the source of a migration was last told it has sent
    offered: bool = False
    grant: GrantTransfer | None = None
    blocks: list[int] = field(default_factory=list)  # sent so far, in order
    commit: CommitTransfer | None = None
    refusal: str | None = None
    source_aborted: bool = False
    destination_aborted: bool = False
    closed: bool = False  # the source was told TransferClosed or TransferRefused
    ended: bool = False  # the destination was told TransferArrived or TransferLost

    @property
    def migrates(self) -> bool:
        return self.opened is not None and self.opened.kind is TransferKind.MIGRATE

    def copy(self) -> None:
        """What was sent: of a migration, maybe less than was granted."""
        assert self.grant is not None
        written = self.blocks[self.grant.num_held_blocks :]
        for source_block, block in zip(written, self.grant.block_ids, strict=not self.migrates):
            self.destination.kv[block] = list(self.source.row(source_block))

    def news(self, transfer_id: bytes) -> BlocksSent | None:
        """For the source of a migration, where there are any."""
        if self.grant is None or not self.migrates or self.closed or self.commit or self.told == len(self.blocks):
            return None
        self.told = len(self.blocks)
        return BlocksSent(transfer_id, max(self.told, self.grant.num_held_blocks))


class FakeNetwork:
    """Notes the transfer effects of its workers, in whatever order they come."""

    def __init__(self, workers: Sequence[FakeWorker] = ()) -> None:
        self.workers = {worker.ref.worker_id: worker for worker in workers}
        self.transfers: dict[bytes, FakeTransfer] = {}
        self.refusals: list[HandoffRefused] = []
        self.offers: list[tuple[FakeWorker, OfferReturn]] = []

    def note(self, worker: FakeWorker, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case OpenTransfer(handoff):
                    assert self.transfers[handoff.transfer_id].opened is None
                    self.transfers[handoff.transfer_id].opened = effect
                case SendBlocks(transfer_id, first_block, block_ids):
                    transfer = self.transfers[transfer_id]
                    assert transfer.opened and first_block == len(transfer.blocks)
                    transfer.blocks += block_ids
                case CommitTransfer(transfer_id):
                    transfer = self.transfers[transfer_id]
                    assert transfer.opened
                    num_offered, num_blocks = transfer.opened.num_blocks, len(transfer.blocks)
                    assert num_blocks <= num_offered if transfer.migrates else num_blocks == num_offered
                    transfer.commit = effect
                case GrantTransfer(transfer_id):
                    self.transfers[transfer_id].grant = effect
                case RefuseTransfer(transfer_id, reason):
                    self.transfers[transfer_id].refusal = reason
                case AbortTransfer(transfer_id):
                    transfer = self.transfers[transfer_id]
                    if worker is transfer.source:
                        transfer.source_aborted = True
                    else:
                        transfer.destination_aborted = True
                case HandoffRefused():
                    self.refusals.append(effect)
                case RequestPull(pull_id, source_worker_id):
                    assert pull_id not in self.transfers
                    self.transfers[pull_id] = FakeTransfer(self.workers[source_worker_id], worker, asked=effect)
                case OfferReturn():
                    self.offers.append((worker, effect))
                case RefusePull(pull_id, destination, reason):
                    assert destination == self.transfers[pull_id].destination.ref
                    self.transfers[pull_id].pull_refusal = reason
