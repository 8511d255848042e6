"""Placement by what workers say of themselves: what prefill and a pull cost them, and who has the last turn's KV."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.cost_model import PullCost, prefill_line
from protos.types import FinishReason
from router.events import Effect, WorkerDown
from router.policies.config import PolicyConfig
from router.router import Router
from tests.router.test_router_queues import SECOND_PER_TOKEN, prompt
from tests.router.values import BLOCK, CONFIG, arrived, make_router, output, reported, sends, stats

PATIENT = replace(CONFIG, refuses_early=False, ttft_slo_s=1e6)
QUICK, DEAR = PullCost(0.01), PullCost(s_per_token=0.01, base_s=1e4)


def told(config: object = PATIENT, pull: PullCost | None = None, workers: str = "p-0 p-1 d-0") -> Router:
    """Every worker says that a token takes it a second."""
    router = make_router(*workers.split(), config=config)  # type: ignore[arg-type]
    for worker_id in workers.split():
        router.on(reported(worker_id, stats=stats(prefill_s_per_token=1.0, pull_cost=pull)), 0.0)
    return router


def test_a_fitted_cost_goes_before_seconds_per_token_and_a_set_one_before_both() -> None:
    for config, expected in ((PATIENT, 10.0 + 2 * 8), (replace(PATIENT, cost=SECOND_PER_TOKEN), 8.0)):
        view = told(config).view.workers["p-0"]
        assert view.prefill_s(8, 0) == 8.0
        view.stats = replace(view.stats, prefill_cost=prefill_line(10.0, 2.0, 0.0))
        assert view.prefill_s(8, 0) == expected


def test_waits_are_told_by_the_order_without_a_cost_model_too() -> None:
    router = told(replace(PATIENT, dispatch_tokens=1, queue_order="shortest_remaining"), workers="p-0 d-0")
    for name, num_tokens in (("sent", 8), ("short", 12), ("long", 40)):
        router.on(arrived(name, prompt(num_tokens, num_tokens)), 0.0)
    view = router.view.workers["p-0"]
    assert (view.sent_s, len(view.queue)) == (8.0, 2)
    assert view.backlog_s(0.1) == 8.0 and view.backlog_s(20.0) == 20.0 and view.backlog_s(1000.0) == 60.0


def homes_asked(effects: list[Effect]) -> tuple[str, ...]:
    [submit] = [each for worker, send in sends(effects).items() if worker[0] == "p" for each in send.submits]
    return submit.home_worker_ids


@pytest.mark.parametrize(
    ("pull", "setting", "pulls"),
    [(QUICK, None, True), (DEAR, None, False), (None, None, False), (None, 0.01, True), (QUICK, 0.0, False)],
)
def test_pulls_are_reckoned_by_what_the_worker_says_unless_set(
    pull: PullCost | None, setting: float | None, pulls: bool
) -> None:
    config = replace(PATIENT, policy=PolicyConfig("round_robin"), pull_s_per_token=setting)
    router = told(config, pull)
    shared = prompt(1, 40)
    first = router.on(arrived("a", [*shared, 1]), 0.0)
    second = router.on(arrived("b", [*shared, 2]), 0.0)
    assert homes_asked(first) == ()
    [source] = [worker_id for worker_id in sends(first) if worker_id != "d-0"]
    assert (source in homes_asked(second)) == pulls
    [chosen] = [worker_id for worker_id in sends(second) if worker_id != "d-0"]
    assert router.view.workers[chosen].num_pending_tokens == (1 if pulls else 41)


def answered(router: Router, name: str, tokens: list[int], num_output: int = 8) -> list[int]:
    """The first turn, from end to end, and the conversation so far."""
    effects = router.on(arrived(name, tokens, max_tokens=num_output), 0.0)
    [prefill] = [worker_id for worker_id in sends(effects) if worker_id != "d-0"]
    router.on(reported(prefill, output(name, 0, 7)), 1.0)
    rest = [8] * (num_output - 1)
    router.on(reported("d-0", output(name, 1, *rest, finish=FinishReason.LENGTH)), 2.0)
    return [*tokens, 7, *rest]


def test_the_next_turn_is_sent_to_pull_the_answer_from_whoever_decoded_it() -> None:
    router = told(pull=QUICK)
    said = answered(router, "one", prompt(1, 3 * BLOCK))
    second = router.on(arrived("two", [*said, 5]), 3.0)
    assert homes_asked(second)[0] == "d-0"
    [chosen] = [worker_id for worker_id in sends(second) if worker_id != "d-0"]
    num_held = (len(said) - 1) // BLOCK * BLOCK  # the last token has no KV
    assert router.view.workers[chosen].num_pending_tokens == len(said) + 1 - num_held
    assert router.view.workers[chosen].pending_us.total == 1e6 * (len(said) + 1 - num_held)


def test_no_answer_is_counted_on_that_cannot_be_this_ones_last_turn() -> None:
    router = told(pull=QUICK)
    answered(router, "one", prompt(1, 3 * BLOCK))
    assert homes_asked(router.on(arrived("other question", [*prompt(1, 3 * BLOCK), 5, 6, 7]), 3.0)) == ()
    router.on(WorkerDown("d-0", "1", "killed"), 4.0)
    said = [*prompt(1, 3 * BLOCK), 7, *[8] * 7]
    assert homes_asked(router.on(arrived("two", [*said, 5]), 5.0)) == ()
