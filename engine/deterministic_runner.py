"""Runs one step as engine/model_runner.py does, and gives a request the same bits whatever runs beside it, wherever its
chunks end, and whoever computed what it reads."""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.attention import KVMeta
from engine.fixed_shapes import SPLIT, FixedShapes, padded, tiles_of
from engine.model_loader import LoadedModel
from engine.model_runner import check_layout, sampled_from
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import SchedulerOutput, StepResult
from engine.step_inputs import SlotGeometry, StepInputs, build_step_inputs


class DeterministicRunner:
    """Invariant: every product has one of the sizes in `shapes`, and what a row reads was written the same way."""

    def __init__(self, loaded: LoadedModel, kv_cache: PagedKVCache, shapes: FixedShapes) -> None:
        check_layout(loaded, kv_cache.layout, shapes.digest)
        self._model = loaded.model
        self._geometry = SlotGeometry.of(kv_cache)
        self._shapes = shapes
        self.kv_cache = kv_cache

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Tile by tile; the rows of a tile are sampled one by one."""
        result = StepResult()
        for tile in tiles_of(output.scheduled, self._shapes.max_rows):
            step = build_step_inputs(tile, self._geometry, self.kv_cache.tensor.device, SPLIT)
            logits = fixed_forward(self._model, step, self.kv_cache, self._shapes)
            sampling = [r for r in step.requests if r.samples]
            for row, request in zip(logits, sampling, strict=True):
                one = sampled_from(row.clone().unsqueeze(0), [request])
                result.sampled.update(one.sampled)
                result.logprobs.update(one.logprobs)
        return result


def fixed_forward(
    model: torch.nn.Module, step: StepInputs, kv_cache: PagedKVCache, shapes: FixedShapes
) -> torch.Tensor:
    """Logits of the sampled rows, [num_sampled, vocab_size]; keys and values of all rows go to the cache."""
    num_rows, num_sampled = step.input_ids.shape[1], len(step.sampled_rows)
    filling = (0, padded(num_rows, shapes.rows) - num_rows)
    logits: torch.Tensor = model(
        input_ids=functional.pad(step.input_ids, filling),
        position_ids=functional.pad(step.position_ids, filling),
        use_cache=False,
        logits_to_keep=functional.pad(step.sampled_rows, (0, padded(num_sampled, shapes.rows) - num_sampled)),
        kv_meta=KVMeta(kv_cache, step, shapes),
    ).logits
    return logits[0, :num_sampled]
