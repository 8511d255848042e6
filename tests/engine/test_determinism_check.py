"""What a deterministic worker tries before it starts: it must find the sizes that are alike, and none that are not."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.determinism_check import LANES, Bits, find_fixed_shapes, leaves_no_remainder, sizes_alike
from engine.fixed_shapes import SIZES, padded, tiles_of
from engine.model_loader import LoadedModel, load_model
from engine.packed_linear import PackedLinear
from engine.scheduler_output import ScheduledRequest
from protos.types import SamplingParams
from tests.tiny_models import save_tiny_model

PARAMS = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=1)


@pytest.fixture
def llama(tmp_path: Path) -> LoadedModel:
    return load_model(save_tiny_model(tmp_path), packed=True)


# --- sizes ------------------------------------------------------------------------------------------------------------


@dataclass
class Kernels:
    """By size: what a row gets in its place, and what it gets in another one."""

    results: dict[int, tuple[float, float]]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.results)

    def bits(self, size: int) -> Bits:
        return [torch.full((size, 2), self.results[size][0])]

    def moved(self, size: int) -> Bits:
        return [torch.full((size + 1, 2), self.results[size][1])]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({1: (1.0, 1.0), 2: (1.0, 1.0), 4: (1.0, 1.0)}, (1, 2, 4)),
        ({1: (2.0, 2.0), 2: (1.0, 1.0), 4: (1.0, 1.0)}, (2, 4)),
        ({1: (1.0, 1.0), 2: (1.0, 1.5), 4: (1.0, 1.0)}, (1, 4)),
        ({1: (1.0, 1.0), 2: (1.0, 1.0), 4: (1.0, 1.5)}, (1, 2)),
        ({1: (0.0, 0.0), 2: (-0.0, -0.0)}, (2,)),
        ({1: (1.0, 1.5), 2: (1.0, 1.5)}, ()),
    ],
)
def test_the_largest_that_is_place_free_and_those_like_it(
    results: dict[int, tuple[float, float]], expected: tuple[int, ...]
) -> None:
    sizes, bits = sizes_alike(Kernels(results))
    assert sizes == expected
    assert [len(each) for each in bits] == list(expected[-1:])


class PlaceBound(nn.Module):
    """A layer in which some places round otherwise."""

    def __init__(self, inner: nn.Module, places: slice) -> None:
        super().__init__()
        self._inner, self._places = inner, places

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._inner(rows).clone()
        out[:, self._places] *= 1 + 2**-20
        return out


def replace_a_layer(loaded: LoadedModel, places: slice) -> None:
    mlp = loaded.model.model.layers[1].mlp
    assert isinstance(mlp.down_proj, PackedLinear)
    mlp.down_proj = PlaceBound(mlp.down_proj, places)


def test_sizes_with_a_place_of_their_own_are_left_out(llama: LoadedModel) -> None:
    replace_a_layer(llama, slice(37, 38))  # no size up to 32 has such a place
    assert find_fixed_shapes(llama).rows[-1] == 32


def test_where_no_size_is_place_free_it_is_refused(llama: LoadedModel) -> None:
    replace_a_layer(llama, slice(0, None, 2))
    llama.model.config.intermediate_size = LANES // 2  # so that a row alone is not tried, which has one place only
    with pytest.raises(ValueError, match=r"deterministic: .* 1 threads, float32 rows"):
        find_fixed_shapes(llama)


def test_the_digest_is_of_the_bits(llama: LoadedModel) -> None:
    first = find_fixed_shapes(llama)
    assert find_fixed_shapes(llama) == first
    llama.model.model.norm.weight.data *= 1 + 2**-20
    assert find_fixed_shapes(llama).digest != first.digest


@pytest.mark.parametrize(
    ("num_rows", "width", "num_threads", "expected"),
    [
        (1, 64, 1, True),
        (1, LANES - 8, 1, False),
        (4, LANES - 8, 1, True),
        (128, 688 + LANES // 4, 2, False),  # half for each, but rows that do not begin where a vector does
        (128, 704, 2, True),
        (128, 704, 3, False),  # 30,037.3 elements for each
        (16, 704, 3, True),  # too few to be shared
    ],
)
def test_remainders(num_rows: int, width: int, num_threads: int, expected: bool) -> None:
    assert leaves_no_remainder(num_rows, width, num_threads) == expected


# --- tiles ------------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.booleans()), max_size=8),
    max_rows=st.integers(1, 16),
)
def test_tiles_hold_every_token_once_and_in_order(lengths: list[tuple[int, int, bool]], max_rows: int) -> None:
    scheduled = [
        ScheduledRequest(str(index), array("i", range(start + count)), 1, start, count, [0], PARAMS, samples)
        for index, (start, count, samples) in enumerate(lengths)
    ]
    tiles = list(tiles_of(scheduled, max_rows))
    sums = [sum(piece.num_scheduled_tokens for piece in tile) for tile in tiles]
    assert all(total == max_rows for total in sums[:-1])
    assert all(0 < total <= max_rows for total in sums[-1:])
    for request in scheduled:
        pieces = [piece for tile in tiles for piece in tile if piece.request_id == request.request_id]
        starts = [piece.num_computed_tokens for piece in pieces]
        ends = [piece.num_computed_tokens + piece.num_scheduled_tokens for piece in pieces]
        assert starts == [request.num_computed_tokens, *ends[:-1]]
        assert ends[-1] == request.num_computed_tokens + request.num_scheduled_tokens
        assert all(piece.num_scheduled_tokens > 0 for piece in pieces)
        assert [piece.samples for piece in pieces] == [False] * (len(pieces) - 1) + [request.samples]


def test_padding_goes_to_the_next_size() -> None:
    assert [padded(size, SIZES) for size in (0, 1, 2, 3, 9, 128)] == [0, 1, 2, 4, 16, 128]
