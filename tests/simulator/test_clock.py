"""What is due happens in its order, and what is cancelled does not."""

from __future__ import annotations

from simulator.clock import STEP_END, Clock


def test_things_happen_by_time_then_order_then_as_scheduled() -> None:
    clock = Clock()
    happened: list[str] = []
    clock.at(2.0, happened.append, "step's end", order=STEP_END)
    clock.at(2.0, happened.append, "first message")
    clock.at(1.0, happened.append, "early")
    clock.at(2.0, happened.append, "second message")
    clock.run()
    assert happened == ["early", "first message", "second message", "step's end"]
    assert clock.now == 2.0


def test_what_is_cancelled_does_not_happen_and_takes_no_time() -> None:
    clock = Clock()
    happened: list[str] = []
    clock.at(1.0, happened.append, "kept")
    clock.at(5.0, happened.append, "cancelled").cancel()
    clock.run()
    assert (happened, clock.now) == (["kept"], 1.0)


def test_what_happens_may_schedule_more() -> None:
    clock = Clock()
    times: list[float] = []

    def again(num_left: int) -> None:
        times.append(clock.now)
        if num_left:
            clock.after(0.5, again, num_left - 1)

    clock.at(1.0, again, 2)
    clock.run()
    assert times == [1.0, 1.5, 2.0]
