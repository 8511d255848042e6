"""A worker without network, threads or transfers: submits requests, steps until they end, returns their tokens.

For tests and benchmarks of the real WorkerCore and ModelRunner; a serving worker uses engine_thread.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.events import Effect, Submitted
from engine.scheduler_output import SchedulerOutput, StepResult
from engine.worker_core import WorkerCore
from protos.types import FinishReason, GenerateRequest, TokenOutput


class Runs(Protocol):
    def execute(self, output: SchedulerOutput) -> StepResult: ...


class LocalEngine:
    def __init__(self, core: WorkerCore, runner: Runs, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._runner = runner
        self._clock = clock

    def generate(self, requests: Sequence[GenerateRequest]) -> dict[str, list[int]]:
        """New tokens by request_id; ValueError where the core refuses a request. No handoffs: nobody would move KV."""
        outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            assert request.handoff_to is None and request.handoff_from is None
            _collect(outputs, self._core.on(Submitted(request), self._clock()))
        while self._step(outputs):
            pass
        return outputs

    def _step(self, outputs: dict[str, list[int]]) -> bool:
        """False where there was nothing to compute."""
        output, effects = self._core.schedule(self._clock())
        assert not effects
        if output is None:
            return False
        result = self._runner.execute(output)
        _collect(outputs, self._core.update_from_output(output, result, self._clock()))
        return True


def _collect(outputs: dict[str, list[int]], effects: Sequence[Effect]) -> None:
    for effect in effects:
        assert isinstance(effect, TokenOutput), effect
        if effect.finish_reason is FinishReason.ERROR:
            raise ValueError(f"request {effect.request_id} was refused: {effect.error}")
        outputs[effect.request_id].extend(effect.token_ids)
