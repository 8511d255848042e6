"""Which workers come and go when pools change their sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RayConfig, ServeConfig
from cluster.pools import pools_of
from protos.types import Role
from router.config import RouterConfig
from router.pools import Changes, Pools, Turn

COLOCATED = ServeConfig(num_prefill=2, num_decode=1, router=RouterConfig(mode="colocated"))


def pools(num_prefill: int, num_decode: int) -> Pools:
    return pools_of(ServeConfig(num_prefill=num_prefill, num_decode=num_decode))


def test_a_pool_grows_by_the_lowest_free_names_and_shrinks_by_the_newest() -> None:
    one = pools(1, 1)
    assert one.scale({"prefill": 3}, ()) == Changes(starts=("prefill-1", "prefill-2"))
    one.without("prefill-0")
    assert one.scale({"prefill": 3}, taken={"prefill-0"}) == Changes(starts=("prefill-3",))
    assert one.scale({"prefill": 1, "decode": 1}, ()) == Changes(drains=("prefill-3", "prefill-2"))
    assert list(one.slots) == ["decode-0", "prefill-1"]
    assert one.num_expected == (1, 1)


def test_where_one_shrinks_and_the_other_grows_workers_change_over() -> None:
    one = pools(1, 3)
    changes = one.scale({"prefill": 2, "decode": 1}, ())
    assert changes == Changes((), ("decode-1",), (Turn("decode-2", "prefill-1", Role.PREFILL),))
    assert one.slots == {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE, "prefill-1": Role.PREFILL}


@pytest.mark.parametrize(
    "config",
    [
        ServeConfig(num_decode=2, ray=RayConfig(decode_resource="decode_node")),
        replace(ServeConfig(num_decode=2), engine=replace(ServeConfig().engine, host_cache_bytes=1 << 20)),
    ],
)
def test_workers_that_are_not_alike_do_not_change_over(config: ServeConfig) -> None:
    assert pools_of(config).scale({"prefill": 2, "decode": 1}, ()) == Changes(("prefill-1",), ("decode-1",))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prefill": 0}, "num_prefill must be at least 1, not 0"),
        ({"decode": -1}, "pool decode cannot have -1 workers"),
        ({"router": 2}, "there is no pool 'router'; pools are prefill and decode"),
        ({"prefill": 5, "decode": -2}, "pool decode cannot have -2 workers"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(sizes: dict[str, int], message: str) -> None:
    one = pools(2, 2)
    before = dict(one.slots)
    with pytest.raises(ValueError, match=message):
        one.scale(sizes, ())
    assert one.slots == before


def test_the_last_worker_that_prefills_stays() -> None:
    one = pools(1, 1)
    with pytest.raises(ValueError, match="num_prefill must be at least 1, not 0"):
        one.without("prefill-0")
    one.without("decode-0")
    assert one.num_expected == (1, 0)


def test_one_address_for_all_workers_of_a_machine_leaves_room_for_one() -> None:
    one = pools_of(ServeConfig(num_prefill=1, num_decode=0, worker_port=7001))
    with pytest.raises(ValueError, match="worker_port 7001"):
        one.scale({"decode": 1}, ())


def test_colocated_workers_are_one_pool() -> None:
    one = pools_of(COLOCATED)
    assert one.scale({"worker": 4}, ()) == Changes(starts=("worker-3",))
    assert one.num_expected == (4, 0)
    with pytest.raises(ValueError, match="there is no pool 'prefill'; pools are worker"):
        one.scale({"prefill": 1}, ())
    with pytest.raises(ValueError, match="pool worker must have at least 1 worker, not 0"):
        one.scale({"worker": 0}, ())


sizes = st.dictionaries(st.sampled_from(["prefill", "decode"]), st.integers(-1, 6))


@given(st.lists(sizes, max_size=6), st.sets(st.sampled_from([f"prefill-{i}" for i in range(8)])))
def test_every_change_leads_from_the_slots_before_to_the_slots_after(
    orders: list[dict[str, int]], taken: set[str]
) -> None:
    one = pools(2, 2)
    for order in orders:
        before = dict(one.slots)
        try:
            changes = one.scale(order, taken)
        except ValueError:
            assert one.slots == before
            continue
        gone = {*changes.drains, *(turn.worker_id for turn in changes.turns)}
        come = {*changes.starts, *(turn.becomes for turn in changes.turns)}
        assert one.slots.keys() == (before.keys() - gone) | come
        assert gone <= before.keys()
        assert not come & (before.keys() | taken)
        for pool, size in order.items():
            assert len(one.members(pool)) == size
        assert all(role.value == worker_id.partition("-")[0] for worker_id, role in one.slots.items())
        for turn in changes.turns:
            assert turn.role is one.slots[turn.becomes]
            assert turn.worker_id.partition("-")[0] != turn.becomes.partition("-")[0]
        assert not (changes.starts and changes.drains)
