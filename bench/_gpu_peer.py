"""What transformers does with the same shape on the same card: `generate` over a padded batch, and its own continuous
batching. Random weights, random prompts of one length."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from bench._gpu_card import Card
from bench._gpu_models import Shape

NUM_NEW = 33  # the first of them is the prompt's; the rest are decode steps


def random_prompts(shape: Shape, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, shape.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


def generate_rate(card: Card, model: PreTrainedModel, shape: Shape, batch: int, length: int, runs: int) -> float:
    """Tokens per second of the decode steps alone: a run of NUM_NEW tokens less a run of one."""
    peer: Any = model
    prompts = random_prompts(shape, batch, length).to(card.device)
    mask = torch.ones_like(prompts)

    def run(num_new: int) -> None:
        with torch.inference_mode():
            peer.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=num_new, pad_token_id=0)

    step_s = (card.median_s(lambda: run(NUM_NEW), runs, 1) - card.median_s(lambda: run(1), runs, 1)) / (NUM_NEW - 1)
    return batch / step_s


def continuous_rate(card: Card, model: PreTrainedModel, shape: Shape, batch: int, length: int, runs: int) -> float:
    """Likewise. Fails where this version of transformers has no generate_batch of this form."""
    peer: Any = model
    prompts: list[list[int]] = random_prompts(shape, batch, length).tolist()

    def settings(num_new: int) -> Any:
        make: Any = GenerationConfig  # untyped
        return make(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(num_new: int) -> None:
        peer.generate_batch(prompts, generation_config=settings(num_new))

    step_s = (card.median_s(lambda: run(NUM_NEW), runs, 1) - card.median_s(lambda: run(1), runs, 1)) / (NUM_NEW - 1)
    return batch / step_s
