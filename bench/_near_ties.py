"""Makes a checkpoint's tokens come in pairs that are all but equally likely: which of the two leads then hangs on the
last bits of the logits, so that greedy streams show every change in them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NOISE = 2.0**-22  # relative, of single weights: about what rounding does to a logit


def make_near_ties(folder: Path | str) -> None:
    """In place; the output layer must have weights of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not model.config.tie_word_embeddings
    weight = model.lm_head.weight.detach()
    half = len(weight) // 2
    noise = torch.randn(weight[:half].shape, generator=torch.Generator().manual_seed(0))
    weight[half : 2 * half] = weight[:half] * (1 + NOISE * noise)
    model.save_pretrained(folder)
