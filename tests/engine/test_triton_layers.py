"""Kernels that stand in for several passes, under Triton's interpreter: the same numbers as those passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from engine import triton_layers
from engine.device_runner import DeviceRunner
from engine.fused_modules import FusedAttention, FusedDecoderLayer, FusedMLP, add_product, rotate
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from protos.types import KVLayout
from tests.engine.test_device_runner import GREEDY, WARM, generate, poisoned_cache
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotated_queries_come_back_and_keys_and_values_are_written(head_dim: int, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    cache = PagedKVCache(KVLayout("f", name, 2, 2, head_dim, 16, 16, itemsize=dtype.itemsize), 4)
    cache.tensor.fill_(torch.nan)
    expected = PagedKVCache(cache.layout, 4)
    expected.tensor.fill_(torch.nan)
    torch.manual_seed(0)
    heads = torch.randn(1, 5, 8, head_dim).to(dtype)  # four queries, two keys, two values
    angles = torch.randn(1, 5, head_dim // 2).repeat(1, 1, 2)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.tensor([3, -1, 130, 64, 65], dtype=torch.int32)
    queries = triton_layers.rotate_and_write(heads[0, :, :6], heads[0, :, 6:], cosines[0], sines[0], cache, 1, slots)
    rotated = rotate(heads[:, :, :6].float(), cosines.float(), sines.float())[0].to(dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-3
    torch.testing.assert_close(queries, rotated[:, :4], rtol=tolerance, atol=tolerance)
    kept = [0, 2, 3, 4]
    expected.write(1, rotated[kept, 4:], heads[0, kept, 6:], slots[kept].long())
    torch.testing.assert_close(cache.tensor, expected.tensor, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("size", [7, 1024, 1500])
def test_gated_activation(size: int) -> None:
    gate_up = torch.randn(1, 3, 2 * size)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(triton_layers.gated_silu(gate_up), functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_added_in_place(bias: bool) -> None:
    linear = torch.nn.Linear(5, 7, bias=bias).requires_grad_(False)
    rows, inputs = torch.randn(3, 7), torch.randn(3, 5)
    expected = rows + linear(inputs)
    add_product(rows, inputs, linear)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_gives_the_same_tokens_with_them(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_model(tmp_path, family, num_hidden_layers=1)
    plain, with_kernels = load_model(path), load_model(path, fused_kernels=True)
    kinds = [m.kernels for m in with_kernels.model.modules() if isinstance(m, FusedAttention | FusedMLP)]
    assert kinds == [True, True]
    assert sum(isinstance(m, FusedDecoderLayer) for m in with_kernels.model.modules()) == 1
    calls: list[str] = []
    for name in ("rotate_and_write", "gated_silu"):
        kernel = getattr(triton_layers, name)
        monkeypatch.setattr(triton_layers, name, lambda *a, kernel=kernel, name=name: calls.append(name) or kernel(*a))
    params = [GREEDY, WARM, GREEDY]
    expected = generate(ModelRunner(plain, poisoned_cache(plain)), params)
    assert not calls
    assert generate(DeviceRunner(with_kernels, poisoned_cache(with_kernels)), params) == expected
    assert set(calls) == {"rotate_and_write", "gated_silu"}
