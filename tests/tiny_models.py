"""Tiny random checkpoints of every family we serve, for tests that need a real model and a real tokenizer.

Weights are scaled up so that the best logit leads by a wide margin: greedy tokens then agree between batch shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")  # these also run through whole servers
ALL_FAMILIES = (*FAMILIES, "gemma", "gemma2", "gemma3", "phi", "phi3")
WINDOWED_FAMILIES = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
VOCAB_SIZE = 300
BOS_TOKEN_ID, EOS_TOKEN_ID = 256, 257
_SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|eos|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    sliding_window: int | None = None,
    max_model_len: int = 2048,
    **overrides: Any,
) -> Path:
    """Write a checkpoint and its byte-level tokenizer to folder; the same arguments give the same bytes. `overrides`
    are of the model's config."""
    model = _build(family, sliding_window, max_model_len, overrides)
    # Where the embeddings are the output layer too, large ones would make every token predict itself.
    embedding_std = 0.02 if model.config.tie_word_embeddings else 1.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                gain = 4.0 if "lm_head" in name else 1.5
                std = embedding_std if "embed" in name else gain / weight.shape[1] ** 0.5
                weight.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1 if family == "phi" else 0.5, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer(max_model_len).save_pretrained(folder)
    return folder


def _build(family: str, sliding_window: int | None, max_model_len: int, overrides: dict[str, Any]) -> PreTrainedModel:
    assert sliding_window is None or family in WINDOWED_FAMILIES, f"{family} has no sliding window"
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_model_len,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
        "dtype": "float32",
    } | overrides
    gemma = {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 20} | overrides
    far = {"sliding_window": sliding_window or max_model_len}  # their layer types ask for a window
    window = {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**sizes, sliding_window=sliding_window))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**sizes, **(window if sliding_window else {})))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32, **(window if sliding_window else {})))
        case "gemma":
            return GemmaForCausalLM(GemmaConfig(**sizes | {"head_dim": 32, "tie_word_embeddings": True} | overrides))
        case "gemma2":
            return Gemma2ForCausalLM(Gemma2Config(**sizes | gemma | far | {"attn_logit_softcapping": 5.0} | overrides))
        case "gemma3":
            layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
            return Gemma3ForCausalLM(Gemma3TextConfig(**sizes | gemma | far | layers | overrides))
        case "phi":
            return PhiForCausalLM(PhiConfig(**sizes))
        case "phi3":
            return Phi3ForCausalLM(Phi3Config(**sizes, sliding_window=sliding_window))
        case _:
            raise ValueError(f"unknown family {family!r}")


def greedy_reference(path: Path, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
    """What transformers itself generates greedily, one prompt at a time, not stopping at end-of-sequence tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new_tokens)
        outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


def tiny_tokenizer(max_model_len: int = 2048) -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255), then the special tokens from BOS_TOKEN_ID on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_model_len,
    )
