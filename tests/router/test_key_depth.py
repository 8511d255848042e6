from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.key_depth import DepthChange, DepthTable, KeyDepthConfig, KeyDepths

CONFIG = KeyDepthConfig(window=20, hot_share=0.5, cold_share=0.25, max_blocks=6)


def chain(tokens: Sequence[int]) -> tuple[bytes, ...]:
    """Links as block_hash makes them: each stands for all blocks up to it."""
    return tuple(bytes(tokens[:end]) for end in range(1, len(tokens) + 1))


CHAINS = st.lists(st.integers(0, 2), max_size=8).map(chain)
SHARED, OTHER = (9, 9, 9), (7, 7, 7)


def observe(depths: KeyDepths, tokens: Sequence[int], times: int, num_workers: int = 8) -> list[DepthChange]:
    return [change for index in range(times) for change in depths.observe(chain((*tokens, index)), num_workers)]


def test_a_shared_prefix_gets_a_longer_key_until_requests_are_told_apart() -> None:
    depths = KeyDepths(CONFIG)
    observe(depths, SHARED, 20)
    # Three blocks are common to all; the fourth differs.
    assert depths.table.depth(chain((*SHARED, 1))) == 4
    assert depths.table.depth(chain((8, 8, 8))) == 1


def test_a_prefix_that_has_cooled_down_gets_its_short_key_back() -> None:
    depths = KeyDepths(CONFIG)
    observe(depths, SHARED, 20)
    extended = len(depths.table)
    assert extended == 3
    changes = [change for index in range(20) for change in depths.observe(chain((index, 1)), 8)]
    assert [change.link for change in changes if not change.extends] == list(reversed(chain(SHARED)))
    assert depths.table.depth(chain((*SHARED, 1))) == 1
    assert len(depths.table) == 0


def test_between_hot_and_cold_nothing_changes() -> None:
    depths = KeyDepths(CONFIG)
    observe(depths, SHARED, 20)
    for index in range(200):
        # 7 of 20: below hot, above cold.
        tokens = (*SHARED, index % 100) if index % 20 < 7 else (100 + index % 100, 1)
        changes = depths.observe(chain(tokens), 8)
        assert not [change for change in changes if change.link in chain(SHARED)]
    assert depths.table.depth(chain((*SHARED, 1))) == 4


def test_without_overrides_the_thresholds_follow_the_number_of_workers() -> None:
    config = KeyDepthConfig(window=20)
    assert config.shares(8) == (0.25, 0.125)
    for num_workers, extends in ((2, False), (4, True), (8, True)):
        depths = KeyDepths(config)
        # 12 of 20 carry it: more than 2/4, less than 2/2.
        assert bool(observe(depths, SHARED, 12, num_workers)) == extends
    # The first requests after a start are no window yet: 5 of 20 are not more than 2/8.
    assert not observe(KeyDepths(config), SHARED, 5, 8)
    assert observe(KeyDepths(config), SHARED, 6, 8)


def test_a_key_is_never_shorter_than_the_least_nor_longer_than_the_most() -> None:
    config = KeyDepthConfig(min_blocks=2, max_blocks=3, window=20, hot_share=0.5, cold_share=0.25)
    depths = KeyDepths(config)
    assert depths.table.depth(chain((1, 2, 3))) == 2
    observe(depths, (9, 9, 9, 9), 20)
    assert depths.table.depth(chain((9, 9, 9, 9))) == 3
    assert depths.table.depth(chain((9,))) == 1
    assert depths.table.depth(()) == 0


def test_the_previous_depth_is_where_the_kv_may_still_lie() -> None:
    depths = KeyDepths(CONFIG)
    longer = chain((*SHARED, 1))
    assert depths.table.previous_depth(longer) is None
    observe(depths, SHARED, 11)  # the eleventh makes it more than half of the window
    assert (depths.table.depth(longer), depths.table.previous_depth(longer)) == (2, 1)
    observe(depths, SHARED, 1)
    assert (depths.table.depth(longer), depths.table.previous_depth(longer)) == (3, 2)
    observe(depths, SHARED, 8)
    for index in range(20):
        depths.observe(chain((index, 1)), 8)
    # Shortened from the deepest on: the last change was that of the first block.
    assert (depths.table.depth(longer), depths.table.previous_depth(longer)) == (1, 2)


def test_kv_of_a_shorter_prompt_is_looked_for_where_its_shorter_key_pointed() -> None:
    depths = KeyDepths(CONFIG)
    longer = chain((*SHARED, 1, 2))
    assert depths.table.earlier_depths(longer) == []
    observe(depths, SHARED, 20)
    assert (depths.table.depth(longer), depths.table.earlier_depths(longer)) == (4, [3, 2, 1])
    for index in range(20):
        depths.observe(chain((index, 1)), 8)
    assert (depths.table.depth(longer), depths.table.earlier_depths(longer)) == (1, [2])


def test_versions_are_applied_in_order() -> None:
    table = DepthTable(CONFIG)
    with pytest.raises(ValueError, match="version 2 does not follow version 0"):
        table.apply(DepthChange(2, b"x", True))
    assert (table.version, len(table)) == (0, 0)


@given(st.lists(CHAINS, max_size=80), st.integers(1, 12), CHAINS, st.booleans())
def test_tables_with_equal_versions_agree(
    chains: list[tuple[bytes, ...]], window: int, asked: tuple[bytes, ...], has_overrides: bool
) -> None:
    shares = (0.5, 0.25) if has_overrides else (None, None)
    config = KeyDepthConfig(1, 6, window, *shares)
    depths, elsewhere = KeyDepths(config), DepthTable(config)
    for one in chains:
        for change in depths.observe(one, num_workers=4):
            elsewhere.apply(change)
    assert elsewhere.version == depths.table.version
    for one in (*chains, asked):
        assert elsewhere.depth(one) == depths.table.depth(one)
        assert elsewhere.previous_depth(one) == depths.table.previous_depth(one)


@given(st.lists(CHAINS, max_size=80), st.integers(1, 12))
def test_whatever_is_extended_was_carried_within_the_window(chains: list[tuple[bytes, ...]], window: int) -> None:
    depths = KeyDepths(KeyDepthConfig(1, 6, window, 0.5, 0.25))
    for index, one in enumerate(chains):
        depths.observe(one, num_workers=4)
        recent = chains[max(0, index + 1 - window) : index + 1]
        carried = {link for chain_ in recent for link in chain_[:6]}
        extended = {link for link in {li for c in chains for li in c} if depths.table.is_extended(link)}
        assert len(extended) == len(depths.table)
        assert extended <= carried
        # The share of a prefix is at least that of its continuations, so what is extended hangs together.
        assert all(link[:-1] in extended for link in extended if len(link) > 1)


@given(CHAINS, st.integers(1, 12))
def test_cold_prefixes_are_shortened_however_they_came_to_be(links: tuple[bytes, ...], window: int) -> None:
    depths = KeyDepths(KeyDepthConfig(1, 6, window, 0.5, 0.25))
    for _ in range(30):
        depths.observe(links, num_workers=4)
    for index in range(window):
        depths.observe(chain((100 + index,)), num_workers=4)
    assert depths.table.depth(links) == min(1, len(links))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"min_blocks": 3, "max_blocks": 2}, "max_blocks must be at least min_blocks 3, got 2"),
        ({"hot_share": 0.5}, "hot_share and cold_share go together: cold_share is not set"),
        ({"hot_share": 0.1, "cold_share": 0.2}, r"cold_share must be in \(0, hot_share 0.1\], got 0.2"),
    ],
)
def test_settings_that_could_never_work(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyDepthConfig(**fields)  # type: ignore[arg-type]
