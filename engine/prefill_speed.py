"""What prefill costs on this worker, measured from its own steps: a cost model where they vary enough to say, seconds
per token in any case."""

from __future__ import annotations

from engine.scheduler_output import SchedulerOutput
from engine.step_costs import StepCosts
from protos.cost_fit import fit_prefill_line, matrix_of
from protos.cost_model import CostModel, prefill_line
from protos.step_moments import PREFILL_KINDS, TERMS, StepMoments, between

# A step with fewer prefill tokens says more about decoding than about prefill.
MIN_PREFILL_TOKENS_TO_MEASURE = 16
# Weight of the newest step in the moving average: it follows a change of load within about ten steps.
NEWEST_STEP_WEIGHT = 0.2

STEPS_PER_FIT = 64  # that only prefill; a fit takes a millisecond or two
MAX_FIT_STEPS = 1024  # older ones are forgotten: between half of these and all are fitted
MAX_RELATIVE_ERROR = 0.5  # of a fit that is trusted more than seconds per token


class PrefillSpeed:
    """Invariant: s_per_token is 0 until the first step that says something about prefill, and positive ever after."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.s_per_token = 0.0
        self._max_step_tokens = max_num_batched_tokens
        self._steps = StepCosts()
        self._cost: CostModel | None = None
        self._fitted_at = 0  # in steps that only prefill, like the next one
        self._halved_at = 0
        self._before: tuple[StepMoments, ...] = ()  # what is not fitted any more
        self._at_half: tuple[StepMoments, ...] = ()  # what will not be fitted any more

    def note_step(self, output: SchedulerOutput, duration_s: float) -> None:
        self._steps.note_step(output, duration_s)
        chunks = [each.num_scheduled_tokens for each in output.scheduled if each.num_scheduled_tokens > 1]
        if sum(chunks) < MIN_PREFILL_TOKENS_TO_MEASURE:
            return
        s_per_token = duration_s / output.num_batched_tokens
        old = self.s_per_token or s_per_token
        self.s_per_token = old + NEWEST_STEP_WEIGHT * (s_per_token - old)

    def moments(self) -> tuple[StepMoments, ...]:
        """Of all steps so far."""
        return self._steps.moments()

    @property
    def cost(self) -> CostModel | None:
        """Of a prompt, fitted to the latest steps, with nothing of decode; None where they do not determine it."""
        if self._steps.num_prefill_steps - self._fitted_at >= STEPS_PER_FIT:
            self._fit()
        return self._cost

    def prefill_s(self, num_new_tokens: int, num_cached_tokens: int) -> float:
        """0 until something is known."""
        cost = self.cost
        if cost is None:
            return num_new_tokens * self.s_per_token
        return cost.prefill_s([(num_new_tokens, num_cached_tokens)])

    def _fit(self) -> None:
        moments = self.moments()
        self._fitted_at = self._steps.num_prefill_steps
        step = _fitted(between(self._before, moments))
        self._cost = None if step is None else self._of_prompts(step)
        if self._fitted_at - self._halved_at >= MAX_FIT_STEPS // 2:
            self._before, self._at_half = self._at_half, moments
            self._halved_at = self._fitted_at

    def _of_prompts(self, step: CostModel) -> CostModel:
        """A prompt takes a step for every max_num_batched_tokens tokens, and half a step more on average."""
        base_s = step.prefill_base_s
        s_per_token = step.prefill_s_per_token + base_s / self._max_step_tokens
        return prefill_line(base_s / 2, s_per_token, step.prefill_s_per_token_pair)


def _fitted(moments: tuple[StepMoments, ...]) -> CostModel | None:
    by_kind = {each.kind: each for each in moments}
    none = (0.0,) * len(TERMS)
    try:
        fit = fit_prefill_line([matrix_of(by_kind.get(kind, StepMoments(kind, none))) for kind in PREFILL_KINDS])
    except ValueError:  # too few steps, or all alike
        return None
    found = fit.coefficients
    if fit.relative_error > MAX_RELATIVE_ERROR or not found["prefill_s_per_token"]:
        return None  # by a base alone, a long prompt would cost nothing
    return prefill_line(found["prefill_base_s"], found["prefill_s_per_token"], found["prefill_s_per_token_pair"])
