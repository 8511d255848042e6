"""The giving side of a pull: a WorkerCore whose prefix cache another worker asks for."""

from __future__ import annotations

from engine.config import PullConfig
from engine.events import (
    AbortTransfer,
    CommitTransfer,
    Effect,
    OpenTransfer,
    PullRequested,
    RefusePull,
    SendBlocks,
    TransferClosed,
    TransferRefused,
)
from protos.block_hash import chain_hashes, chain_root, fold_links
from protos.types import Handoff, TransferKind
from tests.engine.fake_worker import KEY, PEER, PROMPT, T2, FakeWorker, T, digest, generate, held_and_leased

PULLS = PullConfig(s_per_token=0.5)


def hashes(prompt: list[int]) -> tuple[bytes, ...]:
    """Of the full blocks, as another worker of the cluster computes them."""
    request = generate("r", prompt)
    links = chain_hashes(request.token_ids, 2, chain_root(KEY, "model"), KEY)
    return tuple(fold_links(links, 2))


def home(pulls: PullConfig | None = PULLS, num_blocks: int = 8) -> FakeWorker:
    """It has the first two blocks of PROMPT in its cache."""
    worker = FakeWorker(num_blocks, "home") if pulls is None else FakeWorker(num_blocks, "home", pulls=pulls)
    worker.submit(generate("before", PROMPT, max_tokens=1))
    worker.run()
    return worker


def ask(worker: FakeWorker, block_hashes: tuple[bytes, ...], pull_id: bytes = T) -> list[Effect]:
    return worker.on(PullRequested(pull_id, PEER, "r", 1, block_hashes))


def refusal(effects: list[Effect]) -> str:
    [refused] = effects
    assert isinstance(refused, RefusePull) and refused.destination == PEER
    return refused.reason


def test_it_sends_the_first_blocks_that_it_has_and_leases_them_until_they_are_read() -> None:
    worker = home()
    opened, sent, committed = ask(worker, hashes([*PROMPT, 77, 78]))  # three blocks, it has two
    assert opened == OpenTransfer(Handoff(T, PEER), "r", 1, 2, TransferKind.PULL)
    assert isinstance(sent, SendBlocks) and (sent.first_block, len(sent.block_ids)) == (0, 2)
    assert worker.read(sent.block_ids, 8) == [digest(PROMPT[:end]) for end in range(1, 9)]
    assert committed == CommitTransfer(T, 0, ())
    assert held_and_leased(worker) == (0, 2)
    assert worker.on(TransferClosed(T)) == []
    assert held_and_leased(worker) == (0, 0)
    assert worker.core.ledger().cached == 2


def test_a_pull_may_begin_behind_what_the_other_holds() -> None:
    worker = home()
    opened, _, _ = ask(worker, hashes(PROMPT)[1:])
    assert isinstance(opened, OpenTransfer) and opened.num_blocks == 1


def test_leased_blocks_are_not_evicted() -> None:
    worker = home(num_blocks=4)
    [_, sent, _] = ask(worker, hashes(PROMPT))
    assert isinstance(sent, SendBlocks)
    before = [list(worker.kv[block]) for block in sent.block_ids]
    worker.submit(generate("greedy", range(100, 112), max_tokens=2))  # needs all four blocks
    worker.run()
    assert [list(worker.kv[block]) for block in sent.block_ids] == before
    assert worker.tokens_of("greedy") == []
    worker.on(TransferClosed(T))
    worker.run()
    assert len(worker.tokens_of("greedy")) == 2


def test_what_is_not_there_is_refused() -> None:
    worker = home()
    assert refusal(ask(worker, hashes(list(range(50, 58))))) == "the first block asked for is not here"
    assert refusal(ask(worker, ())) == "the first block asked for is not here"
    assert held_and_leased(worker) == (0, 0)


def test_nothing_is_served_while_pulls_are_off() -> None:
    assert refusal(ask(home(pulls=None), hashes(PROMPT))) == "pulls are off here"


def test_more_than_max_served_at_once_are_refused() -> None:
    worker = home(PullConfig(s_per_token=0.5, max_served=1))
    assert len(ask(worker, hashes(PROMPT))) == 3
    assert refusal(ask(worker, hashes(PROMPT), T2)) == "1 pulls are served already, max_served is 1"
    worker.on(TransferRefused(T, "no room"))  # the destination took nothing
    assert held_and_leased(worker) == (0, 0)
    assert len(ask(worker, hashes(PROMPT), T2)) == 3


def test_repeats_change_nothing() -> None:
    worker = home()
    ask(worker, hashes(PROMPT))
    assert ask(worker, hashes(PROMPT)) == []
    worker.on(TransferClosed(T))
    assert worker.on(TransferClosed(T)) == worker.on(TransferRefused(T, "late")) == []
    assert held_and_leased(worker) == (0, 0)


def test_a_worker_that_is_fenced_aborts_what_it_serves() -> None:
    worker = home()
    ask(worker, hashes(PROMPT))
    assert worker.core.abort_all(worker.now, "fenced") == [AbortTransfer(T, "fenced")]
    assert held_and_leased(worker) == (0, 2)  # still read
    worker.on(TransferClosed(T))
    assert held_and_leased(worker) == (0, 0)
