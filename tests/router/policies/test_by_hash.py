from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from router.policies.by_hash import PrefixHash, SingleRing
from tests.router.policies.view import FakeView, Load

WORKERS = [f"p-{index}" for index in range(8)]


def loads(amounts: Sequence[int]) -> dict[str, Load]:
    return dict(zip(WORKERS, map(Load, amounts), strict=False))


def test_a_prefix_stays_where_its_hash_is_whatever_the_load() -> None:
    first = PrefixHash(2).place(FakeView(loads([0] * 8)))
    overloaded = {**loads([0] * 8), first.worker_id: Load(10**6)}
    assert PrefixHash(2).place(FakeView(overloaded)) == first
    others = {PrefixHash(2).place(FakeView(loads([0] * 8), prefix=str(seed))).worker_id for seed in range(40)}
    assert len(others) > 4


def test_the_key_has_as_many_blocks_as_it_is_told() -> None:
    short, long = FakeView(loads([0] * 8), num_tokens=40), FakeView(loads([0] * 8), num_tokens=400)
    assert PrefixHash(2).place(short) == PrefixHash(2).place(long)
    one, three = PrefixHash(1).place(long), PrefixHash(3).place(long)
    assert (one.reason, three.reason) == ("hash of the first 1 blocks", "hash of the first 3 blocks")
    assert one.worker_id == next(long.ring(long.links[0]))
    assert three.worker_id == next(long.ring(long.links[2]))


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=8),
    st.integers(16, 3000),
    st.sampled_from([1.0, 1.25, 2.0]),
    st.text(max_size=2),
)
def test_it_is_the_first_on_the_ring_within_the_bound(
    amounts: list[int], num_tokens: int, load_factor: float, prefix: str
) -> None:
    view = FakeView(loads(amounts), num_tokens, prefix)
    bound = load_factor * (sum(amounts) + num_tokens) / len(amounts)
    chosen = SingleRing(load_factor).place(view).worker_id
    before = list(view.ring(view.links[0]))
    before = before[: before.index(chosen)]
    assert amounts[WORKERS.index(chosen)] < bound
    assert all(amounts[WORKERS.index(worker_id)] >= bound for worker_id in before)


def test_a_stream_of_one_prefix_spills_over_and_stays_bounded() -> None:
    amounts = [0] * 8
    for num_sent in range(400):
        chosen = WORKERS.index(SingleRing(1.25).place(FakeView(loads(amounts))).worker_id)
        amounts[chosen] += 100
        assert amounts[chosen] < 1.25 * 100 * (num_sent + 1) / 8 + 100
    assert min(amounts) < 1000  # it spills no further than it must


def test_without_a_full_block_the_lightest_is_taken() -> None:
    for policy in (PrefixHash(2), SingleRing(1.25)):
        choice = policy.place(FakeView(loads([9, 3, 5]), num_tokens=5))
        assert choice.worker_id == "p-1"
        assert "5 tokens fill no hash block" in choice.reason
