"""Decode steps that were recorded once per batch size and are replayed: a CUDA graph launches a whole step at once.
Which token is the likeliest is part of it, and drawing by temperature alone is a second graph behind it. What does not
fit is run by device_runner.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.decode_buffers import DecodeBuffers, bucket_of
from engine.device_steps import PagedStep
from engine.sampler import noisy_best
from engine.scheduler_output import ScheduledRequest
from protos.types import SamplingParams

Tensors = tuple[torch.Tensor, ...]
Replay = Callable[[], None]
MIN_TEMPERATURE = 1e-5  # as in sampler.py


class Recorder(Protocol):
    def record(self, run: Callable[[], Tensors]) -> tuple[Tensors, Replay]:
        """What run gave, and a call that makes it anew in the same tensors, from what is in run's inputs by then."""


class CudaRecorder:
    """Invariant: all graphs share one pool of memory, so they are replayed one at a time, in any order; what a graph
    gave stays allocated for as long as somebody has it."""

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], Tensors]) -> tuple[Tensors, Replay]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and makes workspaces, neither of which can be recorded
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            made = run()
        current.wait_stream(self._stream)
        return made, graph.replay


@dataclass(frozen=True, slots=True)
class _Recorded:
    logits: torch.Tensor  # [bucket, vocab_size]
    likeliest: torch.Tensor  # [bucket]
    drawn: torch.Tensor  # [bucket]
    replay_step: Replay
    replay_draw: Replay


class DecodeGraphs:
    """Invariant: a recorded step reads `buffers` and the KV cache, and writes the KV cache and its own tensors; all of
    these keep their addresses."""

    def __init__(
        self,
        forward: Callable[[PagedStep], torch.Tensor],
        buffers: DecodeBuffers,
        buckets: Sequence[int],
        recorder: Recorder,
    ) -> None:
        """forward: logits of a step's rows, [num_rows, vocab_size]. Nothing is recorded yet."""
        self._forward = forward
        self._buffers = buffers
        self._buckets = sorted(buckets)
        self._recorder = recorder
        self._recorded: dict[int, _Recorded] = {}

    def record(self, on_progress: Callable[[str], None]) -> None:
        """The largest first: the others then find their memory in the pool."""
        for num_done, bucket in enumerate(reversed(self._buckets)):
            on_progress(f"recording decode graphs ({num_done} of {len(self._buckets)})")
            self._recorded[bucket] = self._record(bucket)

    def _record(self, bucket: int) -> _Recorded:
        step = self._buffers.step(bucket)

        def compute() -> Tensors:
            logits = self._forward(step)
            return logits, logits.argmax(-1)

        (logits, likeliest), replay_step = self._recorder.record(compute)
        keys, temperatures = self._buffers.keys[:bucket], self._buffers.temperatures[:bucket]
        (drawn,), replay_draw = self._recorder.record(lambda: (draw_plain(logits, temperatures, keys),))
        return _Recorded(logits, likeliest, drawn, replay_step, replay_draw)

    def run(self, scheduled: Sequence[ScheduledRequest]) -> DecodedStep | None:
        """None where the step does not fit. What it gives is overwritten by the next."""
        bucket = bucket_of(scheduled, self._buckets)
        if bucket is None or bucket not in self._recorded:
            return None
        self._buffers.fill(scheduled, bucket)
        recorded = self._recorded[bucket]
        recorded.replay_step()
        return DecodedStep(recorded, self._buffers, scheduled)


class DecodedStep:
    def __init__(self, recorded: _Recorded, buffers: DecodeBuffers, scheduled: Sequence[ScheduledRequest]) -> None:
        self.logits = recorded.logits[: len(scheduled)]
        self._recorded = recorded
        self._buffers = buffers
        self._scheduled = scheduled

    def plain_tokens(self) -> list[int] | None:
        """Of unchanged logits; None where a request asks for more than a temperature."""
        params = [r.sampling_params for r in self._scheduled]
        if not all(is_plain(p) for p in params):
            return None
        chosen = self._recorded.likeliest
        if any(p.temperature > 0 for p in params):
            self._buffers.fill_sampling(self._scheduled)
            self._recorded.replay_draw()
            chosen = self._recorded.drawn
        tokens: list[int] = chosen[: len(self._scheduled)].tolist()
        return tokens


def is_plain(params: SamplingParams) -> bool:
    """Its token depends on logits, temperature, seed and position alone."""
    return params.temperature == 0 or (params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0)


def draw_plain(logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The tokens that sampler.sample gives, without asking the device anything. logits: [num_rows, vocab_size]; the
    others: [num_rows, 1]. [num_rows]"""
    scaled = (logits.float() - logits.amax(-1, keepdim=True).float()) / temperatures.clamp(min=MIN_TEMPERATURE)
    token_ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(scaled)
    drawn = noisy_best(scaled, token_ids, keys).squeeze(-1)
    return torch.where(temperatures.squeeze(-1) > 0, drawn, logits.argmax(-1))
