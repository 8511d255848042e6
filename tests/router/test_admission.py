"""Taken while the SLO can be met; refused at once, with a time to come back, where it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.cost_model import CostModel
from router.admission import early_refusal
from router.config import RouterConfig
from router.events import Fail
from router.policy import Candidate
from tests.router.values import CONFIG as ROUTER
from tests.router.values import arrived, make_router

CONFIG = RouterConfig(ttft_slo_s=2.0, max_requests_per_worker=10)
IDLE = Candidate("decode-0", num_requests=9)


def prefill(num_pending_tokens: int) -> Candidate:
    return Candidate("prefill-0", num_pending_tokens=num_pending_tokens)


def test_taken_up_to_the_slo() -> None:
    assert early_refusal(CONFIG, 2, 0, None, prefill(1000), IDLE) is None


def test_refused_beyond_it_until_the_queue_has_drained() -> None:
    refused = early_refusal(CONFIG, 2.5, 0, None, prefill(1500), IDLE)
    assert refused is not None
    assert "2.50 s" in refused.message
    assert "1500 tokens are pending on prefill-0" in refused.message
    assert refused.retry_after_s == pytest.approx(0.5)


def test_a_deadline_can_be_tighter_than_the_slo() -> None:
    assert early_refusal(CONFIG, 1.5, 0, 1.0, prefill(500), IDLE) is not None
    assert early_refusal(CONFIG, 2, 0, 9.0, prefill(1000), IDLE) is None


def test_a_long_prompt_on_an_idle_worker_is_taken() -> None:
    """It misses the SLO wherever and whenever it runs: to refuse it would be to refuse it for good."""
    assert early_refusal(CONFIG, 100, 0, None, prefill(0), IDLE) is None


def test_priority_goes_ahead_of_the_queue() -> None:
    assert early_refusal(CONFIG, 51, 1, None, prefill(50_000), IDLE) is None


def test_the_switch_turns_only_the_slo_off() -> None:
    config = RouterConfig(ttft_slo_s=2.0, max_requests_per_worker=10, refuses_early=False)
    assert early_refusal(config, 51, 0, None, prefill(50_000), IDLE) is None
    assert early_refusal(config, 1, 0, None, prefill(0), Candidate("decode-0", num_requests=10)) is not None


@pytest.mark.parametrize("priority", [0, 1])
def test_a_full_decode_worker_refuses(priority: int) -> None:
    refused = early_refusal(CONFIG, 0.01, priority, None, prefill(0), Candidate("decode-0", num_requests=10))
    assert refused is not None
    assert "decode-0 has 10 requests" in refused.message


@pytest.mark.parametrize(
    ("changes", "is_taken"),
    [
        ({"queue_order": "shortest_remaining"}, True),
        ({"queue_order": "shortest_remaining", "estimates_by_order": False}, False),
        ({"queue_order": "first_come"}, False),
        ({"queue_order": "first_come", "refuses_early": False}, True),
    ],
)
def test_only_what_goes_first_is_held_against_a_request(changes: dict[str, object], is_taken: bool) -> None:
    """A second a token: 6 were sent, 12 are queued, and this one has 3."""
    cost = CostModel(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    config = replace(ROUTER, dispatch_tokens=1, cost=cost, ttft_slo_s=18.0, **changes)  # type: ignore[arg-type]
    router = make_router("p-0", "d-0", config=config)
    router.on(arrived("sent", list(range(6))), 0.0)
    router.on(arrived("long", list(range(100, 112))), 0.0)
    assert router.num_in_flight == 2
    refused = [e for e in router.on(arrived("short", [1, 2, 3]), 0.0) if isinstance(e, Fail)]
    assert bool(refused) != is_taken
