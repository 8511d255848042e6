"""Costs are found again from the sums over steps that had them; what steps leave open is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, fields
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.cost_fit import CostFit, fit_costs
from protos.cost_model import HARDWARE, CostModel
from protos.step_moments import PREFILL_KINDS, TERMS, AllStepMoments, StepKind, StepMoments, added, between, prefill_bin

NAMES = [field.name for field in fields(CostModel)]
Step = tuple[StepKind, float, float, float]


def moments_of(steps: Iterator[Step]) -> tuple[StepMoments, ...]:
    products = ((kind, (1, x, y, s, x * x, x * y, x * s, y * y, y * s, s * s)) for kind, x, y, s in steps)
    return added(StepMoments(kind, sums) for kind, sums in products)


def prefill(cost: CostModel, num_new: int, num_cached: int, noise: float = 1.0) -> Step:
    num_pairs = num_new * (num_cached + num_new / 2)
    return PREFILL_KINDS[prefill_bin(num_new)], num_new, num_pairs, noise * cost.prefill_s([(num_new, num_cached)])


def decode(cost: CostModel, num_seqs: int, num_kv_tokens: int, noise: float = 1.0) -> Step:
    return StepKind.DECODE, num_seqs, num_kv_tokens, noise * cost.decode_s(num_seqs, num_kv_tokens)


def workload(cost: CostModel, seed: int, sigma: float, num_steps: int = 1000, budget: int = 8192) -> Iterator[Step]:
    """Prompts of all sizes behind caches of all sizes; batches of 1 to 64. Each step is off by a factor of its own."""
    rng = Random(seed)
    for _ in range(num_steps):
        num_new = min(budget, max(2, round(rng.lognormvariate(5.5, 1.5))))
        yield prefill(cost, num_new, rng.choice([0, 0, 512, 4096, 20_000]), rng.lognormvariate(0, sigma))
        num_seqs = rng.randint(1, 64)
        num_kv_tokens = num_seqs * rng.randint(100, 8000)
        yield decode(cost, num_seqs, num_kv_tokens, rng.lognormvariate(0, sigma))


def assert_equal(fit: CostFit, cost: CostModel, rel: float) -> None:
    assert astuple(fit.cost) == pytest.approx(astuple(cost), rel=rel, abs=1e-15)


@st.composite
def costs(draw: st.DrawFn) -> CostModel:
    """About those of GPUs, with the crossing anywhere from 40 to 450 tokens."""

    def about(value: float) -> float:
        return value * draw(st.floats(0.2, 5.0))

    per_token = about(5e-5)
    floor = per_token * draw(st.floats(40, 450))
    return CostModel(about(0.005), floor, per_token, about(1e-9), about(0.01), about(3e-5), about(5e-8))


@settings(max_examples=50)
@given(costs(), st.integers(0, 1000))
def test_exact_times_give_the_exact_costs(cost: CostModel, seed: int) -> None:
    fit = fit_costs(moments_of(workload(cost, seed, sigma=0.0)))
    assert fit.prefill.is_floor_known
    assert_equal(fit, cost, rel=1e-5)
    assert fit.prefill.relative_error < 1e-6 and fit.decode.relative_error < 1e-6


@settings(max_examples=30)
@given(costs(), st.integers(0, 1000))
def test_noise_is_averaged_out(cost: CostModel, seed: int) -> None:
    """With times off by 5 %, steps within what was measured are predicted within 4 %, and each coefficient that matters
    is within a few per cent or a few of its standard errors."""
    fit = fit_costs(moments_of(workload(cost, seed, sigma=0.05, num_steps=4000)))
    assert fit.prefill.relative_error < 0.1 and fit.decode.relative_error < 0.07
    for num_new, num_cached in ((8, 0), (40, 512), (1000, 0), (1000, 20_000), (8192, 0), (8192, 4096)):
        chunks = [(num_new, num_cached)]
        assert fit.cost.prefill_s(chunks) == pytest.approx(cost.prefill_s(chunks), rel=0.04), chunks
    for num_seqs, num_kv_tokens in ((2, 2000), (16, 60_000), (64, 300_000)):
        expected = cost.decode_s(num_seqs, num_kv_tokens)
        assert fit.cost.decode_s(num_seqs, num_kv_tokens) == pytest.approx(expected, rel=0.04)
    errors = {**fit.prefill.standard_errors, **fit.decode.standard_errors}
    for name in NAMES:
        true, found = getattr(cost, name), getattr(fit.cost, name)
        if found == 0:
            continue  # held there, without an error of its own: too small to tell, as the steps above have shown
        assert abs(found - true) < 0.1 * true + 6 * errors[name], (name, true, found, errors[name])


@pytest.mark.parametrize("name", HARDWARE)
def test_the_known_rows_come_back(name: str) -> None:
    cost = HARDWARE[name].cost
    fit = fit_costs(moments_of(workload(cost, 1, sigma=0.02)))
    assert fit.cost.prefill_floor_s == pytest.approx(cost.prefill_floor_s, rel=0.08)
    assert fit.cost.prefill_s_per_token == pytest.approx(cost.prefill_s_per_token, rel=0.03)
    assert fit.cost.prefill_s_per_token_pair == pytest.approx(cost.prefill_s_per_token_pair, rel=0.05)
    assert fit.cost.decode_base_s == pytest.approx(cost.decode_base_s, rel=0.05)


def test_without_a_floor_there_is_none() -> None:
    cost = CostModel(0.002, 0.0, 1e-4, 1e-9, 0.01, 1e-4, 1e-7)
    fit = fit_costs(moments_of(workload(cost, 3, sigma=0.03)))
    assert fit.cost.prefill_s([(8, 0)]) == pytest.approx(cost.prefill_s([(8, 0)]), rel=0.05)
    assert fit.cost.prefill_s([(600, 0)]) == pytest.approx(cost.prefill_s([(600, 0)]), rel=0.05)


def test_a_coefficient_is_never_negative() -> None:
    """More sequences that take less time: no time per sequence, and the mean for all."""
    steps = [(StepKind.DECODE, n, 100 * n + 7 * (n % 3), 0.02 - 1e-4 * n) for n in range(1, 60)]
    cost = CostModel(0.002, 0.0, 1e-4, 1e-9, 0.0, 0.0, 0.0)
    fit = fit_costs(moments_of(iter([*steps, *(step for step in workload(cost, 1, 0.0) if step[0] != "decode")])))
    assert fit.cost.decode_s_per_seq == fit.cost.decode_s_per_kv_token == 0
    assert fit.cost.decode_base_s == pytest.approx(sum(s for *_, s in steps) / len(steps))


ROW = HARDWARE["8b-h100"].cost
GOOD_DECODES = [decode(ROW, n, 1000 * n + 37 * (n % 7)) for n in range(1, 50)]
GOOD_PREFILLS = [prefill(ROW, 20 * n + 1, 100 * (n % 5)) for n in range(1, 50)]


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        (GOOD_PREFILLS, "0 steps that only decode were measured"),
        (GOOD_DECODES, "0 steps that only prefill were measured"),
        ([*GOOD_DECODES, *GOOD_PREFILLS[:19]], "19 steps that only prefill"),
        ([*GOOD_PREFILLS, *(decode(ROW, 4, 1000 * n) for n in range(50))], "decode_s_per_seq is not determined"),
        ([*GOOD_PREFILLS, *(decode(ROW, n, 0) for n in range(1, 50))], "decode_s_per_kv_token is not determined"),
        ([*GOOD_PREFILLS, *(decode(ROW, n, 64 * n) for n in range(1, 50))], "decode_s_per_kv_token is not determined"),
        ([*GOOD_DECODES, *(prefill(ROW, 512, 512 * n) for n in range(50))], "prefill_s_per_token is not determined"),
        ([*GOOD_DECODES, *([prefill(ROW, 512, 0)] * 50)], "prefill_s_per_token is not determined"),
        (
            [*GOOD_DECODES, *(prefill(ROW, n, 0) for n in (600, 700) for _ in range(50))],
            "prefill_s_per_token_pair is not determined",
        ),
    ],
)
def test_what_steps_leave_open_is_named(steps: list[Step], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit_costs(moments_of(iter(steps)))


def test_steps_that_did_both_are_only_counted() -> None:
    steps = [*GOOD_PREFILLS, *GOOD_DECODES]
    mixed = [(StepKind.MIXED, 100, 5000, 99.0)] * 7
    fit, without = (fit_costs(moments_of(iter(each))) for each in ([*steps, *mixed], steps))
    assert (fit.cost, fit.num_mixed_steps, without.num_mixed_steps) == (without.cost, 7, 0)


# --- sums over time and over workers ----------------------------------------------------------------------------------


def test_two_reports_give_the_time_between() -> None:
    slow = CostModel(1.0, 1.0, 1e-2, 1e-6, 1.0, 1e-2, 1e-5)
    before = moments_of(workload(slow, 1, 0.0))
    after = added((*before, *moments_of(workload(ROW, 2, 0.0))))
    assert_equal(fit_costs(between(before, after)), ROW, rel=1e-3)
    assert between(after, after) == ()
    with pytest.raises(ValueError, match="sums of decode steps have fallen"):
        between(after, before)


def some(kind: StepKind, value: float) -> tuple[StepMoments, ...]:
    return (StepMoments(kind, (value,) * len(TERMS)),)


def test_what_a_worker_told_last_stays_counted() -> None:
    every = AllStepMoments()
    assert every.of_all({}) == ()
    a, b, c = ("w-0", "life-1"), ("w-1", "life-1"), ("w-1", "life-2")
    first = {a: some(StepKind.DECODE, 1.0), b: some(StepKind.DECODE, 10.0)}
    assert every.of_all(first) == some(StepKind.DECODE, 11.0)
    second = {a: some(StepKind.DECODE, 2.0), c: some(StepKind.MIXED, 5.0)}
    told = (*some(StepKind.DECODE, 12.0), *some(StepKind.MIXED, 5.0))
    assert every.of_all(second) == every.of_all(second) == told
    assert every.of_all({}) == told
