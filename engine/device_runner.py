"""Runs steps on a CUDA device: by recorded graphs where a step is decodes alone and fits one, else launch by launch.
Same calls as ModelRunner, same tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.decode_buffers import DecodeBuffers, decode_buckets
from engine.decode_graphs import DecodedStep, DecodeGraphs, Recorder
from engine.device_steps import PagedStep, build_paged_step
from engine.logits import adjust_logits
from engine.model_loader import LoadedModel
from engine.model_runner import check_layout, logits_of, result_of, sampled_from
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import SchedulerOutput, StepResult
from engine.step_inputs import SlotGeometry

MAX_GRAPH_ROWS = 256  # larger decode steps keep a device busy without


class DeviceRunner:
    """Holds weights, KV tensors and recorded graphs, and nothing of any request."""

    def __init__(self, loaded: LoadedModel, kv_cache: PagedKVCache) -> None:
        check_layout(loaded, kv_cache.layout)
        self._geometry = SlotGeometry.of(kv_cache)
        if kv_cache.num_blocks * kv_cache.slot_stride >= 1 << 31:
            raise ValueError(f"num_blocks of {kv_cache.num_blocks} makes slots that 32 bits do not number")
        self._model = loaded.model
        self._device = kv_cache.tensor.device
        self._graphs: DecodeGraphs | None = None
        self.kv_cache = kv_cache

    @torch.inference_mode()
    def record_graphs(
        self, max_num_seqs: int, max_model_len: int, recorder: Recorder, on_progress: Callable[[str], None]
    ) -> None:
        """For decodes of up to max_num_seqs requests; before the first step."""
        max_rows = min(max_num_seqs, MAX_GRAPH_ROWS)
        buffers = DecodeBuffers(max_rows, max_model_len, self._geometry, self._device)
        self._graphs = DecodeGraphs(self._forward, buffers, decode_buckets(max_rows), recorder)
        self._graphs.record(on_progress)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute every scheduled chunk in one forward pass and sample for the requests that ask for it."""
        if not output.scheduled:
            return StepResult()
        if self._graphs is not None and (decoded := self._graphs.run(output.scheduled)) is not None:
            return self._result_of(decoded, output)
        step = build_paged_step(output.scheduled, self._geometry, self._device)
        return sampled_from(self._forward(step), [r for r in step.requests if r.samples])

    def _result_of(self, decoded: DecodedStep, output: SchedulerOutput) -> StepResult:
        requests = output.scheduled
        is_unchanged = adjust_logits(decoded.logits, requests) is decoded.logits
        tokens = decoded.plain_tokens() if is_unchanged else None
        if tokens is None:
            return sampled_from(decoded.logits, requests)
        return result_of(decoded.logits, requests, tokens)

    def _forward(self, step: PagedStep) -> torch.Tensor:
        return logits_of(self._model, self.kv_cache, step)
