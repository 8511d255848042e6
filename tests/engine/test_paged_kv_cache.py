"""The KV pool: slots address what the layout says, blocks move whole and alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.paged_kv_cache import PagedKVCache, num_blocks_for
from protos.types import KVLayout

LAYOUT = KVLayout("f", "float32", num_layers=3, num_kv_heads=2, head_dim=4, block_size=8, hash_block_size=8)
NUM_BLOCKS = 6


def numbered_cache(layout: KVLayout = LAYOUT) -> PagedKVCache:
    """Every element is another number (as far as the dtype can tell)."""
    cache = PagedKVCache(layout, NUM_BLOCKS)
    cache.tensor.copy_(torch.arange(cache.tensor.numel()).view(cache.tensor.shape))
    return cache


@settings(max_examples=40)
@given(
    layer=st.integers(0, LAYOUT.num_layers - 1),
    tokens=st.lists(st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(0, 7)), min_size=1, unique=True),
)
def test_slots_address_block_layer_and_offset(layer: int, tokens: list[tuple[int, int]]) -> None:
    cache = numbered_cache()
    untouched = cache.tensor.clone()
    slots = torch.tensor([block * cache.slot_stride + offset for block, offset in tokens])
    keys, values = torch.randn(2, len(tokens), LAYOUT.num_kv_heads, LAYOUT.head_dim)
    cache.write(layer, keys, values, slots)
    for row, (block, offset) in enumerate(tokens):
        assert cache.tensor[block, layer, 0, offset].equal(keys[row])
        assert cache.tensor[block, layer, 1, offset].equal(values[row])
        untouched[block, layer, :, offset] = cache.tensor[block, layer, :, offset]
    assert cache.tensor.equal(untouched)
    rows = (slots * LAYOUT.num_kv_heads + torch.arange(LAYOUT.num_kv_heads)[:, None]).flatten()  # by head first
    read_keys, read_values = cache.read(layer, rows)
    assert read_keys.equal(keys.transpose(0, 1).reshape(-1, LAYOUT.head_dim))
    assert read_values.equal(values.transpose(0, 1).reshape(-1, LAYOUT.head_dim))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gather_then_scatter_moves_exactly_the_named_blocks(dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype, itemsize=4 if dtype == "float32" else 2)
    source, destination = numbered_cache(layout), PagedKVCache(layout, NUM_BLOCKS)
    staging = torch.empty(3, source.block_numel, dtype=source.tensor.dtype)
    source.gather([4, 0, 3], staging)
    assert staging.equal(source.tensor.view(NUM_BLOCKS, -1)[[4, 0, 3]])
    destination.scatter([1, 5, 2], staging)
    assert destination.tensor[[1, 5, 2]].equal(source.tensor[[4, 0, 3]])
    assert not destination.tensor[[0, 3, 4]].any()


def test_staging_may_be_a_view_of_bytes() -> None:
    """A transport's ring is bytes; the first rows of it are contiguous."""
    cache = numbered_cache()
    ring = torch.empty(5, LAYOUT.block_nbytes, dtype=torch.uint8)
    cache.gather([2, 1], ring[:2])
    assert ring[:2].view(torch.float32).equal(cache.tensor.view(NUM_BLOCKS, -1)[[2, 1]])


def test_a_staging_tensor_of_the_wrong_size_is_refused() -> None:
    cache = numbered_cache()
    with pytest.raises((RuntimeError, IndexError)):
        cache.scatter([0, 1], torch.empty(3, cache.block_numel))


def test_transport_threads_move_blocks_while_inference_runs_on_others() -> None:
    cache = numbered_cache()
    expected = cache.tensor[:3].clone()
    errors: list[Exception] = []

    def shuttle() -> None:
        staging = torch.empty(3, cache.block_numel)
        try:
            for _ in range(50):
                cache.gather([0, 1, 2], staging)
                cache.scatter([0, 1, 2], staging)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=shuttle)
    thread.start()
    with torch.inference_mode():
        slots = torch.arange(4) + 4 * cache.slot_stride
        ones = torch.ones(4, LAYOUT.num_kv_heads, LAYOUT.head_dim)
        for _ in range(50):
            cache.write(1, ones, ones, slots)
    thread.join(20.0)
    assert not errors
    assert cache.tensor[:3].equal(expected)
    assert bool((cache.tensor[4, 1, :, :4] == 1).all())


def test_num_blocks_for() -> None:
    assert num_blocks_for(10 * LAYOUT.block_nbytes + 5, LAYOUT) == 10
    with pytest.raises(ValueError, match=str(LAYOUT.block_nbytes)):
        num_blocks_for(LAYOUT.block_nbytes - 1, LAYOUT)


def test_unusable_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        PagedKVCache(LAYOUT, 0)
    with pytest.raises(ValueError, match="int8"):
        PagedKVCache(replace(LAYOUT, dtype="int8"), 1)
