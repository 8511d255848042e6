"""Sampling parameters, log probabilities, choices and resumption, over the whole path and against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from protos import inference_pb2 as pb
from protos.codec import pack_token_ids
from router.choices import choice_seed
from tests.cluster.server import Server, request, serving
from tests.cluster.streams import Answer, generate_all, generate_choices
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BLOCK_SIZE = 16
SETTINGS = (
    f"engine.block_size={BLOCK_SIZE}",
    f"engine.hash_block_size={BLOCK_SIZE}",
    "engine.num_blocks=64",
    "lease.lease_s=6.0",
    "transfer.silence_timeout_s=6.0",
    "transfer.chunk_timeout_s=5.0",
)
PROMPT = torch.randint(0, 256, (53,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def reference(model: Path) -> torch.nn.Module:
    torch.set_num_threads(1)
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("log"), "--model", str(model), settings=SETTINGS) as running:
        yield running


async def answer_to(server: Server, one: pb.GenerateRequest) -> Answer:
    (answer,) = await generate_all(server.address, [one])
    return answer


def greedy(reference: torch.nn.Module, num_tokens: int, **options: object) -> list[int]:
    ids = torch.tensor([PROMPT])
    output = reference.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens, **options
    )
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


def assert_moved(answer: Answer) -> None:
    assert answer.placement.mode == pb.SERVING_MODE_DISAGGREGATED, answer.placement


async def test_logprobs_are_those_of_transformers(server: Server, reference: torch.nn.Module) -> None:
    answer = await answer_to(server, request(PROMPT, 12, logprobs=5, ignore_eos=True, repetition_penalty=1.3))
    assert_moved(answer)
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPT + answer.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(answer.logprobs) == 12
    for row, token_id, found in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [top.logprob for top in found.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
        assert [row[top.token_id].item() for top in found.top] == pytest.approx(
            [top.logprob for top in found.top], abs=1e-4
        )


async def test_a_repetition_penalty_generates_what_transformers_does(
    server: Server, reference: torch.nn.Module
) -> None:
    answer = await answer_to(server, request(PROMPT, 24, repetition_penalty=1.5, ignore_eos=True))
    assert_moved(answer)
    assert answer.token_ids == greedy(reference, 24, repetition_penalty=1.5, eos_token_id=None)
    assert answer.token_ids != greedy(reference, 24, eos_token_id=None)


async def test_choices_are_the_separate_requests_of_their_seeds(server: Server) -> None:
    fields = {"temperature": 1.2, "frequency_penalty": 0.5, "min_p": 0.01, "ignore_eos": True}
    prompt = PROMPT[::-1]
    together = await generate_choices(server.address, request(prompt, 12, n=4, seed=7, **fields))  # type: ignore[arg-type]
    seeds = [choice_seed(7, index) for index in range(4)]
    assert [answer.complete.seed for answer in together] == seeds
    apart = await generate_all(
        server.address,
        [request(prompt, 12, seed=seed, **fields) for seed in seeds],  # type: ignore[arg-type]
    )
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in apart]
    assert len({tuple(answer.token_ids) for answer in together}) == 4
    full_blocks = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    assert [answer.complete.cached_tokens for answer in together] == [0, *[full_blocks] * 3]


async def test_an_output_goes_on_behind_what_the_caller_has(server: Server) -> None:
    fields = {"temperature": 0.9, "seed": 11, "repetition_penalty": 1.2, "presence_penalty": 0.4, "ignore_eos": True}
    whole = await answer_to(server, request(PROMPT, 20, **fields))  # type: ignore[arg-type]
    for num_given in (1, 9, 19):
        again = request(PROMPT, 20, stream=False, **fields)  # type: ignore[arg-type]
        again.output_token_ids = pack_token_ids(whole.token_ids[:num_given])
        answer = await answer_to(server, again)
        assert answer.complete.first_index == num_given
        assert answer.token_ids == whole.token_ids
        assert whole.text.endswith(answer.text)
        assert answer.complete.finish_reason == whole.complete.finish_reason


async def test_min_tokens_and_include_stop(server: Server, reference: torch.nn.Module) -> None:
    plain = greedy(reference, 12, eos_token_id=None)
    stop_id = plain[2]
    first = plain.index(stop_id)
    cut = await answer_to(server, request(PROMPT, 12, stop_token_ids=[stop_id], ignore_eos=True))
    assert cut.token_ids == plain[: first + 1]
    assert cut.complete.matched_token_id == stop_id
    kept = await answer_to(server, request(PROMPT, 12, stop_token_ids=[stop_id], ignore_eos=True, include_stop=True))
    assert kept.token_ids == cut.token_ids
    assert len(kept.text) > len(cut.text)
    longer = await answer_to(server, request(PROMPT, 12, stop_token_ids=[stop_id], ignore_eos=True, min_tokens=8))
    assert stop_id not in longer.token_ids[:8]
    assert len(longer.token_ids) >= 8
