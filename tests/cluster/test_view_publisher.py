"""What the routers of a cluster share, over the real views that routers keep: same version, same home pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.view_publisher import ViewPublisher
from protos.types import PeerRef, Role
from router.cluster_view import ClusterView
from router.config import RouterConfig
from router.key_depth import KeyDepthConfig, KeyDepths
from router.published_view import Lacking, PublishedView, RouterNews

CONFIG = RouterConfig()
ADAPTS = replace(CONFIG, adapts_key_depth=True, key_depth=KeyDepthConfig(window=20, hot_share=0.5, cold_share=0.25))
NUM_KEYS = 10_000
KEYS = [(number.to_bytes(4, "big"), (number * 7).to_bytes(5, "big")) for number in range(NUM_KEYS)]


def ref(worker_id: str, incarnation: str = "1") -> PeerRef:
    return PeerRef(worker_id, incarnation, f"{worker_id}:1", Role.PREFILL if worker_id[0] == "p" else Role.DECODE)


def lacks(*refs: PeerRef) -> RouterNews:
    return RouterNews(tuple(Lacking(one, "broken") for one in refs))


def publisher(*worker_ids: str, config: RouterConfig = CONFIG, num_routers: int = 2) -> ViewPublisher:
    made = ViewPublisher(config, num_routers)
    for worker_id in worker_ids:
        made.joined(ref(worker_id), pid=0)
    for index in range(num_routers):
        made.router_up(f"router-{index}")
    return made


def follow(view: ClusterView, published: PublishedView, backwards: bool = False) -> None:
    """As router/membership.py does, when all members are reached; they answer in any order."""
    members = {one.worker_id: one for one in published.members}
    for worker_id in [one for one, worker in view.workers.items() if worker.ref != members.get(one)]:
        view.remove(worker_id)
    for worker_id in sorted(members.keys() - view.workers.keys(), reverse=backwards):
        view.add(members[worker_id])
    if published.depths is not None:
        view.follow(published.depths)


def home_pairs(view: ClusterView, keys: Sequence[tuple[bytes, ...]] = KEYS) -> list[tuple[str, ...]]:
    return [view.home_worker_ids(links) for links in keys]


def test_two_routers_name_the_same_home_pairs_through_a_join_a_leave_and_a_death() -> None:
    """One sees every version; the other one dies, and its successor sees the last one only."""
    names = [f"p-{index}" for index in range(8)]
    shared = publisher(*names, "d-0")
    one, other = ClusterView(CONFIG), ClusterView(CONFIG)

    def told() -> list[tuple[str, ...]]:
        follow(one, shared.view)
        follow(other, shared.view, backwards=True)
        pairs = home_pairs(one)
        assert pairs == home_pairs(other)
        return pairs

    first = told()
    shared.joined(ref("p-8"), pid=0)
    joined = told()
    assert 0 < sum(pair != before for pair, before in zip(joined, first, strict=True)) < NUM_KEYS / 2
    assert all("p-8" in pair for pair, before in zip(joined, first, strict=True) if pair != before)
    shared.left(ref("p-8"))
    assert told() == first
    for router_id in ("router-0", "router-1"):
        shared.heard(router_id, lacks(ref("p-3")))
    assert not any("p-3" in pair for pair in told())
    shared.router_down("router-1")
    shared.joined(ref("p-3", "2"), pid=0)
    shared.router_up("router-1")
    other = ClusterView(CONFIG)
    assert told() == first


def test_one_router_that_lacks_a_worker_does_not_make_it_lost() -> None:
    shared = publisher("p-0", "p-1", "d-0")
    version = shared.view.version
    assert shared.heard("router-0", lacks(ref("p-0"))) == ()
    assert shared.view.version == version
    # Found again, it does not count when the other one misses it later.
    assert shared.heard("router-0", RouterNews()) == ()
    assert shared.heard("router-1", lacks(ref("p-0"))) == ()
    assert [one.ref for one in shared.heard("router-0", lacks(ref("p-0")))] == [ref("p-0")]
    assert shared.view.version == version + 1
    assert [worker.is_up for worker in shared.view.workers] == [False, True, True]
    # Said again, it is no second death.
    assert shared.heard("router-1", lacks(ref("p-0"))) == ()
    assert shared.view.version == version + 1


def test_a_worker_that_only_a_dead_router_reached_is_lost_with_it() -> None:
    shared = publisher("p-0", "d-0")
    shared.heard("router-0", lacks(ref("d-0")))
    assert [one.ref for one in shared.router_down("router-1")] == [ref("d-0")]
    assert shared.heard("router-1", lacks(ref("p-0"))) == (), "what a dead router said last does not count"
    assert shared.view.members == (ref("p-0"),)


def test_without_routers_nobody_is_lost() -> None:
    shared = publisher("p-0")
    assert shared.router_down("router-0") == shared.router_down("router-1") == ()
    assert shared.view.members == (ref("p-0"),)


def test_an_earlier_life_neither_leaves_nor_dies_for_a_later_one() -> None:
    shared = publisher("p-0", num_routers=1)
    shared.joined(ref("p-0", "2"), pid=5)
    shared.left(ref("p-0", "1"))
    assert shared.heard("router-0", lacks(ref("p-0", "1"))) == ()
    assert shared.view.members == (ref("p-0", "2"),)
    assert len(shared.view.workers) == 1


# --- key depths ---------------------------------------------------------------------------------------------------

CHAINS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(
    lambda blocks: tuple(bytes(blocks[: end + 1]) for end in range(len(blocks)))
)


@settings(max_examples=40)
@given(st.lists(st.lists(CHAINS, min_size=1, max_size=15), min_size=2, max_size=12))
def test_key_depths_are_decided_once_by_what_all_routers_saw(batches: list[list[tuple[bytes, ...]]]) -> None:
    names = [f"p-{index}" for index in range(8)]
    shared = publisher(*names, config=ADAPTS)
    views = [ClusterView(ADAPTS), ClusterView(ADAPTS)]
    alone = KeyDepths(ADAPTS.key_depth)
    for number, batch in enumerate(batches):
        for view in views:
            follow(view, shared.view)
        for links in batch:
            views[number % 2].observe(links)
            alone.observe(links, len(names))
        before = shared.view
        shared.heard(f"router-{number % 2}", RouterNews(observed=views[number % 2].take_observed()))
        assert (shared.view.version > before.version) == (shared.view.depths != before.depths)
    assert shared.view.depths == alone.table.snapshot()
    late = ClusterView(ADAPTS)
    for view in (*views, late):
        follow(view, shared.view)
    for links in (chain for batch in batches for chain in batch):
        keys = {(view.home_key(links), tuple(view.earlier_keys(links)), view.home_worker_ids(links)) for view in views}
        assert keys == {(late.home_key(links), tuple(late.earlier_keys(links)), late.home_worker_ids(links))}
        assert late.key_depth(links) == alone.table.depth(links)


def test_a_single_router_decides_on_key_depths_itself() -> None:
    shared = publisher("p-0", "p-1", config=ADAPTS, num_routers=1)
    view = ClusterView(ADAPTS)
    follow(view, shared.view)
    links = tuple(bytes([9] * end) for end in range(1, 7))
    for _ in range(20):
        view.observe(links)
    assert shared.view.depths is None
    assert view.key_depth(links) == 6
    assert view.take_observed() == ()


# --- any history --------------------------------------------------------------------------------------------------

WORKERS = st.sampled_from(["p-0", "p-1", "d-0"])
ROUTERS = st.sampled_from(["router-0", "router-1", "router-2"])


class AnyHistory(RuleBasedStateMachine):
    """Against a model that keeps who lacks whom in the plainest way."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = ViewPublisher(CONFIG, 3)
        self.lacking: dict[str, set[PeerRef]] = {}
        self.up: dict[str, PeerRef] = {}
        self.num_lives = 0
        self.seen = [self.shared.view]

    def expect_lost(self, lost: tuple[Lacking, ...]) -> None:
        unreached = [
            one for one in self.up.values() if self.lacking and all(one in each for each in self.lacking.values())
        ]
        assert sorted(one.ref.worker_id for one in lost) == sorted(one.worker_id for one in unreached)
        for one in unreached:
            del self.up[one.worker_id]

    @rule(worker_id=WORKERS)
    def join(self, worker_id: str) -> None:
        self.num_lives += 1
        self.up[worker_id] = ref(worker_id, str(self.num_lives))
        self.shared.joined(self.up[worker_id], pid=0)

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.up.values(), key=lambda each: each.worker_id)))
        del self.up[one.worker_id]
        self.shared.left(one)

    @rule(router_id=ROUTERS)
    def router_comes(self, router_id: str) -> None:
        self.lacking[router_id] = set()
        self.shared.router_up(router_id)

    @rule(router_id=ROUTERS)
    def router_goes(self, router_id: str) -> None:
        self.lacking.pop(router_id, None)
        self.expect_lost(self.shared.router_down(router_id))

    @precondition(lambda self: self.lacking)
    @rule(data=st.data())
    def router_says(self, data: st.DataObject) -> None:
        router_id = data.draw(st.sampled_from(sorted(self.lacking)))
        known = sorted(self.up.values(), key=lambda each: each.worker_id)
        lacking = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        self.lacking[router_id] = set(lacking)
        self.expect_lost(self.shared.heard(router_id, lacks(*lacking)))

    @invariant()
    def the_view_is_who_is_up_and_every_change_has_its_number(self) -> None:
        view = self.shared.view
        assert set(view.members) == set(self.up.values())
        assert len({worker.ref.worker_id for worker in view.workers}) == len(view.workers)
        last = self.seen[-1]
        assert view.version >= last.version
        assert (view.version == last.version) == (view == last)
        self.seen.append(view)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=40, stateful_step_count=30)
