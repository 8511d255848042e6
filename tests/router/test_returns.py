"""The router's part in a return: it names the home, and counts on the KV there once the prompt is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.types import GenerateRequest
from router.config import RouterConfig
from router.policies.config import PolicyConfig
from router.router import Router
from tests.router.test_router_queues import SECOND_PER_TOKEN, prompt
from tests.router.values import CONFIG, arrived, links_of, make_router, output, reported, sends

HOME_PAIR = PolicyConfig("home_pair", num_sampled=4, remembers=False, duplicate_cost=0.0)
RETURNS = replace(CONFIG, cost=SECOND_PER_TOKEN, refuses_early=False, policy=HOME_PAIR, returns=True)
SHARED = prompt(1, 40)


def run_four(config: RouterConfig) -> tuple[Router, dict[str, GenerateRequest]]:
    """Requests of one home pair on four workers that are all free at first: what each worker was sent."""
    router = make_router(*(f"p-{i}" for i in range(4)), config=config)
    sent: dict[str, GenerateRequest] = {}
    for number in range(4):
        [(worker_id, send)] = sends(router.on(arrived(f"r{number}", [*SHARED, 1000 + number]), 0.0)).items()
        sent[worker_id] = send.submits[0]
    assert len(sent) == 4
    return router, sent


def test_away_from_home_it_is_returned_to_a_home_and_counted_on_after_its_first_token() -> None:
    router, sent = run_four(RETURNS)
    links = links_of(sent["p-0"].token_ids)
    home = set(router.view.home_worker_ids(links))
    assert {worker_id for worker_id, request in sent.items() if not request.return_worker_id} == home
    for away, request in sent.items():
        if away in home:
            continue
        assert request.return_worker_id in home
        prefixes = router.view.workers[request.return_worker_id].prefixes
        longer = links_of(request.token_ids)
        prefixes.resize(0)
        assert prefixes.num_matching(longer) == 0
        prefixes.resize(100)
        router.on(reported(away, output(request.request_id, 0, 7)), 1.0)
        assert prefixes.num_matching(longer) == len(longer)


@pytest.mark.parametrize(
    "changes", [{"returns": False}, {"policy": PolicyConfig("round_robin")}, {"policy": PolicyConfig("least_loaded")}]
)
def test_without_returns_or_homes_nothing_is_returned(changes: dict[str, object]) -> None:
    _, sent = run_four(replace(RETURNS, **changes))  # type: ignore[arg-type]
    assert all(request.return_worker_id == "" for request in sent.values())
