"""Workers that take as long as a cost model says report sums from which that very model is fitted."""

from __future__ import annotations

from dataclasses import astuple, replace
from random import Random

import pytest

from protos.cost_fit import fit_costs
from protos.step_moments import added
from simulator.cluster import SimulatedCluster
from simulator.requests import SimRequest
from tests.simulator.values import BLOCK, COST, HARDWARE, request, setup


def prompts(num_requests: int, rng: Random) -> list[SimRequest]:
    """Of 1 to 40 blocks, most of them short, half behind one of three beginnings, now alone and now in crowds."""
    at_s, requests = 0.0, []
    for number in range(num_requests):
        at_s += rng.choice([0.0, 0.0, 0.02, 0.3])
        shared = rng.choice([(), (), (), *(tuple(range(100 * i, 100 * i + 10 * i)) for i in (1, 2, 3))])
        own = tuple(range(10_000 + 100 * number, 10_000 + 100 * number + rng.choice([1, 1, 2, 4, 9, 40])))
        requests.append(request(at_s, shared + own, rng.choice([2, 9, 40, 90]), rng.randint(0, BLOCK - 1)))
    return requests


def test_simulated_workers_are_fitted_exactly() -> None:
    shape = {"num_prefill": 1, "num_decode": 1, "max_num_batched_tokens": 256, "fast_forwards": False}
    hardware = replace(HARDWARE, num_kv_tokens=2000 * BLOCK)
    cluster = SimulatedCluster(setup(**shape, hardware=hardware))
    cluster.run(prompts(300, Random(1)))
    fit = fit_costs(added(each for host in cluster._hosts.values() for each in host.core.stats().step_moments))
    assert astuple(fit.cost) == pytest.approx(astuple(COST), rel=1e-4)
    assert fit.prefill.num_steps > 100 < fit.decode.num_steps
