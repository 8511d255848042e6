"""Penalties, bias and log probabilities against transformers' own processors and plain definitions."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.logits import adjust_logits, logprobs_of
from engine.sampler import sample
from engine.scheduler_output import ScheduledRequest
from protos.types import SamplingParams

VOCAB = 50
PLAIN = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, seed=0, max_tokens=16)
PROMPT, OUTPUT = [3, 7, 7, 11], [7, 20, 20, 20, 31]
NUM_DRAWS = 2000


def scheduled(prompt: list[int] = PROMPT, output: list[int] = OUTPUT, **params: object) -> ScheduledRequest:
    token_ids = array("i", prompt + output)
    return ScheduledRequest(
        request_id=f"r{params}",
        token_ids=token_ids,
        num_prompt_tokens=len(prompt),
        num_computed_tokens=len(token_ids) - 1,
        num_scheduled_tokens=1,
        block_table=[0],
        sampling_params=replace(PLAIN, **params),  # type: ignore[arg-type]
        samples=True,
    )


def logits_of(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def ids() -> torch.LongTensor:
    return torch.tensor([PROMPT + OUTPUT])  # type: ignore[return-value]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = logits_of()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids(), logits.clone())  # type: ignore[arg-type]
    assert torch.equal(adjust_logits(logits, [scheduled(repetition_penalty=penalty)]), expected)
    assert not torch.equal(logits, expected)


def test_min_tokens_is_that_of_transformers() -> None:
    logits = logits_of()
    for min_tokens, bans in ((5, False), (6, True)):  # the output has 5
        processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, [4, 9])
        expected = processor(ids(), logits.clone())  # type: ignore[arg-type]
        adjusted = adjust_logits(logits, [scheduled(min_tokens=min_tokens, stop_token_ids=(4, 9))])
        assert torch.equal(adjusted, expected)
        assert bool(adjusted[0, 4].isinf()) is bans


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = logits_of()
    expected = logits.clone()
    for token_id in set(OUTPUT):
        expected[0, token_id] -= 0.5 + 0.75 * OUTPUT.count(token_id)
    adjusted = adjust_logits(logits, [scheduled(presence_penalty=0.5, frequency_penalty=0.75)])
    torch.testing.assert_close(adjusted, expected)
    assert adjusted[0, 3] == logits[0, 3], "a token of the prompt alone"


def test_bias_comes_after_penalties_and_the_ban_last() -> None:
    logits = logits_of()
    params = {"repetition_penalty": 2.0, "logit_bias": ((7, 5.0), (9, 100.0)), "min_tokens": 9, "stop_token_ids": (9,)}
    adjusted = adjust_logits(logits, [scheduled(**params)])
    raw = float(logits[0, 7])
    assert float(adjusted[0, 7]) == pytest.approx((raw / 2 if raw > 0 else raw * 2) + 5)
    assert adjusted[0, 9] == -torch.inf
    assert sample(adjusted, [replace(PLAIN, temperature=0.0)], [9]) == [int(adjusted.argmax())]


def test_every_row_is_adjusted_as_if_alone_and_plain_rows_stay() -> None:
    requests = [
        scheduled(),
        scheduled(repetition_penalty=1.5),
        scheduled([1, 2], [2], frequency_penalty=-1.0),
        scheduled([1], [], presence_penalty=1.0, repetition_penalty=0.7),
        scheduled(logit_bias=((0, 2.0), (49, -3.0))),
        scheduled(min_tokens=8, stop_token_ids=(1, 2)),
    ]
    logits = logits_of(len(requests))
    before = logits.clone()
    together = adjust_logits(logits, requests)
    alone = [adjust_logits(logits[row : row + 1], [request]) for row, request in enumerate(requests)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[0], logits[0])
    assert torch.equal(logits, before), "log probabilities are of the raw ones"
    assert not any(torch.equal(together[row], logits[row]) for row in range(1, len(requests)))


def test_a_batch_that_asks_for_nothing_is_not_copied() -> None:
    logits = logits_of(2)
    assert adjust_logits(logits, [scheduled(), scheduled(min_tokens=5, stop_token_ids=(1,))]) is logits
    assert logprobs_of(logits, [scheduled(), scheduled()], [1, 2]) == {}


def test_logprobs_are_of_the_raw_logits() -> None:
    requests = [scheduled(num_logprobs=3), scheduled(), scheduled(num_logprobs=0, temperature=0.5)]
    logits = logits_of(3)
    found = logprobs_of(logits, requests, [17, 4, 8])
    expected = logits.log_softmax(-1)
    assert set(found) == {requests[0].request_id, requests[2].request_id}
    (three,), (none,) = found[requests[0].request_id], found[requests[2].request_id]
    assert three.logprob == float(expected[0, 17])
    assert list(three.top_token_ids) == expected[0].argsort(descending=True)[:3].tolist()
    assert list(three.top_logprobs) == expected[0].sort(descending=True).values[:3].tolist()
    assert (none.logprob, none.top_token_ids, none.top_logprobs) == (float(expected[2, 8]), (), ())


def drawn(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    rows = [replace(params, seed=seed) for seed in range(NUM_DRAWS)]
    return set(sample(logits.expand(NUM_DRAWS, -1), rows, [5] * NUM_DRAWS))


@pytest.mark.parametrize(
    "params",
    [
        {"min_p": 0.2},
        {"min_p": 0.05, "temperature": 1.7},
        {"min_p": 0.1, "top_k": 3},
        {"min_p": 0.02, "top_k": 12, "top_p": 0.8, "temperature": 1.4},
    ],
)
def test_what_may_be_drawn_is_what_transformers_warpers_leave(params: dict[str, float]) -> None:
    logits = logits_of(seed=4) / 1.5
    sampling = replace(PLAIN, **params)  # type: ignore[arg-type]
    kept = logits / sampling.temperature
    warpers: list[object] = [MinPLogitsWarper(sampling.min_p)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for warper in warpers:
        kept = warper(ids(), kept)  # type: ignore[operator]
    allowed = set(kept[0].isfinite().nonzero().flatten().tolist())
    likely = set((kept.softmax(-1)[0] > 0.005).nonzero().flatten().tolist())
    assert 1 < len(allowed) < VOCAB
    assert likely <= drawn(logits, sampling) <= allowed
