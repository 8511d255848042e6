"""What holds for every policy, and the config that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.policies.base import PlacementPolicy
from router.policies.config import PolicyConfig, PolicyName
from router.policies.make import make_policy
from tests.router.policies.view import BLOCK, FakeView, Load

NAMES: Sequence[PolicyName] = get_args(PolicyName)
CONSTANT_WORK: tuple[PolicyName, ...] = (
    "round_robin",
    "random",
    "least_loaded",
    "single_ring",
    "prefix_hash",
    "dual_map",
    "home_pair",
)
LOADS = st.dictionaries(
    st.sampled_from([f"p-{index}" for index in range(10)]),
    st.builds(
        Load,
        num_pending_tokens=st.integers(0, 20_000),
        num_cached_tokens=st.integers(0, 6).map(lambda blocks: blocks * BLOCK),
        num_held_blocks=st.integers(0, 100),
    ),
    min_size=1,
    max_size=10,
)


def policy(name: PolicyName, **fields: object) -> PlacementPolicy:
    return make_policy(PolicyConfig(name, **fields), ttft_slo_s=5.0, block_size=BLOCK)  # type: ignore[arg-type]


def view(loads: dict[str, Load], num_tokens: int, prefix: str = "prompt", pull_s: float = 0.0001) -> FakeView:
    if num_tokens < 7 * BLOCK:  # too short to be cached as the loads say
        loads = {name: Load(load.num_pending_tokens, 0, load.num_held_blocks) for name, load in loads.items()}
    return FakeView(loads, num_tokens, prefix, pull_s)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(loads=LOADS, num_tokens=st.sampled_from([5, 7 * BLOCK, 40_000]), prefix=st.text(max_size=2))
def test_one_that_is_offered_is_chosen_whatever_order_workers_came_in(
    name: PolicyName, loads: dict[str, Load], num_tokens: int, prefix: str
) -> None:
    choice = policy(name).place(view(loads, num_tokens, prefix))
    assert choice.worker_id in loads
    assert set(choice.sources) <= loads.keys()
    assert choice.worker_id not in choice.sources[:1]
    assert choice.reason
    reordered = dict(reversed(loads.items()))
    assert policy(name).place(view(reordered, num_tokens, prefix)) == choice


@pytest.mark.parametrize("name", NAMES)
def test_the_work_of_a_route_grows_with_the_workers_only_where_it_must(name: PolicyName) -> None:
    for num_workers in (4, 400):
        loads = {f"p-{index}": Load(100) for index in range(num_workers)}
        asked = FakeView(loads, pull_s_per_token=0.0001)
        policy(name).place(asked)
        if name in CONSTANT_WORK:
            assert asked.asked.total() <= 8, asked.asked
        else:
            assert asked.asked["candidate"] == num_workers


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_worker_gets_everything(name: PolicyName) -> None:
    for num_tokens in (5, 1000):
        assert policy(name).place(FakeView({"p-0": Load(10**9)}, num_tokens)).worker_id == "p-0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "dualmap"}, "policy name must be one of round_robin, .*, home_pair, got 'dualmap'"),
        ({"load_factor": 0.9}, "load_factor must be at least 1, got 0.9"),
        ({"load_factor": float("nan")}, "load_factor must be at least 1, got nan"),
        ({"num_sampled": -1}, "num_sampled must be at least 0, got -1"),
        ({"num_prefix_blocks": 0}, "num_prefix_blocks must be at least 1, got 0"),
        ({"min_match_share": 1.5}, r"min_match_share must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_could_never_work(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**fields)  # type: ignore[arg-type]
