"""Slots have one owner; sums see what changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.config import TransferConfig
from kvtransfer.lane_thread import Ticket
from kvtransfer.staging import StagingRing, as_bytes, checksum_of, private_memory
from tests.kvtransfer.workers import LAYOUT, altered


@given(st.lists(st.booleans(), max_size=30))
def test_ring(takes: list[bool]) -> None:
    ring = StagingRing(LAYOUT, 3, 2, private_memory)
    taken: list[int] = []
    for take in takes:
        if take:
            slot = ring.take()
            assert (slot is None) == (len(taken) == 3)
            if slot is not None:
                assert slot not in taken
                taken.append(slot)
        elif taken:
            ring.release(taken.pop(0))
        assert ring.num_free + len(taken) == 3


def test_slots_do_not_overlap() -> None:
    ring = StagingRing(LAYOUT, 3, 2, private_memory)
    for fill in range(3):
        ring.blocks(fill, 2).fill_(fill)
    for fill in range(3):
        assert ring.blocks(fill, 2).eq(fill).all()
        assert as_bytes(ring.blocks(fill, 1)).numel() == LAYOUT.block_nbytes


@pytest.mark.parametrize("name", ["xxh3_64", "sum64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(position=st.integers(0, 2**20), flip=st.integers(1, 255))
def test_any_changed_byte_changes_the_sum(name: str, dtype: str, position: int, flip: int) -> None:
    layout = altered(LAYOUT, dtype=dtype, itemsize=2 if dtype == "bfloat16" else 4)
    ring = StagingRing(layout, 1, 2, private_memory)
    data = as_bytes(ring.blocks(0, 2).fill_(1.5))
    checksum = checksum_of(name)  # type: ignore[arg-type]
    before = checksum(data)
    assert 0 <= before < 2**64
    data[position % data.numel()] ^= flip
    assert checksum(data) != before


def test_a_ticket_is_either_begun_or_cancelled() -> None:
    begun, cancelled = Ticket(), Ticket()
    assert begun.begin()
    assert not begun.cancel()
    assert cancelled.cancel()
    assert not cancelled.begin()


@pytest.mark.parametrize(
    "wrong",
    [
        {"checksum": "crc"},
        {"transport": "carrier pigeon"},
        {"chunk_nbytes": 0},
        {"chunk_timeout_s": 0.0},
        {"failpoint": "x"},
    ],
)
def test_config_names_what_is_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransferConfig(**wrong)  # type: ignore[arg-type]


def test_a_block_longer_than_a_chunk_is_a_chunk_of_its_own() -> None:
    assert TransferConfig(chunk_nbytes=4096).num_chunk_blocks(1024) == 4
    assert TransferConfig(chunk_nbytes=4096).num_chunk_blocks(5000) == 1


def test_ring_checks_its_layout() -> None:
    with pytest.raises(AssertionError):
        StagingRing(altered(LAYOUT, itemsize=2), 1, 1, private_memory)
    assert StagingRing(LAYOUT, 1, 1, private_memory).blocks(0, 1).dtype is torch.float32
