"""Sampling: the distribution is right, and nothing but (logits, params, position) decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import sample
from protos.types import SamplingParams

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, seed=0, max_tokens=16)
NUM_DRAWS = 4000
# Of chi-square with 7 degrees of freedom, 24.3 is passed once in a thousand draws; the seeds are fixed.
CHI_SQUARE_LIMIT = 24.3


def logits_of(probs: list[float]) -> torch.Tensor:
    return torch.tensor(probs).log()


def draw_many(logits: torch.Tensor, params: SamplingParams, vary: str) -> torch.Tensor:
    """Counts by token of NUM_DRAWS draws that differ in seed or in position."""
    seeds = range(NUM_DRAWS) if vary == "seed" else [params.seed] * NUM_DRAWS
    positions = range(NUM_DRAWS) if vary == "position" else [17] * NUM_DRAWS
    rows = [replace(params, seed=seed) for seed in seeds]
    tokens = sample(logits.expand(NUM_DRAWS, -1), rows, list(positions))
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]).double()


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * NUM_DRAWS
    kept = expected > 0
    assert counts[~kept].sum() == 0, "a token of probability 0 was drawn"
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


PROBS = [0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02]


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(vary: str) -> None:
    counts = draw_many(logits_of(PROBS), PLAIN, vary)
    assert chi_square(counts, torch.tensor(PROBS)) < CHI_SQUARE_LIMIT
    assert chi_square(counts, torch.full((8,), 1 / 8)) > CHI_SQUARE_LIMIT, "the measure must tell them apart"


def test_temperature_flattens_or_sharpens() -> None:
    for temperature in (0.5, 2.0):
        counts = draw_many(logits_of(PROBS), replace(PLAIN, temperature=temperature), "seed")
        assert chi_square(counts, (logits_of(PROBS) / temperature).softmax(-1)) < CHI_SQUARE_LIMIT


def test_top_k_keeps_the_k_likeliest_in_proportion() -> None:
    shuffled = torch.tensor(PROBS)[torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])]
    counts = draw_many(shuffled.log(), replace(PLAIN, top_k=3), "seed")
    kept = torch.where(shuffled >= 0.16, shuffled, 0.0)
    assert chi_square(counts, kept / kept.sum()) < CHI_SQUARE_LIMIT


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    counts = draw_many(logits_of(PROBS), replace(PLAIN, top_p=0.6), "position")  # 0.30 + 0.22 < 0.6 <= ... + 0.16
    kept = torch.tensor([0.30, 0.22, 0.16, 0, 0, 0, 0, 0])
    assert chi_square(counts, kept / kept.sum()) < CHI_SQUARE_LIMIT


def test_top_p_is_taken_of_what_top_k_left() -> None:
    counts = draw_many(logits_of(PROBS), replace(PLAIN, top_k=2, top_p=0.57), "seed")  # 0.30 of 0.52 is 0.577
    assert counts.nonzero().flatten().tolist() == [0]


def test_the_likeliest_token_survives_any_top_p() -> None:
    counts = draw_many(logits_of(PROBS), replace(PLAIN, top_p=1e-9), "seed")
    assert counts.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_cold_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.999, -torch.inf], [1e30, -1e30, 0.0, 0.0]])
    assert sample(logits, [replace(PLAIN, temperature=temperature)] * 2, [4, 9]) == [1, 0]


def test_neighbouring_seeds_and_positions_share_nothing() -> None:
    """Position p of seed s must not draw as position p + 1 of seed s - 1 does, nor repeat along a request."""
    logits = torch.zeros(1, 50_000)
    drawn = [sample(logits, [replace(PLAIN, seed=s)], [p])[0] for s in range(12) for p in range(12)]
    assert len(set(drawn)) > len(drawn) - 4  # of 144 draws from 50,000, 0.2 pairs agree by chance


def test_seeds_use_all_64_bits() -> None:
    logits = torch.zeros(1, 50_000)
    seeds = [0, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]
    assert len({sample(logits, [replace(PLAIN, seed=seed)], [0])[0] for seed in seeds}) == len(seeds)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.just(16),
)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(params_strategy, st.integers(0, 5000)), min_size=1, max_size=9),
    logits_seed=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
def test_a_row_draws_the_same_in_any_batch(
    rows: list[tuple[SamplingParams, int]], logits_seed: int, order: object
) -> None:
    logits = torch.randn(len(rows), 60, generator=torch.Generator().manual_seed(logits_seed)) * 3
    alone = [sample(logits[i : i + 1], [p], [position])[0] for i, (p, position) in enumerate(rows)]
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    together = sample(logits[shuffled], [rows[i][0] for i in shuffled], [rows[i][1] for i in shuffled])
    assert together == [alone[i] for i in shuffled]
