"""Runs one step: scheduled chunks in, sampled tokens out. What to run, and in which blocks, is the scheduler's word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from engine.attention import KVMeta
from engine.device_steps import PagedStep
from engine.logits import adjust_logits, logprobs_of
from engine.model_loader import LoadedModel
from engine.paged_kv_cache import PagedKVCache
from engine.sampler import sample
from engine.scheduler_output import ScheduledRequest, SchedulerOutput, StepResult
from engine.step_inputs import SlotGeometry, StepInputs, build_step_inputs
from protos.types import KVLayout


class ModelRunner:
    """Holds weights and KV tensors, and nothing of any request: whatever a step needs comes with the step."""

    def __init__(self, loaded: LoadedModel, kv_cache: PagedKVCache) -> None:
        check_layout(loaded, kv_cache.layout)
        self._model = loaded.model
        self._geometry = SlotGeometry.of(kv_cache)
        self.kv_cache = kv_cache

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute every scheduled chunk in one forward pass and sample for the requests that ask for it."""
        if not output.scheduled:
            return StepResult()
        step = build_step_inputs(output.scheduled, self._geometry, self.kv_cache.tensor.device)
        logits = self._forward(step)
        return sampled_from(logits, [r for r in step.requests if r.samples])

    def _forward(self, step: StepInputs) -> torch.Tensor:
        """Logits of the sampled rows, [num_sampled, vocab_size]; keys and values of all rows go to the cache."""
        return logits_of(self._model, self.kv_cache, step)


def check_layout(loaded: LoadedModel, layout: KVLayout, numerics: str = "") -> None:
    """ValueError where a KV cache of that layout is not this model's."""
    expected = loaded.facts.kv_layout(loaded.dtype, layout.block_size, layout.hash_block_size, numerics)
    if layout != expected:
        raise ValueError(f"KV cache of {layout} does not fit the model, which needs {expected}")


def logits_of(model: PreTrainedModel, kv_cache: PagedKVCache, step: StepInputs | PagedStep) -> torch.Tensor:
    """One forward pass: of the sampled rows, [num_sampled, vocab_size]."""
    logits: torch.Tensor = model(
        input_ids=step.input_ids,
        position_ids=step.position_ids,
        use_cache=False,
        logits_to_keep=step.sampled_rows,
        kv_meta=KVMeta(kv_cache, step),
    ).logits
    return logits[0]


def sampled_from(logits: torch.Tensor, requests: Sequence[ScheduledRequest]) -> StepResult:
    """logits: [num_requests, vocab_size], of the last row of each. When it returns, the step is over on its device too:
    its blocks may be read by whoever sends them."""
    if not requests:
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()
        return StepResult()
    params, positions = [r.sampling_params for r in requests], [sampled_position(r) for r in requests]
    return result_of(logits, requests, sample(adjust_logits(logits, requests), params, positions))


def sampled_position(request: ScheduledRequest) -> int:
    return request.num_computed_tokens + request.num_scheduled_tokens


def result_of(logits: torch.Tensor, requests: Sequence[ScheduledRequest], tokens: Sequence[int]) -> StepResult:
    sampled: dict[str, tuple[int, ...]] = {r.request_id: (token,) for r, token in zip(requests, tokens, strict=True)}
    return StepResult(sampled, logprobs_of(logits, requests, tokens))
