"""What this worker's steps took, kept as the sums that a cost model can be fitted from. Fits nothing itself."""

from __future__ import annotations

from engine.scheduler_output import SchedulerOutput
from engine.step_work import StepWork, work_of
from protos.step_moments import PREFILL_KINDS, TERMS, StepKind, StepMoments, prefill_bin


class StepCosts:
    """Invariant: every step noted is in the sums of exactly one kind; no sum ever falls."""

    def __init__(self) -> None:
        self.num_prefill_steps = 0  # that did nothing else
        self._sums: dict[StepKind, list[float]] = {}

    def note_step(self, output: SchedulerOutput, duration_s: float) -> None:
        """A step that gave each of its requests one token at most."""
        kind, x, y = _point(work_of(output.scheduled))
        self.num_prefill_steps += kind in PREFILL_KINDS
        s = duration_s
        sums = self._sums.setdefault(kind, [0.0] * len(TERMS))
        for index, product in enumerate((1, x, y, s, x * x, x * y, x * s, y * y, y * s, s * s)):
            sums[index] += product

    def moments(self) -> tuple[StepMoments, ...]:
        """Of the kinds that there were; by name."""
        return tuple(StepMoments(kind, tuple(sums)) for kind, sums in sorted(self._sums.items()))


def _point(work: StepWork) -> tuple[StepKind, float, float]:
    num_tokens = sum(num_new for num_new, _ in work.chunks)
    num_pairs = sum(num_new * (num_cached + num_new / 2) for num_new, num_cached in work.chunks)
    if num_tokens == 0:
        return StepKind.DECODE, work.num_seqs, work.num_kv_tokens
    if work.num_seqs:
        return StepKind.MIXED, num_tokens, num_pairs
    return PREFILL_KINDS[prefill_bin(num_tokens)], num_tokens, num_pairs
