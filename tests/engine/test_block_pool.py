from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool


def test_allocates_until_empty_and_then_changes_nothing() -> None:
    pool = BlockPool(3)
    assert sorted(pool.allocate(2) or []) != []
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == []


def test_num_blocks_must_be_positive() -> None:
    with pytest.raises(ValueError, match="got 0"):
        BlockPool(0)


def test_a_named_block_stays_cached_and_can_be_acquired_again() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1) or []
    pool.name(block, b"a")
    pool.release([block])
    assert (pool.num_free, pool.num_available) == (1, 2)
    assert pool.find(b"a") == block
    pool.acquire([block])
    assert pool.num_available == 1


def test_the_tail_of_a_chain_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3) or []
    for block, name in zip(blocks, (b"0", b"1", b"2"), strict=True):
        pool.name(block, name)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert (pool.find(b"0"), pool.find(b"1"), pool.find(b"2")) == (blocks[0], blocks[1], None)


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.name(first, b"first")
    pool.name(second, b"second")
    pool.release([first])
    pool.release([second])
    pool.acquire([first])
    pool.release([first])
    assert pool.allocate(1) == [second]


def test_of_two_blocks_with_one_hash_the_first_stays_the_one() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.name(first, b"same")
    pool.name(second, b"same")
    assert pool.find(b"same") == first
    pool.release([second])
    assert second in pool.free  # without a hash of its own there is nothing to keep


class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain list of uses."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.uses: list[list[int]] = []
        self.num_names = 0

    @rule(num_blocks=st.integers(0, 7))
    def allocate(self, num_blocks: int) -> None:
        available = self.pool.num_available
        taken = self.pool.allocate(num_blocks)
        assert (taken is None) == (num_blocks > available)
        if taken is None:
            assert self.pool.num_available == available
        else:
            assert not set(taken) & {block for use in self.uses for block in use}
            self.uses.append(taken)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        use = data.draw(st.sampled_from(self.uses))
        for block in use:
            if not any(self.pool.find(name.to_bytes(2)) == block for name in range(self.num_names)):
                self.pool.name(block, self.num_names.to_bytes(2))
                self.num_names += 1

    @precondition(lambda self: self.num_names)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        block = self.pool.find(data.draw(st.integers(0, self.num_names - 1)).to_bytes(2))
        if block is not None:
            self.pool.acquire([block])
            self.uses.append([block])

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1))))

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        used = [block for use in self.uses for block in use]
        assert self.pool.ref_cnt == [used.count(block) for block in range(6)]
        assert sorted([*self.pool.free, *self.pool.cached, *set(used)]) == list(range(6))


TestPoolMachine = PoolMachine.TestCase
