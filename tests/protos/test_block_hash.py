"""The chain names a prefix: same tokens, same links; anything else, others."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from protos.block_hash import chain_hashes, chain_root, fold_links

KEY = b"k" * 32
ROOT = chain_root(KEY, "model")
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40).map(lambda ids: array("i", ids))


@given(tokens, st.integers(1, 8))
def test_only_full_blocks_have_a_link(ids: array[int], block_size: int) -> None:
    assert len(chain_hashes(ids, block_size, ROOT, KEY)) == len(ids) // block_size


@given(tokens, st.integers(0, 10))
def test_known_links_change_nothing(ids: array[int], num_known: int) -> None:
    links = chain_hashes(ids, 4, ROOT, KEY)
    assert chain_hashes(ids, 4, ROOT, KEY, known=links[:num_known]) == links


@given(tokens, st.data())
def test_a_changed_token_changes_every_link_from_there(ids: array[int], data: st.DataObject) -> None:
    if len(ids) < 4:
        return
    at = data.draw(st.integers(0, len(ids) // 4 * 4 - 1))
    changed = ids[:]
    changed[at] ^= 1
    before, after = chain_hashes(ids, 4, ROOT, KEY), chain_hashes(changed, 4, ROOT, KEY)
    assert before[: at // 4] == after[: at // 4]
    assert all(a != b for a, b in zip(before[at // 4 :], after[at // 4 :], strict=True))


def test_root_separates_model_tenant_adapter_and_key() -> None:
    roots = {
        chain_root(KEY, "model"),
        chain_root(KEY, "model2"),
        chain_root(KEY, "model", b"tenant"),
        chain_root(KEY, "model", b"", "tenant"),
        chain_root(b"other", "model"),
    }
    assert len(roots) == 5


def test_larger_blocks_fold_the_same_chain() -> None:
    links = chain_hashes(array("i", range(40)), 4, ROOT, KEY)
    assert fold_links(links, 2) == links[1::2]
    assert fold_links(links, 1) == links
