from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.prefix_index import PrefixIndex


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(length)]


def test_finds_the_longest_common_prefix() -> None:
    index = PrefixIndex(100)
    index.note(chain("a", 5))
    fork = [*chain("a", 3), *chain("b", 4)]
    assert index.num_matching(fork) == 3
    assert index.num_matching(chain("a", 9)) == 5
    assert index.num_matching(chain("b", 4)) == 0
    assert index.num_matching([]) == 0


def test_the_least_recently_used_chain_goes_first_and_loses_its_tail_first() -> None:
    index = PrefixIndex(6)
    index.note(chain("a", 3))
    index.note(chain("b", 3))
    index.note(chain("a", 3))
    index.note(chain("c", 2))
    assert index.num_matching(chain("a", 3)) == 3
    assert index.num_matching(chain("b", 3)) == 1


def test_a_smaller_pool_forgets_at_once() -> None:
    index = PrefixIndex(10)
    index.note(chain("a", 10))
    index.resize(4)
    assert index.num_matching(chain("a", 10)) == 4
    assert len(index) == 4


# Chains from a tree: each path of branch choices names its links, so prefixes are shared.
paths = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def links(path: list[int]) -> list[bytes]:
    return [repr(path[: depth + 1]).encode() for depth in range(len(path))]


@given(st.integers(1, 12), st.lists(paths, max_size=30), paths)
def test_is_bounded_and_bisection_equals_a_walk(max_links: int, noted: list[list[int]], asked: list[int]) -> None:
    index = PrefixIndex(max_links)
    for path in noted:
        index.note(links(path))
    assert len(index) <= max_links
    held = index._links
    walked = next((depth for depth, link in enumerate(links(asked)) if link not in held), len(asked))
    assert index.num_matching(links(asked)) == walked
    assert not any(link in held for link in links(asked)[walked:])  # no link without the ones before it
    if noted:
        assert index.num_matching(links(noted[-1])) == min(max_links, len(noted[-1]))
