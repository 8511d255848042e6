"""KV that comes from another worker of a running cluster instead of being computed again: the tokens stay those of the
model, `cached_tokens` shows it, and a source that dies costs a recomputation."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import grpc.aio
import pytest

from tests.cluster.server import PATIENT, Server, assert_clean, eventually, request, serving
from tests.cluster.streams import Answer, generate, generate_all
from tests.cluster.test_golden import Reference, prompts_of
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BLOCK_SIZE = 16
NUM_TOKENS = 12
SETTINGS = (
    *PATIENT,
    f"engine.block_size={BLOCK_SIZE}",
    f"engine.hash_block_size={BLOCK_SIZE}",
    "engine.max_num_batched_tokens=64",
    "engine.num_blocks=600",
    "engine.pulls.s_per_token=0.0000001",  # far below what computing takes: whatever can be pulled is
    "engine.pulls.deadline_s=20",
    "transfer.chunk_nbytes=1",  # a chunk for each block, so that a pull takes its time
)
PULLS = (*SETTINGS, "router.policy.name=round_robin", "engine.pulls.returns_answers=false")
RETURNS = (
    *SETTINGS,
    "router.pull_s_per_token=0",  # what is hit at home has been brought there
    "router.policy.duplicate_cost=0",
    "router.returns=true",
    "engine.pulls.max_returns=32",
    *(f"router.cost.{name}=0" for name in ("prefill_base_s", "prefill_floor_s", "prefill_s_per_token_pair")),
    "router.cost.prefill_s_per_token=0.0001",  # of each worker, so that estimates are equal where loads are
    *(f"router.cost.{name}=0" for name in ("decode_base_s", "decode_s_per_seq", "decode_s_per_kv_token")),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("log")
    with serving(folder, "--model", str(model), "--prefill", "2", settings=PULLS) as running:
        measure_speeds(running)
        yield running


def measure_speeds(server: Server) -> None:
    """Nothing is pulled before a worker, and the router of it, knows what computing takes there. Who does not know is
    taken for quick, and so gets its turn."""
    seeds = count(1001)

    def known() -> bool:
        asyncio.run(generate_all(server.address, [request(prompts_of(1, 100, next(seeds))[0], 2)]))
        return all(load.prefill_s_per_token > 0 for load in server.status().workers if load.role == "prefill")

    assert eventually(known, 20.0)


async def answer_of(server: Server, prompt: list[int]) -> Answer:
    return (await generate_all(server.address, [request(prompt, NUM_TOKENS, ignore_eos=True)]))[0]


PROMPT_LEN = 5 * BLOCK_SIZE
ANSWER_LEN = 4 * BLOCK_SIZE
HELD_LEN = PROMPT_LEN + ANSWER_LEN - BLOCK_SIZE  # of a turn in full blocks: the answer's last token has no KV


async def two_turns(server: Server, reference: Reference, seed: int) -> tuple[Answer, Answer]:
    """A conversation: the second prompt is the first with its answer, and more."""
    prompt, more = prompts_of(1, PROMPT_LEN, seed)[0], prompts_of(1, 7, seed + 1)[0]
    first = (await generate_all(server.address, [request(prompt, ANSWER_LEN, ignore_eos=True)]))[0]
    await asyncio.sleep(1.0)  # a return is not waited for
    turn = [*prompt, *first.token_ids, *more]
    second = await answer_of(server, turn)
    expected = reference([turn], NUM_TOKENS)[0]
    assert second.token_ids[: len(expected)] == expected
    return first, second


async def test_a_prefix_comes_from_the_worker_that_has_it(server: Server, reference: Reference) -> None:
    shared = prompts_of(1, 40 * BLOCK_SIZE, seed=1)[0]
    prompts = [shared + tail for tail in prompts_of(3, BLOCK_SIZE + 3, seed=2)]
    first = await answer_of(server, prompts[0])
    second = await answer_of(server, prompts[1])
    third = await answer_of(server, prompts[2])
    places = [answer.placement.prefill_worker for answer in (first, second, third)]
    assert places[0] == places[2] != places[1], "in turn"
    assert [answer.complete.cached_tokens for answer in (first, second, third)] == [0, len(shared), len(shared)]
    expected = reference(prompts, NUM_TOKENS)
    assert [answer.token_ids for answer in (first, second, third)] == expected
    assert_clean(server)


async def test_many_at_once_wait_for_one_pull(server: Server, reference: Reference) -> None:
    shared = prompts_of(1, 60 * BLOCK_SIZE, seed=3)[0]
    prompts = [shared + tail for tail in prompts_of(8, 21, seed=4)]
    await answer_of(server, prompts[0])
    requests = [request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in prompts]
    answers = await generate_all(server.address, requests)
    assert [answer.token_ids for answer in answers] == reference(prompts, NUM_TOKENS)
    assert all(answer.complete.cached_tokens >= len(shared) for answer in answers)
    assert {answer.placement.prefill_worker for answer in answers} == {"prefill-0", "prefill-1"}
    assert_clean(server)


async def test_the_next_turn_pulls_the_answer_from_whoever_decoded_it(server: Server, reference: Reference) -> None:
    """Returns are off here."""
    _, second = await two_turns(server, reference, seed=70)
    assert second.complete.cached_tokens == HELD_LEN
    assert_clean(server)


async def test_without_pulls_and_returns_the_next_turn_computes_the_answer(
    model: Path, reference: Reference, tmp_path: Path
) -> None:
    settings = tuple(each for each in SETTINGS if "pulls" not in each)
    with serving(tmp_path, "--model", str(model), settings=(*settings, "engine.pulls=null")) as running:
        _, second = await two_turns(running, reference, seed=70)
        assert second.complete.cached_tokens == PROMPT_LEN


@pytest.mark.parametrize("after_s", [None, 0.05, 0.1])
async def test_a_source_that_dies_costs_a_recomputation(
    server: Server, reference: Reference, after_s: float | None
) -> None:
    """None: it is stopped first, so that it dies while it is asked; else somewhere on the way."""
    seed = 50 + int(100 * (after_s or 0))
    shared = prompts_of(1, 110 * BLOCK_SIZE, seed)[0]
    prompts = [shared + tail for tail in prompts_of(2, 21, seed + 1)]
    source = (await answer_of(server, prompts[0])).placement.prefill_worker
    pid = server.worker_pid(source)
    if after_s is None:
        os.kill(pid, signal.SIGSTOP)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stream = asyncio.create_task(generate(channel, request(prompts[1], NUM_TOKENS, ignore_eos=True)))
        await asyncio.sleep(after_s or 0.5)
        os.kill(pid, signal.SIGKILL)
        answer = await stream
    assert answer.token_ids == reference(prompts[1:], NUM_TOKENS)[0]
    assert answer.placement.prefill_worker != source
    assert answer.placement.attempts == 1
    if after_s is None:
        assert answer.complete.cached_tokens == 0
    assert eventually(lambda: sum(load.state == "up" for load in server.status().workers) == 3, 60.0)
    assert_clean(server)
    again = await answer_of(server, prompts[1])
    assert again.token_ids == answer.token_ids


@pytest.fixture(scope="module")
def returning(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two homes for each prefix, and a third worker that is none."""
    folder = tmp_path_factory.mktemp("log")
    with serving(folder, "--model", str(model), "--prefill", "3", settings=RETURNS) as running:
        yield running


async def test_an_answer_comes_home_for_the_next_turn(returning: Server, reference: Reference) -> None:
    for seed in (70, 80, 90):
        _, second = await two_turns(returning, reference, seed)
        assert second.complete.cached_tokens == HELD_LEN
    assert_clean(returning)


async def test_what_was_computed_away_from_home_is_hit_at_home(returning: Server, reference: Reference) -> None:
    key = prompts_of(1, 2 * BLOCK_SIZE, seed=110)[0]  # one home pair for all
    prompts = [key + tail for tail in prompts_of(9, 40 * BLOCK_SIZE, seed=111)]
    requests = [request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in prompts]
    answers = await generate_all(returning.address, requests)
    with returning.client() as client:
        candidates = client.explain_route(prompts[0]).prefill_candidates
    homes = {one.worker_id for one in candidates if one.is_home}
    assert len(homes) == 2
    away = [n for n, answer in enumerate(answers) if answer.placement.prefill_worker not in homes]
    assert away, "a crowd was meant to overflow"
    await asyncio.sleep(1.0)  # a return is not waited for
    for number in away:
        again = await answer_of(returning, [*prompts[number], 5])
        assert again.placement.prefill_worker in homes, again.placement
        assert again.complete.cached_tokens == len(prompts[number])
        expected = reference([[*prompts[number], 5]], NUM_TOKENS)[0]
        assert again.token_ids[: len(expected)] == expected
    assert_clean(returning)
