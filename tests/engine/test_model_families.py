"""Every served family against transformers: scheduler, paged cache and model together give the tokens of generate()."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.attention import KVMeta
from engine.config import SchedulerConfig
from engine.local_engine import LocalEngine
from engine.model_facts import ModelLoadError, read_model_facts
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry, build_step_inputs
from engine.worker_core import WorkerCore
from protos.types import GenerateRequest, SamplingParams
from tests.tiny_models import ALL_FAMILIES, FAMILIES, WINDOWED_FAMILIES, greedy_reference, save_tiny_model

BLOCK_SIZE = 8
NUM_BLOCKS = 64
NUM_NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS)
WINDOW = 9  # shorter than all prompts but one
NEW_FAMILIES = [family for family in ALL_FAMILIES if family not in FAMILIES]  # the others: test_model_runner.py
WINDOWED = [family for family in NEW_FAMILIES if family in WINDOWED_FAMILIES]


def make_prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(length)] for length in (5, 16, 23, 61)]


def served_tokens(path: Path, prompts: list[list[int]], budget: int) -> list[list[int]]:
    """Through scheduler and runner, all at once; `budget` tokens a step cut the prompts into chunks."""
    loaded = load_model(path)
    config = SchedulerConfig(
        max_model_len=256,
        max_num_batched_tokens=budget,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    cache = PagedKVCache(loaded.facts.kv_layout("float32", BLOCK_SIZE, BLOCK_SIZE), NUM_BLOCKS)
    cache.tensor.fill_(torch.nan)  # what is read before it was written ruins the output
    core = WorkerCore(config, NUM_BLOCKS, hash_key=bytes(32), model_fingerprint=loaded.facts.fingerprint)
    requests = [
        GenerateRequest(f"r{i}", f"c{i}", 1, array("i", prompt), len(prompt), GREEDY)
        for i, prompt in enumerate(prompts)
    ]
    return list(LocalEngine(core, ModelRunner(loaded, cache)).generate(requests).values())


def assert_golden(path: Path) -> list[list[int]]:
    expected = greedy_reference(path, make_prompts(), NUM_NEW_TOKENS)
    for budget in (16, 512):
        assert served_tokens(path, make_prompts(), budget) == expected, f"budget {budget}"
    return expected


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_tokens_equal_generate(tmp_path: Path, family: str) -> None:
    expected = assert_golden(save_tiny_model(tmp_path, family, seed=3))
    assert len(set().union(*expected)) > 20, "a model that repeats itself would prove nothing"


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_shorter_than_the_prompt(tmp_path: Path, family: str) -> None:
    path = save_tiny_model(tmp_path / "windowed", family, seed=3, sliding_window=WINDOW)
    full = save_tiny_model(tmp_path / "full", family, seed=3)
    assert read_model_facts(path).sliding_window == WINDOW
    assert assert_golden(path) != greedy_reference(full, make_prompts(), NUM_NEW_TOKENS)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": 0.5}),
        ("gemma2", {"query_pre_attn_scalar": 200}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
        ("gemma3", {"layer_types": ["full_attention"] * 3}),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("phi", {"qk_layernorm": True}),
        ("phi", {"partial_rotary_factor": 1.0}),
    ],
    ids=str,
)
def test_what_the_config_says_counts(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    window = WINDOW if family in WINDOWED_FAMILIES else None
    other = save_tiny_model(tmp_path / "other", family, seed=3, sliding_window=window, **overrides)
    usual = save_tiny_model(tmp_path / "usual", family, seed=3, sliding_window=window)
    assert assert_golden(other) != greedy_reference(usual, make_prompts(), NUM_NEW_TOKENS)


@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_grouped_query_head_counts(tmp_path: Path, family: str, num_kv_heads: int) -> None:
    """From one KV head per query head to one for all; gemma2 goes the way of soft-capped scores."""
    path = save_tiny_model(tmp_path, family, seed=3, num_attention_heads=8, num_key_value_heads=num_kv_heads)
    assert read_model_facts(path).num_kv_heads == num_kv_heads
    assert_golden(path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("both_saved", [False, True])
def test_tied_embeddings(tmp_path: Path, family: str, both_saved: bool) -> None:
    """Some checkpoints hold the output layer a second time."""
    path = save_tiny_model(tmp_path, family, seed=3, tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in weights
    if both_saved:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert_golden(path)


def logits_of_one_chunk(path: Path, prompt: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size], in bfloat16 through the paged cache."""
    loaded = load_model(path, dtype="bfloat16")
    cache = PagedKVCache(loaded.facts.kv_layout("bfloat16", BLOCK_SIZE, BLOCK_SIZE), NUM_BLOCKS)
    cache.tensor.fill_(torch.nan)
    blocks = list(range(-(-len(prompt) // BLOCK_SIZE)))
    chunk = ScheduledRequest("r", array("i", prompt), len(prompt), 0, len(prompt), blocks, GREEDY, True)
    geometry = SlotGeometry(BLOCK_SIZE, cache.slot_stride, cache.layout.num_kv_heads)
    step = build_step_inputs([chunk], geometry, cache.tensor.device)
    with torch.inference_mode():
        output = loaded.model(
            input_ids=step.input_ids, position_ids=step.position_ids, use_cache=False, kv_meta=KVMeta(cache, step)
        )
    return output.logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_bfloat16_is_as_close_to_transformers_as_bfloat16_is_to_float32(tmp_path: Path, family: str) -> None:
    path = save_tiny_model(tmp_path, family, seed=3, sliding_window=WINDOW if family in WINDOWED_FAMILIES else None)
    prompt = make_prompts()[-1]

    def reference(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0].float()  # type: ignore[no-any-return]

    exact, rounded = reference(torch.float32), reference(torch.bfloat16)
    ours = logits_of_one_chunk(path, prompt)
    allowed = 2 * (rounded - exact).square().mean().sqrt()
    assert (ours - exact).square().mean().sqrt() < allowed < exact.std() / 4


def test_rope_types_are_looked_for_in_every_type_of_layer(tmp_path: Path) -> None:
    local, dynamic = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "dynamic", "factor": 2.0}
    path = save_tiny_model(tmp_path, "gemma3")
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"sliding_attention": local, "full_attention": {**dynamic, "rope_theta": 1e6}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="rope type 'dynamic'"):
        read_model_facts(path)


@pytest.mark.parametrize("name", ["longrope", "su"])
def test_phi3_of_long_context_is_refused(tmp_path: Path, name: str) -> None:
    """Its rotation depends on the length of the whole batch; "su" is what older checkpoints call it."""
    path = save_tiny_model(tmp_path, "phi3")
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config["rope_scaling"] = {"type": name, "original_max_position_embeddings": 1024, **factors}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="rope type 'longrope'"):
        read_model_facts(path)
