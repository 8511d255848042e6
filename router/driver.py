"""Feeds events to the one Router and carries out its effects. Decides nothing; everything runs on one asyncio loop."""

from __future__ import annotations

from collections.abc import Callable

from router.client_call import ClientCall
from router.config import RouterConfig
from router.events import Arrived, ClientCancelled, Deliver, Effect, Event, Fail, Send
from router.router import Router
from router.worker_channel import WorkerChannel


class Driver:
    """Invariant: every worker that the Router knows as live has a channel here."""

    def __init__(self, router: Router, config: RouterConfig, clock: Callable[[], float]) -> None:
        self.router = router
        self.channels: dict[str, WorkerChannel] = {}
        self._calls: dict[str, ClientCall] = {}
        self._config = config
        self._clock = clock

    def feed(self, event: Event) -> None:
        for effect in self.router.on(event, self._clock()):
            self._apply(effect)

    def open_call(self, event: Arrived) -> ClientCall:
        request_id = event.request.request_id
        call = self._calls[request_id] = ClientCall(request_id, self._config.max_output_buffer_tokens)
        self.feed(event)
        return call

    def close_call(self, call: ClientCall) -> None:
        """The client has had its last word, or has gone: then the workers stop at once."""
        del self._calls[call.request_id]
        self.feed(ClientCancelled(call.request_id))  # changes nothing where the request has ended

    def _apply(self, effect: Effect) -> None:
        match effect:
            case Send():
                self.channels[effect.worker_id].send(effect)
            case Deliver() | Fail():
                call = self._calls.get(effect.request_id)
                if call is not None and not call.put(effect):
                    self.feed(ClientCancelled(effect.request_id))
