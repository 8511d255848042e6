"""The home pair as a directory over the real view: routers that know the same name the same workers."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from protos.types import PeerRef, Role, WorkerStats
from router.cluster_view import ClusterView
from router.config import RouterConfig
from router.key_depth import KeyDepthConfig
from router.placement_view import RequestView
from router.policies.home_pair import HomePair
from router.sampling import Sampler

BLOCK = 4
CONFIG = RouterConfig(
    hash_block_size=BLOCK,
    block_size=BLOCK,
    num_virtual_nodes=8,
    adapts_key_depth=True,
    key_depth=KeyDepthConfig(window=8, hot_share=0.5, cold_share=0.25),
    pull_s_per_token=0.0001,
)
NAMES = [f"p-{index}" for index in range(8)]
CHAINS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(
    lambda blocks: tuple(bytes(blocks[: end + 1]) for end in range(len(blocks)))
)


def joined(view: ClusterView, worker_id: str) -> None:
    view.add(PeerRef(worker_id, "1", "", Role.PREFILL))
    stats = WorkerStats(num_blocks=100, num_free_blocks=100, prefill_s_per_token=0.001)
    view.note_stats(view.workers[worker_id], stats)


def cluster(names: list[str]) -> ClusterView:
    view = ClusterView(CONFIG)
    for name in names:
        joined(view, name)
    return view


def request(view: ClusterView, links: tuple[bytes, ...], config: RouterConfig = CONFIG) -> RequestView:
    return RequestView(config, view, Sampler(0), links, len(links) * BLOCK + 1)


@settings(max_examples=50)
@given(st.permutations(NAMES), st.sampled_from(NAMES), st.lists(CHAINS, min_size=1, max_size=30))
def test_equal_members_and_equal_depths_name_equal_home_pairs(
    order: list[str], leaves: str, chains: list[tuple[bytes, ...]]
) -> None:
    one, other = cluster(NAMES), cluster(order)
    other.remove(leaves)
    joined(other, leaves)
    for links in chains:
        one.observe(links)
        other.observe(links)
    for links in chains:
        assert request(one, links).home_pair() == request(other, links).home_pair()
        assert len(request(one, links).home_pair()) == 2


def test_kv_placed_under_an_earlier_key_is_found_again() -> None:
    view = cluster(NAMES)
    links = tuple(bytes([9] * end) for end in range(1, 7))
    before = request(view, links).home_pair()
    view.workers[before[0]].prefixes.note(links)
    for _ in range(5):
        view.observe(links)
    seen = request(view, links)
    assert before[0] not in seen.home_pair(), "its key has changed, and with it its home"
    assert before[0] in seen.earlier_homes()
    assert HomePair(num_sampled=0, pulls=True, remembers=False, duplicate_cost=0.0).place(seen).worker_id == before[0]
    # Once a home has what the key stands for, nobody else is asked.
    view.workers[seen.home_pair()[0]].prefixes.note(links)
    assert request(view, links).earlier_homes() == ()
    fixed = replace(CONFIG, adapts_key_depth=False)
    assert list(request(ClusterView(fixed), links, fixed).earlier_homes()) == []
