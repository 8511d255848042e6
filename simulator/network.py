"""Bytes between workers: how long a flow takes, given the flows beside it. Knows no transfers."""

from __future__ import annotations

from collections.abc import Callable

from simulator.clock import Clock, Entry


class Flow:
    """Bytes on their way from one worker to another."""

    __slots__ = ("destination", "entry", "num_left", "on_done", "rate", "since", "source")

    def __init__(self, source: str, destination: str, num_bytes: float, on_done: Callable[[], None]) -> None:
        self.source = source
        self.destination = destination
        self.num_left = num_bytes
        self.on_done = on_done
        self.rate = 0.0
        self.since = 0.0
        self.entry: Entry | None = None


class Network:
    """Every worker sends and receives at link_nbytes_per_s each. A flow gets an equal share of its busier end: what its
    neighbours leave unused because their other end is busier is given to nobody, so this is a little pessimistic.

    Invariant: `_sending` and `_receiving` hold each flow under way, at its ends; its rate is by their numbers."""

    def __init__(self, clock: Clock, link_nbytes_per_s: float, latency_s: float) -> None:
        self._clock = clock
        self._capacity = link_nbytes_per_s
        self._latency_s = latency_s
        self._sending: dict[str, dict[Flow, None]] = {}
        self._receiving: dict[str, dict[Flow, None]] = {}

    @property
    def num_flows(self) -> int:
        return sum(map(len, self._sending.values()))

    def start(self, source: str, destination: str, num_bytes: int, on_done: Callable[[], None]) -> None:
        """on_done is called when the last byte has come; never where an end is dropped before."""
        flow = Flow(source, destination, num_bytes, on_done)
        flow.since = self._clock.now
        self._sending.setdefault(source, {})[flow] = None
        self._receiving.setdefault(destination, {})[flow] = None
        self._share(flow)

    def drop(self, worker_id: str) -> None:
        """The worker is gone, and what was on its way to or from it."""
        for flow in [*self._sending.get(worker_id, ()), *self._receiving.get(worker_id, ())]:
            if flow.entry is not None:
                flow.entry.cancel()
            self._remove(flow)

    def _finish(self, flow: Flow) -> None:
        self._remove(flow)
        self._clock.after(self._latency_s, flow.on_done)

    def _remove(self, flow: Flow) -> None:
        self._sending[flow.source].pop(flow, None)
        self._receiving[flow.destination].pop(flow, None)
        self._share(flow)

    def _share(self, changed: Flow) -> None:
        """The flows that share an end with `changed` get their new rates."""
        sending, receiving = self._sending[changed.source], self._receiving[changed.destination]
        for flow in [*sending, *(flow for flow in receiving if flow.source != changed.source)]:
            num_beside = max(len(self._sending[flow.source]), len(self._receiving[flow.destination]))
            self._set_rate(flow, self._capacity / num_beside)

    def _set_rate(self, flow: Flow, rate: float) -> None:
        if rate == flow.rate:
            return
        now = self._clock.now
        flow.num_left = max(0.0, flow.num_left - flow.rate * (now - flow.since))
        flow.rate, flow.since = rate, now
        if flow.entry is not None:
            flow.entry.cancel()
        flow.entry = self._clock.after(flow.num_left / rate, self._finish, flow)
