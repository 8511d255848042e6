"""Flows share the busier of their two ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulator.clock import Clock
from simulator.network import Network

RATE = 100.0


class Wires:
    def __init__(self, latency_s: float = 0.0) -> None:
        self.clock = Clock()
        self.network = Network(self.clock, RATE, latency_s)
        self.done: dict[str, float] = {}

    def start(self, source: str, destination: str, num_bytes: int, at: float = 0.0, name: str = "") -> None:
        def on_done() -> None:
            self.done[name or source + destination] = self.clock.now

        self.clock.at(at, self.network.start, source, destination, num_bytes, on_done)


def test_a_flow_alone_has_the_whole_link_and_then_the_latency() -> None:
    wires = Wires(latency_s=0.25)
    wires.start("a", "x", 200)
    wires.clock.run()
    assert wires.done == {"ax": 2.25}


def test_flows_that_share_no_end_do_not_disturb_each_other() -> None:
    wires = Wires()
    wires.start("a", "x", 200)
    wires.start("b", "y", 300)
    wires.clock.run()
    assert wires.done == {"ax": 2.0, "by": 3.0}


def test_one_that_comes_halves_the_rate_and_one_that_ends_gives_it_back() -> None:
    wires = Wires()
    wires.start("a", "x", 200)
    wires.start("b", "x", 100, at=1.0)  # 100 of the first are left: both at 50 until 3.0, when both are done
    wires.start("a", "y", 50, at=5.0)
    wires.start("a", "z", 100, at=5.0)  # 50 each, until the first is done at 6.0; 50 left at 100
    wires.clock.run()
    assert wires.done == {"ax": 3.0, "bx": 3.0, "ay": 6.0, "az": 6.5}


def test_the_busier_end_decides() -> None:
    wires = Wires()
    for source in ("a", "b", "c", "d"):
        wires.start(source, "x", 100)
    wires.start("a", "y", 100)  # has half of a: what ax cannot use is given to nobody
    wires.clock.run()
    assert wires.done == {"ay": 2.0, **dict.fromkeys(("ax", "bx", "cx", "dx"), 4.0)}


def test_a_worker_that_is_gone_takes_its_flows_along_and_leaves_the_rate_to_others() -> None:
    wires = Wires()
    wires.start("a", "x", 200)
    wires.start("b", "x", 200)
    wires.clock.at(2.0, wires.network.drop, "b")
    wires.clock.run()
    assert wires.done == {"ax": 3.0}
    assert wires.network.num_flows == 0


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 500)), min_size=1, max_size=12)
)
def test_no_end_ever_carries_more_than_it_can(flows: list[tuple[str, str, int]]) -> None:
    """All start at once, so an end is done no sooner than its bytes allow, and nothing takes longer than one by one."""
    wires = Wires()
    for number, (source, destination, num_bytes) in enumerate(flows):
        wires.start(source, destination, num_bytes, name=str(number))
    wires.clock.run()
    assert len(wires.done) == len(flows)
    for end in {end for flow in flows for end in flow[:2]}:
        at_end = [i for i, flow in enumerate(flows) if end in flow[:2]]
        last = max(wires.done[str(i)] for i in at_end)
        assert last >= sum(flows[i][2] for i in at_end) / RATE - 1e-9
    assert max(wires.done.values()) <= sum(flow[2] for flow in flows) / RATE + 1e-9
