"""What a step computes, in the terms of the cost model (protos/cost_model.py). Knows no times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.scheduler_output import ScheduledRequest
from protos.cost_model import CostModel, PrefillChunk


@dataclass(frozen=True, slots=True)
class StepWork:
    chunks: tuple[PrefillChunk, ...]
    num_seqs: int  # that get a token from their last one
    num_kv_tokens: int  # that these read

    def step_s(self, cost: CostModel) -> float:
        return cost.step_s(self.chunks, self.num_seqs, self.num_kv_tokens)


def work_of(scheduled: Iterable[ScheduledRequest]) -> StepWork:
    """A chunk of one token that samples counts as decoding, the end of a prompt too: it costs the same."""
    chunks: list[PrefillChunk] = []
    num_seqs = num_kv_tokens = 0
    for each in scheduled:
        if each.num_scheduled_tokens == 1 and each.samples:
            num_seqs += 1
            num_kv_tokens += each.num_computed_tokens + 1
        else:
            chunks.append((each.num_scheduled_tokens, each.num_computed_tokens))
    return StepWork(tuple(chunks), num_seqs, num_kv_tokens)
