"""What runs a WorkerCore under virtual time: events, taken in when they come, and steps that take as long as the cost
model says. Decides nothing about requests or blocks. The live counterpart is engine/engine_thread.py."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from engine.config import SchedulerConfig
from engine.events import Effect, Event
from engine.scheduler_output import ScheduledRequest, SchedulerOutput, StepResult
from engine.step_work import work_of
from engine.worker_core import WorkerCore
from protos.cost_model import CostModel
from protos.types import WorkerStats
from simulator.clock import STEP_END, Clock, Entry
from simulator.horizons import Horizons
from simulator.requests import MAX_TOKEN_ID

# Generated ids lie in [FIRST_OUTPUT_ID, 2 ** 31), those of prompts below.
FIRST_OUTPUT_ID = MAX_TOKEN_ID
OUTPUT_ID_STRIDE = 100_003  # from one request's first id to the next one's
MAX_OUTPUT_TOKENS = 1 << 24

MAX_TOKENS_AT_ONCE = 32  # of each request in one fast-forwarded step: events cut most of them shorter


class SimulatedWorker:
    """Invariant: while a step is under way `_end` is its end; else nothing is to be computed.

    An event is answered when it comes, also while a step is under way; what is computed next follows when that ends.

    A step that only decodes stands for several: `_token_times` has the instants at which each of them would end, and
    an event that comes cuts it at the next of these, so that everything is as if each had been run."""

    def __init__(
        self,
        core: WorkerCore,
        config: SchedulerConfig,
        cost: CostModel,
        clock: Clock,
        deliver: Callable[[Sequence[Effect]], None],
        horizons: Horizons | None,
    ) -> None:
        """horizons: that no step of several tokens goes beyond; None: there are no such steps.
        `deliver` must not call `post`: what comes back from outside comes later, if only by nothing."""
        self.core = core
        self.busy_s = 0.0  # in steps that are over
        self.num_steps = 0
        self.has_changed = True  # since the last stats
        self._config = config
        self._cost = cost
        self._clock = clock
        self._deliver = deliver
        self._horizons = horizons
        self._output: SchedulerOutput | None = None
        self._in_last_step: set[str] = set()
        self._started_at = 0.0
        self._token_times: list[float] = []
        self._end: Entry | None = None
        self._alarm: Entry | None = None  # while nothing is to be computed: when the core wants to be asked anyway
        self._is_stopped = False

    def post(self, *events: Event) -> None:
        if self._is_stopped:
            return
        self.has_changed = True
        effects = [effect for event in events for effect in self.core.on(event, self._clock.now)]
        if effects:
            self._deliver(effects)
        if self._end is None:
            self._turn()
        elif len(self._token_times) > 1:
            self._cut(self._clock.now)

    def cut(self) -> None:
        """A step that stands for several ends with the token that is being made."""
        if self._end is not None:
            self._cut(self._clock.now)

    def stop(self) -> None:
        """Its life ends: nothing it was doing will be done."""
        for entry in (self._end, self._alarm):
            if entry is not None:
                entry.cancel()
        self._is_stopped = True

    def stats(self) -> WorkerStats:
        self.has_changed = False
        return self.core.stats()

    def busy_until(self, now: float) -> float:
        """Seconds spent in steps, the one under way included."""
        return self._busy_with(now) if self._end is not None else self.busy_s

    def _busy_with(self, until: float) -> float:
        """Token by token, so that sums are the same however many were made at once."""
        busy_s, start = self.busy_s, self._started_at
        for end in self._token_times:
            if start >= until:
                break
            busy_s += min(end, until) - start
            start = end
        return busy_s

    def _turn(self) -> None:
        """Start the next step, where there is one."""
        now = self._clock.now
        self.has_changed = True
        self._output, opened = self.core.schedule(now)
        if opened:
            self._deliver(opened)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        deadline = self.core.deadline
        if self._output is not None:
            self._start(self._output, deadline)
        elif deadline is not None:
            self._alarm = self._clock.at(max(now, deadline), self._turn)

    def _start(self, output: SchedulerOutput, deadline: float | None) -> None:
        self._started_at = self._clock.now
        self._token_times = self._times_of(output)
        self._end = self._clock.at(self._token_times[-1], self._end_step, order=STEP_END)
        if deadline is not None:
            self._cut(deadline)

    def _times_of(self, output: SchedulerOutput) -> list[float]:
        """When each of the tokens is done that this step gives to all of its requests."""
        work = work_of(output.scheduled)
        time = self._clock.now + work.step_s(self._cost)
        times = [time]
        if self._horizons is not None and self._may_stand_for_several(output) and not work.chunks:
            num_kv_tokens = work.num_kv_tokens
            horizon = self._horizons.after(self._clock.now)
            for _ in range(min(MAX_TOKENS_AT_ONCE, *map(self._num_foreseeable, output.scheduled)) - 1):
                num_kv_tokens += work.num_seqs
                time += self._cost.step_s((), work.num_seqs, num_kv_tokens)
                if time > horizon:
                    break
                times.append(time)
        return times

    def _may_stand_for_several(self, output: SchedulerOutput) -> bool:
        """Where a request has left, the next step may have others in it although nothing happens in between."""
        before, self._in_last_step = self._in_last_step, {each.request_id for each in output.scheduled}
        return not output.preempted_request_ids and before <= self._in_last_step

    def _num_foreseeable(self, scheduled: ScheduledRequest) -> int:
        """Tokens that the request gets before it says its first word, ends, or needs another block."""
        num_tokens = len(scheduled.token_ids)
        num_outputs = num_tokens - scheduled.num_prompt_tokens
        if num_outputs == 0:
            return 1
        num_left = min(scheduled.sampling_params.max_tokens - num_outputs, self._config.max_model_len - num_tokens)
        num_slots = len(scheduled.block_table) * self._config.block_size - scheduled.num_computed_tokens
        return min(num_left, num_slots)

    def _cut(self, at: float) -> None:
        """End the step with the token that is being made at that time."""
        assert self._end is not None
        num_tokens = bisect_left(self._token_times, at) + 1
        if num_tokens < len(self._token_times):
            del self._token_times[num_tokens:]
            self._end.cancel()
            self._end = self._clock.at(self._token_times[-1], self._end_step, order=STEP_END)

    def _end_step(self) -> None:
        output, now = self._output, self._clock.now
        assert output is not None
        self._end = self._output = None
        self.busy_s = self._busy_with(now)
        self.num_steps += len(self._token_times)
        first_s = self._token_times[0] - self._started_at
        sampled = {
            each.request_id: _tokens_of(each, len(self._token_times)) for each in output.scheduled if each.samples
        }
        self.core.note_step(output, first_s)  # of the steps that this one stands for, the one that it describes
        effects = self.core.update_from_output(output, StepResult(sampled), now)
        if effects:
            self._deliver(effects)
        self._turn()


def _tokens_of(scheduled: ScheduledRequest, num_tokens: int) -> tuple[int, ...]:
    """Ids by request and index alone, so that every attempt says the same."""
    start = int(scheduled.request_id) * OUTPUT_ID_STRIDE % (FIRST_OUTPUT_ID - MAX_OUTPUT_TOKENS)
    first = FIRST_OUTPUT_ID + start + len(scheduled.token_ids) - scheduled.num_prompt_tokens
    return tuple(range(first, first + num_tokens))
