"""The faster layers against transformers' own: the same logits, family by family, and in half precision closer ones."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine.fused_modules import FusedAttention, FusedMLP, FusedRMSNorm, rotate
from engine.half_weights import MAX_NARROW_ROWS, HalfEmbedding, HalfLinear, multiplies_natively
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry, build_step_inputs
from protos.types import SamplingParams
from tests.tiny_models import save_tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PROMPT = [(7 * i) % 251 for i in range(40)]
BLOCK_SIZE = 8


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    """Of the prompt's last token, [vocab_size], from our runner's forward pass."""
    layout = loaded.facts.kv_layout(loaded.dtype, BLOCK_SIZE, BLOCK_SIZE)
    cache = PagedKVCache(layout, 8)
    runner = ModelRunner(loaded, cache)
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=1)
    request = ScheduledRequest("r", array("i", PROMPT), len(PROMPT), 0, len(PROMPT), [5, 2, 7, 0, 3], params, True)
    geometry = SlotGeometry(BLOCK_SIZE, cache.slot_stride, layout.num_kv_heads)
    with torch.inference_mode():
        return runner._forward(build_step_inputs([request], geometry, torch.device("cpu")))[0]


@pytest.mark.parametrize(
    ("family", "window"), [(f, None) for f in FAMILIES] + [(f, 9) for f in FAMILIES if f != "llama"]
)
def test_fused_layers_compute_what_they_replace(family: str, window: int | None, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, family, sliding_window=window)
    fused, plain = load_model(path), load_model(path, fused=False)
    kinds = [type(module) for module in fused.model.modules()]
    assert kinds.count(FusedAttention) == kinds.count(FusedMLP) == 3
    assert kinds.count(FusedRMSNorm) == (13 if family == "qwen3" else 7)
    assert not any(isinstance(module, FusedAttention) for module in plain.model.modules())
    torch.testing.assert_close(logits_of(fused), logits_of(plain), rtol=1e-4, atol=1e-4)


def test_a_window_that_means_nothing_to_the_family_is_ignored(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    torch.testing.assert_close(
        logits_of(load_model(path)), logits_of(load_model(path, fused=False)), rtol=1e-4, atol=1e-4
    )


def test_biases_are_merged_too(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_model(tmp_path, "qwen2"))
    merged = next(m.qkv_proj for m in loaded.model.modules() if isinstance(m, FusedAttention))
    assert merged.bias.shape == merged.weight.shape[:1]
    assert merged.bias.abs().min() > 0


def test_rotation_by_a_right_angle() -> None:
    heads = torch.randn(1, 3, 2, 4)
    none, quarter = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    assert rotate(heads, quarter, none).equal(heads)
    assert rotate(heads, none, quarter).equal(torch.cat((-heads[..., 2:], heads[..., :2]), dim=-1))


@pytest.mark.parametrize("num_rows", [1, MAX_NARROW_ROWS, MAX_NARROW_ROWS + 1, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_multiply_as_wide_ones(num_rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 100, bias=bias).requires_grad_(False)
    linear.weight.data = linear.weight.data.to(dtype)
    rows = torch.randn(1, num_rows, 64)
    expected = nn.functional.linear(rows, linear.weight.float(), linear.bias)
    for buffer_rows in (100, 40):  # at once, and in pieces of which the last is shorter
        half = HalfLinear(linear, torch.empty(64 * buffer_rows))
        tolerance = 0.02 if num_rows <= MAX_NARROW_ROWS else 1e-5
        torch.testing.assert_close(half(rows), expected, rtol=tolerance, atol=tolerance)
        assert half(rows).dtype is torch.float32


def test_embedded_rows_are_wide() -> None:
    table = nn.Embedding(10, 4, dtype=torch.bfloat16).requires_grad_(False)
    ids = torch.tensor([[3, 7]])
    assert HalfEmbedding(table)(ids).equal(table.weight[[3, 7]].float().unsqueeze(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_closer_to_the_exact_logits(family: str, tmp_path: Path) -> None:
    """Weights rounded to bfloat16, everything else exact: the standard to which both forms are held."""
    path = save_tiny_model(tmp_path / "full", family)
    rounded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    exact = rounded.float().eval()
    with torch.inference_mode():
        reference = exact(torch.tensor([PROMPT])).logits[0, -1]
    errors = [
        (logits_of(load_model(path, "bfloat16", fused=fused)).float() - reference).abs().max()
        for fused in (True, False)
    ]
    assert errors[0] < 0.05 * reference.abs().max()
    if not multiplies_natively(torch.bfloat16):
        assert errors[0] < errors[1]
