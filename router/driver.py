"""Feeds events to the one Router and carries out its effects. Decides nothing; everything runs on one asyncio loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from protos.types import FinishReason
from router.client_call import ClientCall
from router.config import RouterConfig
from router.events import Arrived, ClientCancelled, Deliver, Effect, Event, Fail, Send, Tick
from router.metrics import RouterMetrics
from router.pool_counts import PoolWatch
from router.router import Router
from router.worker_channel import WorkerChannel

Record = Callable[[Event, float, Sequence[Effect]], None]  # what was fed, when, and what came of it


class Driver:
    """Invariant: every worker that the Router knows as live has a channel here."""

    def __init__(
        self,
        router: Router,
        config: RouterConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        record: Record | None = None,
    ) -> None:
        self.router = router
        self.channels: dict[str, WorkerChannel] = {}
        self.pools = PoolWatch(config)
        self._calls: dict[str, ClientCall] = {}
        self._followers: dict[str, list[Arrived]] = {}  # by the request_id of the first choice
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._record = record

    def feed(self, event: Event) -> None:
        now = self._clock()
        effects = self.router.on(event, now)
        if isinstance(event, Arrived):
            self._metrics.routed(self._clock() - now)
        if isinstance(event, Tick):
            self.pools.look(self.router.view)
        if self._record is not None:
            self._record(event, now, effects)
        for effect in effects:
            self._apply(effect, now)

    def open_calls(self, choices: Sequence[Arrived]) -> list[ClientCall]:
        """One for each choice of a client's call. The first starts now, the others beside it when its prefill is done:
        they find its blocks in the prefix cache."""
        first, arrived_at = choices[0], self._clock()
        calls = [ClientCall(each.request.request_id, self._config.max_output_buffer_tokens) for each in choices]
        self._calls |= {call.request_id: call for call in calls}
        for call in calls:
            self._metrics.opened(call.request_id, first.request.num_prompt_tokens)
        self._followers[first.request.request_id] = [replace(each, arrived_at=arrived_at) for each in choices[1:]]
        self.feed(first)
        return calls

    def close_calls(self, calls: Sequence[ClientCall]) -> None:
        """The client has had its last word, or has gone: then the workers stop at once."""
        for call in calls:
            del self._calls[call.request_id]
            self._followers.pop(call.request_id, None)
            self.feed(ClientCancelled(call.request_id))  # changes nothing where the request has ended
            self._metrics.closed(call.request_id)

    def _apply(self, effect: Effect, now: float) -> None:
        match effect:
            case Send():
                self.channels[effect.worker_id].send(effect)
            case Deliver() | Fail():
                call = self._calls.get(effect.request_id)
                if call is not None and not call.put(effect):
                    self.feed(ClientCancelled(effect.request_id))
                self.pools.heard(effect)
                if isinstance(effect, Deliver):
                    self._metrics.delivered(effect, now)
                    self._follow(effect)
                else:
                    self._metrics.failed(effect)

    def _follow(self, first: Deliver) -> None:
        """The first word of a first choice: its prefill is done, or the caller has ended the request before."""
        for follower in self._followers.pop(first.request_id, ()):
            if first.finish_reason is FinishReason.ABORT:
                self._calls[follower.request.request_id].put(first)
            else:
                self.feed(replace(follower, beside=first.workers))
