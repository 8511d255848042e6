"""The transfer protocol under fire: TWINRING_FUZZ_CASES says how many cases, TWINRING_FUZZ_SEED replays one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kvtransfer import destination_side, source_side
from kvtransfer.destination_transfer import ChunkEnded, DestinationEffect, DestinationTransfer, Receive
from kvtransfer.messages import Abort, Ack, Ready, Stamp, TransferMessage, encode
from kvtransfer.source_transfer import SourceEffect, SourceTransfer
from protos.types import Role
from tests.kvtransfer import fuzz_case
from tests.kvtransfer.fuzz_case import CONFIG, FAULTS, Plan, plan_of, run_case
from tests.kvtransfer.fuzz_host import Manners
from tests.kvtransfer.fuzz_weather import SeededWeather

torch.set_num_threads(1)

NUM_CASES = int(os.environ.get("TWINRING_FUZZ_CASES", "240"))
SLICE = 40  # cases of one test
KIND = Manners(refuses=0.0, is_silent=0.0, is_late=0.0, lateness_s=0.0, abandons=0.0)
SEEDS = range(30)  # of what must be found or must never happen in a few cases


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What goes wrong on purpose is not worth a line."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def first_violation(plans: Iterator[Plan]) -> str:
    for plan in plans:
        if violations := run_case(plan).violations:
            return violations[0]
    return ""


@pytest.mark.parametrize("start", range(0, NUM_CASES, SLICE))
def test_nothing_but_what_was_sent_is_ever_committed_and_nothing_is_left(start: int) -> None:
    for seed in range(start, min(start + SLICE, NUM_CASES)):
        if violations := run_case(plan_of(seed)).violations:
            pytest.fail("\n".join([f"TWINRING_FUZZ_SEED={seed}", *violations]))


@pytest.mark.skipif("TWINRING_FUZZ_SEED" not in os.environ, reason="no seed to replay")
def test_replay() -> None:
    plan = plan_of(int(os.environ["TWINRING_FUZZ_SEED"]))
    logging.disable(logging.NOTSET)
    result = run_case(plan)
    print("\n".join([str(plan), *result.trace]))
    assert not result.violations


def test_a_seed_is_a_run() -> None:
    for seed in range(6):
        assert run_case(plan_of(seed)).trace == run_case(plan_of(seed)).trace


def test_cases_get_somewhere() -> None:
    """Without troubles everything arrives; with them much still does, and much does not."""
    calm = [run_case(Plan(seed, manners=KIND)) for seed in SEEDS]
    assert sum(result.num_arrived for result in calm) > len(SEEDS)
    assert not any(result.violations for result in calm)
    assert sum(result.num_lost for result in calm) == 0
    foul = [run_case(plan_of(seed)) for seed in SEEDS]
    assert sum(result.num_arrived for result in foul) > len(SEEDS) // 2
    assert sum(result.num_lost for result in foul) > len(SEEDS) // 2


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_at_each_step(fault: str) -> None:
    """A handoff or a pull and its answer take some 60 steps from the first dialling."""
    for step in range(4, 72, 4):
        plan = Plan(step, num_jobs=1, faults=((step, fault),), slowness_s=0.002, manners=KIND)
        assert not run_case(plan).violations, plan


class Meddling(SeededWeather):
    """A destination that speaks of another's transfers, too, all the time."""

    num_forged = 0

    def fates(self, sender: str, receiver: str, body: bytes, to_dialler: bool) -> list[tuple[float, bytes]]:
        fates = super().fates(sender, receiver, body, to_dialler)
        if to_dialler and sender == "x0.0" and self.known:
            forged = self.words(self.known[0], receiver)
            Meddling.num_forged += len(forged)
            fates += [(fates[0][0], encode(message)) for message in forged]
        return fates

    def words(self, stamp: Stamp, source: str) -> list[TransferMessage]:
        if (stamp.source_incarnation, stamp.destination_incarnation) != (source, "d0.0"):
            return []
        return [Ack(stamp), Ready(stamp, 0, 0, 64), Abort(stamp, "meddling")]


class Greedy(Meddling):
    """Posts a receive that nobody has memory for."""

    def words(self, stamp: Stamp, source: str) -> list[TransferMessage]:
        return [Ready(Stamp(bytes(16), 1, source, "x0.0"), 0, 0, 1 << 63)]


@pytest.mark.parametrize("weather", [Meddling, Greedy])
def test_what_another_destination_says_changes_nothing(
    weather: type[Meddling], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_case, "SeededWeather", weather)
    monkeypatch.setattr(Meddling, "num_forged", 0)
    chatty = replace(CONFIG, ping_interval_s=0.05)
    for seed in SEEDS:
        result = run_case(Plan(seed, num_jobs=1, slowness_s=0.05, manners=KIND, config=chatty, third=Role.DECODE))
        assert not result.violations
        assert weather is Greedy or not result.num_lost, "its own link is lost, nobody else's"
    assert Meddling.num_forged > len(SEEDS)


# --- that it can fail -------------------------------------------------------------------------------------------------


def test_without_checksums_flipped_bits_are_seen_in_the_blocks() -> None:
    unverified = replace(CONFIG, checksum="none")
    plans = (Plan(seed, flips=0.5, config=unverified, manners=KIND) for seed in SEEDS)
    assert "other KV" in first_violation(plans)
    assert not first_violation(Plan(seed, flips=0.5, manners=KIND) for seed in SEEDS)


class CountsTooEarly(DestinationTransfer):
    """Takes a chunk for written when it is announced."""

    def _on_chunk(self, chunk: object) -> list[DestinationEffect]:
        effects = super()._on_chunk(chunk)  # type: ignore[arg-type]
        if effects and isinstance(effects[0], Receive):
            self._num_written += len(effects[0].block_ids)
            self._receiving.clear()
        return effects

    def _on_chunk_ended(self, event: ChunkEnded, now: float) -> list[DestinationEffect]:
        return []


class ClosesTooEarly(SourceTransfer):
    """Gives blocks back while they are read."""

    def _close_when_quiet(self) -> list[SourceEffect]:
        self._gathering.clear()
        return super()._close_when_quiet()

    def _on_gather_ended(self, event: object) -> list[SourceEffect]:
        return []


class ForgetsTheDeadline(DestinationTransfer):
    @property
    def deadline(self) -> float | None:
        return None


@pytest.mark.parametrize(
    ("side", "name", "broken", "seen_as"),
    [
        (destination_side, "DestinationTransfer", CountsTooEarly, "other KV"),
        (source_side, "SourceTransfer", ClosesTooEarly, "read"),
        (destination_side, "DestinationTransfer", ForgetsTheDeadline, "do not end"),
    ],
)
def test_a_broken_machine_is_found(
    side: object, name: str, broken: type, seen_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side, name, broken)
    assert any(seen_as in violation for seed in range(200) for violation in run_case(plan_of(seed)).violations)
