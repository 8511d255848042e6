"""What a worker makes of its own steps and pulls: costs that it decides by and tells the router."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import PullConfig
from engine.prefill_speed import MAX_FIT_STEPS, STEPS_PER_FIT, PrefillSpeed
from engine.pull_speed import ASSUMED_BASE_S, ASSUMED_NBYTES_PER_S, PullSpeed
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from protos.cost_model import CostModel, PullCost, prefill_line
from protos.types import SamplingParams

STEP = prefill_line(base_s=0.004, s_per_token=2e-5, s_per_token_pair=1e-8)
MAX_STEP = 512
SAMPLING = SamplingParams(0.0, 1.0, 0, 0, 1)
KV_NBYTES = 1000
ASSUMED = PullCost(KV_NBYTES / ASSUMED_NBYTES_PER_S, ASSUMED_BASE_S)


def step(num_new: int, num_cached: int) -> SchedulerOutput:
    tokens = array("i", range(num_cached + num_new))
    chunk = ScheduledRequest("r", tokens, len(tokens), num_cached, num_new, [], SAMPLING, samples=False)
    return SchedulerOutput(1, (chunk,), num_new, ())


def run(speed: PrefillSpeed, num_steps: int, cost: CostModel = STEP) -> None:
    for number in range(num_steps):
        num_new, num_cached = (16, 100, 300, MAX_STEP)[number % 4], (0, 700, 2500)[number % 3]
        speed.note_step(step(num_new, num_cached), cost.prefill_s([(num_new, num_cached)]))


def test_before_there_are_enough_steps_a_prompt_costs_so_much_a_token() -> None:
    speed = PrefillSpeed(MAX_STEP)
    assert speed.prefill_s(1000, 0) == 0
    speed.note_step(step(100, 0), 0.2)
    assert speed.cost is None and speed.prefill_s(1000, 4000) == pytest.approx(2.0)


def test_steps_that_vary_make_a_cost_model_of_prompts() -> None:
    speed = PrefillSpeed(MAX_STEP)
    run(speed, STEPS_PER_FIT)
    in_steps = STEP.prompt_s(20 * MAX_STEP, 512, MAX_STEP)
    assert speed.prefill_s(20 * MAX_STEP, 512) == pytest.approx(in_steps, rel=0.02)
    assert speed.prefill_s(200, 0) == pytest.approx(STEP.prefill_s([(200, 0)]), rel=0.1)


@pytest.mark.parametrize("same", [True, False])
def test_steps_that_are_alike_or_say_nothing_leave_seconds_per_token(same: bool) -> None:
    speed = PrefillSpeed(MAX_STEP)
    for number in range(2 * STEPS_PER_FIT):
        speed.note_step(step(100, 0) if same else step(20 + number, 7 * number), 0.1)
    assert speed.cost is None and speed.prefill_s(500, 0) == 500 * speed.s_per_token > 0


def test_the_fit_follows_the_latest_steps() -> None:
    speed = PrefillSpeed(MAX_STEP)
    slow = prefill_line(0.008, 4e-5, 2e-8)
    run(speed, 2 * MAX_FIT_STEPS)
    for _ in range(2 * MAX_FIT_STEPS // STEPS_PER_FIT):
        run(speed, STEPS_PER_FIT, slow)
        assert speed.cost is not None
    assert speed.prefill_s(5000, 0) == pytest.approx(slow.prompt_s(5000, 0, MAX_STEP), rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 512), st.integers(0, 9000), st.floats(1e-6, 10.0)), max_size=200))
def test_whatever_steps_there_were_more_tokens_never_cost_less(steps: list[tuple[int, int, float]]) -> None:
    speed = PrefillSpeed(MAX_STEP)
    for num_new, num_cached, duration_s in steps:
        speed.note_step(step(num_new, num_cached), duration_s)
    costs = [speed.prefill_s(num_tokens, 100) for num_tokens in (0, 1, 100, 10_000)]
    assert costs == sorted(costs) and costs[0] == 0


def pull_speed(**settings: float) -> PullSpeed:
    return PullSpeed(PullConfig(**settings), KV_NBYTES)  # type: ignore[arg-type]


def cost_of(speed: PullSpeed) -> PullCost:
    assert speed.cost is not None
    return speed.cost


def test_a_number_in_the_settings_is_the_cost_whatever_is_measured() -> None:
    speed = pull_speed(s_per_token=0.5, base_s=2.0)
    speed.note_pull(100, 1e-9, 1e-9)
    assert cost_of(speed) == PullCost(0.5, 2.0)
    assert PullSpeed(None, KV_NBYTES).cost is None


def test_pulls_are_measured_a_big_one_at_once() -> None:
    speed = pull_speed()
    assert cost_of(speed) == ASSUMED
    speed.note_pull(100_000, 2.0, 2.5)
    assert cost_of(speed).s_per_token == pytest.approx(2e-5, rel=0.01)
    for _ in range(50):
        speed.note_pull(1000, 0.05, 0.25)
    assert cost_of(speed).s_per_token == pytest.approx(5e-5, rel=0.01)
    assert cost_of(speed).base_s == pytest.approx(0.2, rel=0.01)


def test_a_network_that_was_slow_once_is_tried_again() -> None:
    speed = pull_speed()
    speed.note_pull(10_000, 5.0, 6.0)
    speed.note_late(2.0)
    was = cost_of(speed)
    assert was.s_per_token > 100 * ASSUMED.s_per_token and was.base_s > 0.4
    for _ in range(20_000):
        speed.note_step()
    now = cost_of(speed)
    assert now.s_per_token < 3 * ASSUMED.s_per_token
    assert now.base_s == pytest.approx(ASSUMED.base_s, rel=0.1)
