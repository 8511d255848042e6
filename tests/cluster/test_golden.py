"""The whole path against transformers: router, prefill, KV over gloo, decode, for each family, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from protos import inference_pb2 as pb
from tests.cluster.server import Server, request, serving
from tests.cluster.streams import Answer, generate_all
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHUNK_BUDGET = 128
BLOCK_SIZE = 16
SETTINGS = (
    f"engine.block_size={BLOCK_SIZE}",
    f"engine.hash_block_size={BLOCK_SIZE}",
    f"engine.max_num_batched_tokens={CHUNK_BUDGET}",
    "engine.num_blocks=260",
    "lease.lease_s=6.0",
    "transfer.silence_timeout_s=6.0",
    "transfer.chunk_timeout_s=5.0",
)


class Reference:
    """Greedy `generate` of transformers in fp32."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def __call__(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Prompts of one length, so that the batch needs no padding; outputs end at the eos token or max_tokens."""
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            outputs = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        eos = set(torch.tensor(self._model.generation_config.eos_token_id).reshape(-1).tolist())
        return [cut_after(output.tolist(), eos) for output in outputs[:, ids.shape[1] :]]


def cut_after(token_ids: list[int], eos: set[int]) -> list[int]:
    end = next((i + 1 for i, token_id in enumerate(token_ids) if token_id in eos), len(token_ids))
    return token_ids[:end]


def prompts_of(num: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, length), generator=generator).tolist()


def assert_disaggregated(answers: list[Answer]) -> None:
    """Every request went the planned way: prefilled there, KV moved and used, nothing recomputed. One that ended with
    its first token had no use for its KV elsewhere."""
    longer = [answer for answer in answers if answer.complete.completion_tokens > 1]
    assert len(longer) > len(answers) // 2
    for answer in longer:
        placement = answer.placement
        assert placement.mode == pb.SERVING_MODE_DISAGGREGATED, placement
        assert (placement.prefill_worker, placement.decode_worker) == ("prefill-0", "decode-0")
        assert placement.attempts == 1
        assert placement.kv_bytes_moved > 0
        assert placement.ttft_s > 0


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp(family) / "model", family)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with serving(tmp_path_factory.mktemp("log"), "--model", str(model), settings=SETTINGS) as running:
        yield running


async def test_one_request(server: Server, reference: Reference) -> None:
    prompts = prompts_of(1, 37, seed=1)
    answers = await generate_all(server.address, [request(prompts[0], 40)])
    assert [answer.token_ids for answer in answers] == reference(prompts, 40)
    assert_disaggregated(answers)


async def test_thirty_two_at_once(server: Server, reference: Reference) -> None:
    prompts = prompts_of(32, 45, seed=2)
    answers = await generate_all(server.address, [request(prompt, 24) for prompt in prompts])
    assert [answer.token_ids for answer in answers] == reference(prompts, 24)
    assert_disaggregated(answers)


async def test_prompts_longer_than_the_chunk_budget(server: Server, reference: Reference) -> None:
    prompts = prompts_of(3, 3 * CHUNK_BUDGET + 11, seed=3)
    answers = await generate_all(server.address, [request(prompt, 16) for prompt in prompts])
    assert [answer.token_ids for answer in answers] == reference(prompts, 16)
    assert_disaggregated(answers)


async def test_repeated_prefixes_are_cached_on_both_sides(server: Server, reference: Reference) -> None:
    shared = prompts_of(1, 10 * BLOCK_SIZE, seed=4)[0]
    tails = prompts_of(2, BLOCK_SIZE + 3, seed=5)
    first, second, again = shared + tails[0], shared + tails[1], shared + tails[0]
    expected = reference([first, second, again], 12)
    answers = [(await generate_all(server.address, [request(prompt, 12)]))[0] for prompt in (first, second, again)]
    assert [answer.token_ids for answer in answers] == expected
    assert_disaggregated(answers)
    assert [answer.complete.cached_tokens for answer in answers] == [0, 10 * BLOCK_SIZE, 11 * BLOCK_SIZE]
    assert [answer.placement.decode_held_tokens for answer in answers] == [0, 10 * BLOCK_SIZE, 11 * BLOCK_SIZE]
    moved = [answer.placement.kv_bytes_moved for answer in answers]
    block_nbytes = moved[0] // 12  # 12 blocks: 179 tokens of 16, the last one partial
    assert moved == [12 * block_nbytes, 2 * block_nbytes, block_nbytes]


async def test_after_preemption(server: Server, reference: Reference) -> None:
    prompts = prompts_of(32, 64, seed=6)
    answers = await generate_all(server.address, [request(prompt, 180, ignore_eos=True) for prompt in prompts])
    expected = reference(prompts, 180)
    for answer, tokens in zip(answers, expected, strict=True):
        assert answer.token_ids[: len(tokens)] == tokens
    assert sum(answer.placement.preemptions for answer in answers) > 0, "the pool was meant to be too small"


async def test_seeded_sampling_is_the_same_whatever_the_batch(server: Server) -> None:
    prompts = prompts_of(12, 30, seed=7)
    seeded = [request(prompt, 20, temperature=0.8, seed=i) for i, prompt in enumerate(prompts)]
    together = await generate_all(server.address, seeded)
    alone = [(await generate_all(server.address, [one]))[0] for one in seeded[:4]]
    assert [answer.token_ids for answer in together[:4]] == [answer.token_ids for answer in alone]
    other = await generate_all(server.address, [request(prompts[0], 20, temperature=0.8, seed=99)])
    assert other[0].token_ids != together[0].token_ids
