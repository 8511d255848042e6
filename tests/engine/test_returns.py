"""What was computed away from home is brought there: two WorkerCores, the one that computed and the home."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import PullConfig
from engine.events import (
    AbortTransfer,
    CommitTransfer,
    Effect,
    GrantTransfer,
    OfferReturn,
    OpenTransfer,
    PullRefused,
    PullRequested,
    RefusePull,
    RefuseTransfer,
    RequestPull,
    ReturnOffered,
    SendBlocks,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
)
from protos.types import Handoff, TransferKind
from tests.engine.fake_worker import (
    PEER,
    PROMPT,
    FakeWorker,
    T,
    digest,
    expected_output,
    generate,
    held_and_leased,
    measured,
)
from tests.engine.test_pull_source import hashes

RETURNS = PullConfig(s_per_token=0.5, max_returns=1, returns_answers=False, deadline_s=10.0)
OTHER = list(range(50, 58))


def worker(name: str, pulls: PullConfig | None = RETURNS, num_blocks: int = 8) -> FakeWorker:
    return FakeWorker(num_blocks, name) if pulls is None else FakeWorker(num_blocks, name, pulls=pulls)


def computed(source: FakeWorker, prompt: list[int] = PROMPT, returns_to: str = "home", max_tokens: int = 3) -> None:
    source.submit(generate("r", prompt, max_tokens=max_tokens, returns_to=returns_to))
    source.run()


def offers(source: FakeWorker) -> list[OfferReturn]:
    return [effect for effect in source.effects if isinstance(effect, OfferReturn)]


def tell(home: FakeWorker, prompt: list[int] = PROMPT) -> list[Effect]:
    return home.on(ReturnOffered("me", "r", 1, hashes(prompt)))


def ask(home: FakeWorker, prompt: list[int] = PROMPT) -> RequestPull:
    [asked] = tell(home, prompt)
    assert isinstance(asked, RequestPull)
    return asked


def serve(source: FakeWorker, asked: RequestPull) -> SendBlocks:
    opened, sent, committed = source.on(PullRequested(T, PEER, "r", 1, asked.block_hashes, asked.kind))
    assert opened == OpenTransfer(Handoff(T, PEER), "r", 1, len(asked.block_hashes), TransferKind.RETURN)
    assert isinstance(sent, SendBlocks) and committed == CommitTransfer(T, 0, ())
    return sent


def grant(home: FakeWorker, asked: RequestPull) -> GrantTransfer:
    [granted] = home.on(TransferOffered(asked.pull_id, "r", 1, len(asked.block_hashes)))
    assert isinstance(granted, GrantTransfer)
    return granted


def bring(source: FakeWorker, home: FakeWorker, asked: RequestPull) -> None:
    sent, granted = serve(source, asked), grant(home, asked)
    for block, source_block in zip(granted.block_ids, sent.block_ids[granted.num_held_blocks :], strict=True):
        home.kv[block] = list(source.kv[source_block])
    assert home.on(TransferArrived(asked.pull_id, 0, (), 1, 0.1, 0.0)) == []
    assert source.on(TransferClosed(T)) == []


def test_what_would_stand_alone_at_home_is_refused() -> None:
    home = worker("home")
    computed(home, PROMPT, returns_to="")
    asked = ask(home, [*PROMPT[:8], *range(70, 74)])
    assert len(asked.block_hashes) == 1
    home.submit(generate("crowd", list(range(100, 129)), max_tokens=1))  # it takes all blocks
    home.run()
    [refused] = home.on(TransferOffered(asked.pull_id, "r", 1, 1))
    assert isinstance(refused, RefuseTransfer)
    assert held_and_leased(home) == (0, 0)


def test_the_next_turn_hits_at_home() -> None:
    source, home = worker("me"), worker("home")
    computed(source)
    assert offers(source) == [OfferReturn("home", "r", 1, hashes(PROMPT))]
    asked = ask(home)
    assert asked == RequestPull(b"home pulls 1", "me", "r", 1, hashes(PROMPT), TransferKind.RETURN)
    bring(source, home, asked)
    assert held_and_leased(home) == held_and_leased(source) == (0, 0)
    home.submit(generate("next", [*PROMPT, 77, 78]))
    home.run()
    assert home.tokens_of("next") == expected_output([*PROMPT, 77, 78], 4)  # from the KV that came
    account = home.last_output("next").account
    assert account is not None and account.num_cached_tokens == 8


def test_it_is_offered_once_and_after_the_first_token() -> None:
    source = worker("me")
    source.submit(generate("r", range(24), max_tokens=3, returns_to="home"))  # two steps of prefill
    source.step()
    assert offers(source) == []
    source.step()
    assert len(offers(source)) == 1 and len(source.tokens_of("r")) == 1
    source.run()
    assert len(offers(source)) == 1


def test_a_resumed_attempt_offers_its_output_too() -> None:
    source = worker("me")
    source.submit(generate("r", [*PROMPT, 1, 2], num_committed=2, returns_to="home"))
    source.run()
    assert [offer.block_hashes for offer in offers(source)] == [hashes([*PROMPT, 1, 2])]


@pytest.mark.parametrize(
    ("pulls", "returns_to", "prompt"),
    [
        (None, "home", PROMPT),
        (PullConfig(s_per_token=0.5, max_returns=0), "home", PROMPT),
        (RETURNS, "", PROMPT),
        (RETURNS, "me", PROMPT),
        (RETURNS, "home", [1, 2, 3]),  # no full block
    ],
)
def test_nothing_is_offered(pulls: PullConfig | None, returns_to: str, prompt: list[int]) -> None:
    source = worker("me", pulls)
    computed(source, prompt, returns_to)
    assert source.tokens_of("r") == expected_output(prompt, 3) and offers(source) == []


def test_a_home_asks_for_what_it_lacks_only() -> None:
    home = worker("home")
    home.submit(generate("before", PROMPT[:6], max_tokens=1))
    home.run()
    assert ask(home).block_hashes == hashes(PROMPT)[1:]
    assert tell(home) == []  # the same is on its way


def test_a_home_that_has_all_or_takes_none_asks_for_nothing() -> None:
    home = worker("home")
    computed(home, returns_to="")
    assert tell(home) == []
    assert tell(worker("home", None)) == tell(worker("home", PullConfig(s_per_token=0.5, max_returns=0))) == []
    assert worker("home").on(ReturnOffered("me", "r", 1, ())) == []


def test_no_more_than_max_returns_are_open_and_a_late_one_makes_way() -> None:
    home = worker("home")
    first = ask(home)
    granted = grant(home, first)
    assert tell(home, OTHER) == []
    home.now += 10.0
    late, asked = tell(home, OTHER)
    assert late == AbortTransfer(first.pull_id, "late")
    assert isinstance(asked, RequestPull) and asked.block_hashes == hashes(OTHER)
    assert held_and_leased(home) == (0, len(granted.block_ids))  # may still be written to
    home.on(TransferLost(first.pull_id, "aborted"))
    assert held_and_leased(home) == (0, 0)


def test_it_gives_no_more_than_max_returns_at_once_pulls_aside() -> None:
    source = worker("me")
    computed(source)
    source.on(PullRequested(b"pull", PEER, "x", 1, hashes(PROMPT)))
    serve(source, ask(worker("home")))
    [refused] = source.on(PullRequested(b"second", PEER, "r", 1, hashes(PROMPT), TransferKind.RETURN))
    assert refused == RefusePull(b"second", PEER, "1 returns are served already, max_returns is 1")


def test_refused_or_lost_it_is_dropped_and_the_next_may_come() -> None:
    home = worker("home")
    home.on(PullRefused(ask(home).pull_id, "evicted"))
    asked = ask(home)
    grant(home, asked)
    assert home.on(PullRefused(asked.pull_id, "late")) == []
    assert held_and_leased(home) == (0, 2)  # may still be written to
    assert home.on(TransferLost(asked.pull_id, "link lost")) == []
    assert held_and_leased(home) == (0, 0) and home.core.ledger().cached == 0
    assert home.on(TransferLost(asked.pull_id, "repeated")) == []
    ask(home)


def test_what_is_in_use_or_spoken_for_is_not_given_away() -> None:
    home = worker("home", num_blocks=4)
    home.submit(generate("busy", range(100, 109)))  # three of four blocks, and one more to grow
    home.begin_step()
    asked = ask(home)
    [refused] = home.on(TransferOffered(asked.pull_id, "r", 1, 2))
    assert isinstance(refused, RefuseTransfer)
    home.end_step()
    home.run()
    assert home.tokens_of("busy") == expected_output(list(range(100, 109)), 4)


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_an_offer_of_what_was_not_asked_for_is_refused(num_blocks: int) -> None:
    home = worker("home")
    asked = ask(home)
    reason = f"{num_blocks} blocks offered, 2 were asked for"
    assert home.on(TransferOffered(asked.pull_id, "r", 1, num_blocks)) == [RefuseTransfer(asked.pull_id, reason)]


def test_arrival_without_a_grant_and_a_repeated_offer_change_nothing() -> None:
    home = worker("home")
    asked = ask(home)
    assert home.on(TransferArrived(asked.pull_id, 0, (), 1, 0.1, 0.0)) == []
    grant(home, asked)
    assert home.on(TransferOffered(asked.pull_id, "r", 1, 2)) == []
    assert held_and_leased(home) == (0, 2)


def test_a_home_that_is_fenced_gives_its_returns_up() -> None:
    home = worker("home")
    asked = ask(home)
    grant(home, asked)
    assert home.core.abort_all(home.now, "fenced") == [AbortTransfer(asked.pull_id, "fenced")]
    assert held_and_leased(home) == (0, 2)
    home.on(TransferLost(asked.pull_id, "aborted"))
    assert held_and_leased(home) == (0, 0)


# --- answers --------------------------------------------------------------------------------------------------------

ANSWERS = PullConfig(s_per_token=0.5, max_returns=1, returns_answers=True)


def decoded(pulls: PullConfig, max_tokens: int, returns_to: str = "") -> FakeWorker:
    """A worker that has taken a request over from PEER and decoded it."""
    taker = worker("me", pulls)
    taker.submit(generate("r", PROMPT, max_tokens=max_tokens, source=T, returns_to=returns_to))
    [granted] = taker.on(TransferOffered(T, "r", 1, 3))
    assert isinstance(granted, GrantTransfer)
    for place, block in enumerate(granted.block_ids):
        taker.kv[block] = [
            digest(PROMPT[: at + 1]) if at < len(PROMPT) else None for at in range(4 * place, 4 * place + 4)
        ]
    taker.on(TransferArrived(T, 1, tuple(expected_output(PROMPT, 1)), 1, 0.1, 0.0))
    taker.run()
    assert taker.tokens_of("r") == expected_output(PROMPT, max_tokens)[1:]
    return taker


@pytest.mark.parametrize(("returns_to", "home"), [("", PEER.worker_id), ("home", "home")])
def test_an_answer_is_offered_to_the_home_of_its_prompt(returns_to: str, home: str) -> None:
    taker = decoded(ANSWERS, 8, returns_to)
    said = [*PROMPT, *expected_output(PROMPT, 8)]  # 18 tokens, the last one without KV: four full blocks
    assert offers(taker) == [OfferReturn(home, "r", 1, hashes(said[:17]))]
    assert held_and_leased(taker) == (0, 0)


def test_the_next_turn_hits_the_answer_at_home() -> None:
    taker, home = decoded(ANSWERS, 8), worker("home")
    computed(home, returns_to="", max_tokens=1)
    [offer] = offers(taker)
    [asked] = home.on(ReturnOffered("me", "r", 1, offer.block_hashes))
    assert isinstance(asked, RequestPull) and len(asked.block_hashes) == 2  # of four
    bring(taker, home, asked)
    turn = [*PROMPT, *expected_output(PROMPT, 8), 77, 78]
    home.submit(generate("next", turn))
    home.run()
    assert home.tokens_of("next") == expected_output(turn, 4)
    account = home.last_output("next").account
    assert account is not None and account.num_cached_tokens == 16


@pytest.mark.parametrize(("pulls", "max_tokens"), [(RETURNS, 8), (replace(ANSWERS, max_returns=0), 8), (ANSWERS, 2)])
def test_no_answer_is_offered(pulls: PullConfig, max_tokens: int) -> None:
    """Switched off, or without a full block that the home does not have."""
    assert offers(decoded(pulls, max_tokens)) == []


def test_what_was_decoded_where_it_was_prefilled_is_there_already() -> None:
    local = worker("home", ANSWERS)
    computed(local, returns_to="", max_tokens=8)
    assert offers(local) == []


# --- copies go first ----------------------------------------------------------------------------------------------


def num_cached(source: FakeWorker, prompt: list[int]) -> int:
    """Of its full blocks: as many as another worker could pull."""
    opened = source.on(PullRequested(b"probe", PEER, "x", 1, hashes(prompt)))[0]
    source.on(TransferClosed(b"probe"))
    return opened.num_blocks if isinstance(opened, OpenTransfer) else 0


def with_an_older_prefix() -> FakeWorker:
    source = measured(worker("me", num_blocks=6))
    source.submit(generate("own", OTHER, max_tokens=1))
    source.run()
    return source


def squeeze(source: FakeWorker) -> tuple[int, int]:
    """Take one block more than are free. What is left of the older and of the newer prefix?"""
    source.submit(generate("more", range(80, 90), max_tokens=1))
    source.run()
    return num_cached(source, OTHER), num_cached(source, PROMPT)


def test_without_returns_the_least_recently_used_goes_first() -> None:
    source = with_an_older_prefix()
    computed(source, max_tokens=1, returns_to="")
    assert squeeze(source) == (1, 2)


def test_a_copy_that_was_brought_home_goes_first() -> None:
    source, home = with_an_older_prefix(), worker("home")
    computed(source, max_tokens=1)
    bring(source, home, ask(home))
    assert squeeze(source) == (2, 1)


@pytest.mark.parametrize(("returns_to", "left"), [("home", (2, 1)), ("", (1, 2))])
def test_what_was_pulled_from_the_home_that_keeps_it_goes_first(returns_to: str, left: tuple[int, int]) -> None:
    home, source = worker("home"), with_an_older_prefix()
    computed(home, max_tokens=1, returns_to="")
    [asked] = source.submit(generate("r", PROMPT, max_tokens=1, homes=["home"], returns_to=returns_to))
    assert isinstance(asked, RequestPull)
    sent = home.on(PullRequested(asked.pull_id, PEER, "r", 1, asked.block_hashes, asked.kind))[1]
    assert isinstance(sent, SendBlocks)
    for block, home_block in zip(grant(source, asked).block_ids, sent.block_ids, strict=True):
        source.kv[block] = list(home.kv[home_block])
    source.on(TransferArrived(asked.pull_id, 0, (), 1, 0.1, 0.0))
    source.run()
    assert source.tokens_of("r") == expected_output(PROMPT, 1)
    assert squeeze(source) == left
