from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.hash_ring import RingPair

KEYS = [index.to_bytes(16, "little") for index in range(300)]
names = st.text(alphabet="abcdef0123456789-", min_size=1, max_size=8)
members = st.lists(names, min_size=1, max_size=8, unique=True)


def ring_of(worker_ids: list[str], seed: int = 7) -> RingPair:
    ring = RingPair(seed, num_virtual_nodes=16)
    for worker_id in worker_ids:
        ring.add(worker_id)
    return ring


def test_an_empty_ring_has_no_candidates() -> None:
    assert ring_of([]).candidates(b"key") == ()


@given(members)
def test_candidates_are_distinct_members(worker_ids: list[str]) -> None:
    ring = ring_of(worker_ids)
    for key in KEYS[:50]:
        candidates = ring.candidates(key)
        assert len(candidates) == min(2, len(worker_ids))
        assert len(set(candidates)) == len(candidates)
        assert set(candidates) <= set(worker_ids)


@given(members, st.randoms(use_true_random=False), names)
def test_the_same_members_give_the_same_candidates_whatever_their_history(
    worker_ids: list[str], random: object, gone: str
) -> None:
    shuffled = list(worker_ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = ring_of([*shuffled, gone] if gone not in shuffled else shuffled)
    if gone not in worker_ids:
        other.remove(gone)
    ring = ring_of(worker_ids)
    assert [ring.candidates(key) for key in KEYS] == [other.candidates(key) for key in KEYS]


@given(members, names)
def test_a_join_moves_keys_to_the_newcomer_only(worker_ids: list[str], newcomer: str) -> None:
    if newcomer in worker_ids:
        return
    before, after = ring_of(worker_ids), ring_of([*worker_ids, newcomer])
    for key in KEYS:
        old, new = before.candidates(key), after.candidates(key)
        assert set(new) - {newcomer} <= set(old)
        assert newcomer in new or new == old


@given(st.lists(names, min_size=3, max_size=8, unique=True))
def test_a_leave_keeps_every_pair_that_did_not_name_the_leaver(worker_ids: list[str]) -> None:
    ring = ring_of(worker_ids)
    before = {key: ring.candidates(key) for key in KEYS}
    leaver = worker_ids[0]
    ring.remove(leaver)
    for key, old in before.items():
        new = ring.candidates(key)
        assert leaver not in new
        if leaver not in old:
            assert new == old
        else:
            assert set(old) - {leaver} <= set(new)  # the other home stays


def test_keys_spread_over_the_workers_and_over_pairs() -> None:
    worker_ids = [f"prefill-{index}" for index in range(4)]
    ring = RingPair(0, num_virtual_nodes=64)
    for worker_id in worker_ids:
        ring.add(worker_id)
    first = [ring.candidates(key)[0] for key in KEYS]
    assert all(first.count(worker_id) > len(KEYS) / 10 for worker_id in worker_ids)
    pairs = {frozenset(ring.candidates(key)) for key in KEYS}
    assert len(pairs) == 6  # every pair of four occurs: the two hashes are independent


def test_seeds_give_other_candidates() -> None:
    worker_ids = [f"prefill-{index}" for index in range(8)]
    one, two = ring_of(worker_ids, seed=1), ring_of(worker_ids, seed=2)
    assert sum(one.candidates(key) == two.candidates(key) for key in KEYS) < len(KEYS) / 4


def test_adding_twice_changes_nothing() -> None:
    twice = ring_of(["a", "b", "a"])
    twice.remove("a")
    assert twice.candidates(b"key") == ("b",)
