"""Feeds recorded events to a fresh Router and compares what it chooses with what was chosen then. Knows no file and no
cluster: lines come in, the first difference goes out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from router.event_codec import decode_config, decode_event, encode_choices
from router.router import Router

TRANSFER_ID = "transfer_id"


@dataclass(frozen=True, slots=True)
class Difference:
    """Choices as event_codec.py encodes them, transfer ids as numbers."""

    line: int  # of the event, from 1
    recorded: Any
    replayed: Any


@dataclass(frozen=True, slots=True)
class Replay:
    num_events: int  # up to the difference, where there is one
    num_choices: int  # that were equal
    difference: Difference | None


class Numbering:
    """Transfer ids are random: each is compared by when it was first named."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def apply(self, value: Any) -> Any:
        """The same value, its transfer ids replaced by numbers."""
        if isinstance(value, list):
            return [self.apply(part) for part in value]
        if not isinstance(value, dict):
            return value
        return {name: self._number(part) if name == TRANSFER_ID else self.apply(part) for name, part in value.items()}

    def _number(self, transfer_id: str) -> int:
        return self._numbers.setdefault(transfer_id, len(self._numbers))


def replay(lines: Iterable[str]) -> Replay:
    """ValueError names the line that is none of a recording."""
    numbered = enumerate(lines, start=1)
    router = _make_router(numbered)
    then, now = Numbering(), Numbering()
    num_events = num_choices = 0
    for number, text in numbered:
        try:
            line = json.loads(text)
            event, at, recorded = decode_event(line["event"]), float(line["now"]), then.apply(line["choices"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no recorded event: {type(error).__name__}: {error}") from error
        num_events += 1
        replayed = now.apply(encode_choices(router.on(event, at)))
        if replayed != recorded:
            return Replay(num_events, num_choices, Difference(number, recorded, replayed))
        num_choices += len(replayed)
    return Replay(num_events, num_choices, None)


def _make_router(numbered: Iterable[tuple[int, str]]) -> Router:
    try:
        _, text = next(iter(numbered))
        config = decode_config(json.loads(text)["config"])
    except StopIteration:
        raise ValueError("the recording is empty") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"line 1 holds no router settings: {type(error).__name__}: {error}") from error
    num_transfers = 0

    def make_transfer_id() -> bytes:
        nonlocal num_transfers
        num_transfers += 1
        return num_transfers.to_bytes(16, "big")

    return Router(config, make_transfer_id)
