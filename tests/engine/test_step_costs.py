"""Every step is counted under its kind, in the terms of the cost model."""

from __future__ import annotations

from array import array

from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.step_costs import StepCosts
from protos.step_moments import TERMS, StepKind
from protos.types import SamplingParams

SAMPLING = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=8)


def scheduled(num_computed: int, num_new: int, samples: bool = True) -> ScheduledRequest:
    return ScheduledRequest("r", array("i"), 0, num_computed, num_new, [], SAMPLING, samples)


def step(*requests: ScheduledRequest) -> SchedulerOutput:
    return SchedulerOutput(1, requests, sum(each.num_scheduled_tokens for each in requests))


def noted(*steps: tuple[SchedulerOutput, float]) -> dict[StepKind, dict[str, float]]:
    costs = StepCosts()
    for output, duration_s in steps:
        costs.note_step(output, duration_s)
    return {each.kind: dict(zip(TERMS, each.sums, strict=True)) for each in costs.moments()}


def test_decodes_are_counted_by_sequences_and_kv() -> None:
    found = noted((step(scheduled(9, 1), scheduled(19, 1)), 0.5), (step(scheduled(10, 1)), 0.25))
    assert found.keys() == {StepKind.DECODE}
    assert found[StepKind.DECODE] == {
        "1": 2, "x": 3, "y": 41, "s": 0.75, "xx": 5, "xy": 71, "xs": 1.25, "yy": 1021, "ys": 17.75, "ss": 0.3125
    }  # fmt: skip


def test_prefills_are_counted_by_tokens_and_pairs_in_bins() -> None:
    long, short = step(scheduled(100, 64, samples=False), scheduled(0, 8)), step(scheduled(0, 31))
    found = noted((long, 2.0), (long, 2.0), (short, 1.0))
    assert found.keys() == {StepKind.PREFILL_64, StepKind.PREFILL_1}
    sums = found[StepKind.PREFILL_64]
    num_pairs = 64 * (100 + 32) + 8 * 4
    assert (sums["1"], sums["x"], sums["y"], sums["xy"], sums["ss"]) == (2, 144, 2 * num_pairs, 144 * num_pairs, 8.0)
    assert found[StepKind.PREFILL_1]["x"] == 31


def test_what_does_both_is_mixed_and_a_prompts_last_token_decodes() -> None:
    assert noted((step(scheduled(9, 1), scheduled(0, 4)), 1.0)).keys() == {StepKind.MIXED}
    assert noted((step(scheduled(9, 1, samples=False)), 1.0)).keys() == {StepKind.PREFILL_1}
    assert noted((step(scheduled(63, 1)), 1.0)).keys() == {StepKind.DECODE}
