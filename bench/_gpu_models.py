"""Models with random weights, made on the card: a small one whose best token leads by a wide margin, and one of the
shape of Llama 3 8B. No files."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench._gpu_card import Card
from engine.attention import ATTENTION_NAME
from engine.fused_modules import fuse
from engine.model_facts import ModelFacts
from engine.model_loader import LoadedModel
from engine.scheduler_output import ScheduledRequest
from protos.types import SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=1 << 20)


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_model_len: int = 32768 + 64

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.max_model_len,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )

    def facts(self, dtype: str) -> ModelFacts:
        return ModelFacts(
            path=Path("random"),
            fingerprint="random",
            architecture="LlamaForCausalLM",
            dtype=dtype,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=(),
            num_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sliding_window=None,
        )


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256)
SMALL = Shape(256, 512, 4, 8, 2, 512, 4096)


def plain_model(shape: Shape, dtype: str, device: torch.device, attention: str, seed: int = 0) -> PreTrainedModel:
    """As transformers makes it, weights drawn on the device."""
    torch.manual_seed(seed)
    make: Any = LlamaForCausalLM._from_config  # untyped
    with torch.device(device):
        model: Any = make(shape.config(), attn_implementation=attention, dtype=DTYPES[dtype])
    made: PreTrainedModel = model.eval().requires_grad_(False)
    return made


def loaded_model(shape: Shape, dtype: str, card: Card, layer_kernels: bool = False) -> LoadedModel:
    model = plain_model(shape, dtype, card.device, ATTENTION_NAME)
    fuse(model, layer_kernels)
    return LoadedModel(model, shape.facts(dtype), dtype, card.device)


def golden_pair(card: Card, dtype: str, layer_kernels: bool = False) -> tuple[LoadedModel, PreTrainedModel]:
    """The small model on the card, and the same weights as transformers runs them, in float32 on the CPU."""
    reference = plain_model(SMALL, "float32", torch.device("cpu"), "eager")
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if weight.dim() == 2:  # wide margins: the greedy token then does not hang on how sums are ordered
                gain = {"lm_head": 4.0, "embed": weight.shape[1] ** 0.5}
                factor = next((value for part, value in gain.items() if part in name), 1.5)
                weight.normal_(0.0, factor / weight.shape[1] ** 0.5)
            weight.copy_(weight.to(DTYPES[dtype]))  # both compute with the same numbers
    ours: Any = plain_model(SMALL, dtype, torch.device("cpu"), ATTENTION_NAME)
    ours.load_state_dict(reference.state_dict())
    fuse(ours, layer_kernels)
    return LoadedModel(ours.to(card.device), SMALL.facts(dtype), dtype, card.device), reference


def decode_of(request_id: str, tokens: array[int], block_table: list[int], params: SamplingParams) -> ScheduledRequest:
    """The step that computes the last of tokens, and samples the next."""
    return ScheduledRequest(request_id, tokens, 1, len(tokens) - 1, 1, block_table, params, True)


def chunk_of(
    tokens: array[int], start: int, end: int, block_table: list[int], params: SamplingParams = GREEDY
) -> ScheduledRequest:
    last = end == len(tokens)
    return ScheduledRequest("r", tokens, len(tokens), start, end - start, block_table, params, last)
