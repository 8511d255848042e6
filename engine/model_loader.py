"""Brings a checkpoint's weights into memory: safetensors only, none of its code, nothing from the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from engine.attention import ATTENTION_NAME
from engine.fused_modules import fuse
from engine.half_weights import keep_half_weights, multiplies_natively
from engine.model_facts import ModelFacts, ModelLoadError, read_model_facts
from engine.packed_linear import pack_linears
from engine.paged_kv_cache import torch_dtype

__all__ = ["LoadedModel", "ModelFacts", "ModelLoadError", "load_model", "read_model_facts"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A transformers module whose layers attend through engine/attention.py, in eval mode."""

    model: PreTrainedModel
    facts: ModelFacts
    dtype: str  # of weights and KV cache
    device: torch.device


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    fused: bool = True,
    fused_kernels: bool = False,
    packed: bool = False,
) -> LoadedModel:
    """The model in folder `path`; ModelLoadError where it is missing, broken or not served.

    fused: with the faster layers of fused_modules.py and half_weights.py, else with those of transformers alone;
    fused_kernels: and with those of triton_layers.py; packed: with those of packed_linear.py, on the CPU."""
    weights_dtype = torch_dtype(dtype)
    facts = read_model_facts(path)
    # A worker's stderr is a log.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # Typed as if it returned the model alone.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            facts.path,
            dtype=weights_dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not ignored: refused below, by name
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(facts.path, f"its weights do not fit its config: {error}") from error
    model, report = loaded
    # transformers would fill what is missing with random numbers and say so in a log line.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ModelLoadError(facts.path, f"weights with {problem}: {sorted(report[problem], key=str)[:3]}")
    if fused:
        fuse(model, fused_kernels)
        if torch.device(device).type == "cpu" and not multiplies_natively(weights_dtype):
            keep_half_weights(model)
    if packed:
        pack_linears(model)
    return LoadedModel(model.eval().to(device), facts, dtype, torch.device(device))
