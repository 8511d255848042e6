"""What a seeded network does to frames: loses, doubles, delays and garbles them, lets old ones come again, and adds
what nobody said. Decides by chance alone; what must hold under it is for others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from random import Random
from typing import Any

from kvtransfer.messages import (
    MAX_ASK_NBYTES,
    Abort,
    Accept,
    Ack,
    Answer,
    Challenge,
    Chunk,
    Commit,
    Hello,
    HelloRefused,
    LinkOffer,
    Message,
    Offer,
    Ping,
    Proof,
    Ready,
    Refuse,
    Stamp,
    TransferMessage,
    decode,
    encode,
)
from protos.types import TransferKind
from tests.kvtransfer.virtual_network import DELAY_S

KINDS = ("lose", "double", "delay", "swap", "garble", "lie", "stale", "forge")
LONGEST_DELAY_S = 0.8
_PING = encode(Ping())
_FAR = (0, 1, 2, 7, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_OF_HANDSHAKE = (Hello, Challenge, Proof, HelloRefused, LinkOffer)
# Of these a peer's word is all there is: who it is must be known by other means, and that it does not lie, by none.
_TAKEN_ON_TRUST = {(Commit, "first_index"), (Commit, "token_ids"), (Commit, "num_blocks")}


@dataclass(frozen=True)
class Odds:
    trouble: float = 0.0  # of one frame
    kinds: tuple[str, ...] = KINDS
    spares_handshakes: bool = True


class SeededWeather:
    """Satisfies Weather. `known` has the stamps that were seen, of any transfer; `heard` whole frames, by direction."""

    def __init__(self, rng: Random, odds: Odds, on_frame: Callable[[], None]) -> None:
        self.rng = rng
        self.odds = odds
        self.held_until: dict[str, float] = {}  # of a life that is stopped
        self.counts: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._on_frame = on_frame
        self.known: list[Stamp] = []
        self._heard: dict[bool, list[bytes]] = {True: [], False: []}
        self._lied_about_position = False
        self._loop = asyncio.get_running_loop()

    def fates(self, sender: str, receiver: str, body: bytes, to_dialler: bool) -> list[tuple[float, bytes]]:
        self._on_frame()
        now = self._loop.time()
        delay_s = max(DELAY_S, *(self.held_until.get(life, 0.0) - now for life in (sender, receiver)))
        if body == _PING:  # most frames
            return [(delay_s, body)]
        message = decode(body, MAX_ASK_NBYTES)
        self._note(message, body, to_dialler)
        spared = isinstance(message, _OF_HANDSHAKE) and self.odds.spares_handshakes
        if spared or self.rng.random() >= self.odds.trouble:
            return [(delay_s, body)]
        kind = self.rng.choice(self.odds.kinds)
        self.counts[kind] += 1
        return self._troubled(kind, delay_s, message, body, (sender, receiver), to_dialler)

    def _troubled(
        self, kind: str, delay_s: float, message: Message, body: bytes, way: tuple[str, str], to_dialler: bool
    ) -> list[tuple[float, bytes]]:
        rng = self.rng
        match kind:
            case "lose":
                return []
            case "double":
                return [(delay_s, body), (delay_s + rng.choice((0.0, 0.01, 0.5)), body)]
            case "delay":
                return [(delay_s + rng.choice((0.02, 0.3, LONGEST_DELAY_S)), body)]
            case "swap":  # with those that follow at once
                return [(delay_s + 1.5 * DELAY_S, body)]
            case "garble":
                return [(delay_s, garbled(body, rng))]
            case "lie":
                return [(delay_s, self._lie(message) or body)]
            case "stale":
                return [(delay_s, body), (delay_s, rng.choice(self._heard[to_dialler] or [body]))]
        return [(delay_s, encode(self._forged(way, to_dialler))), (delay_s, body)]

    def _note(self, message: Message, body: bytes, to_dialler: bool) -> None:
        if not isinstance(message, _OF_HANDSHAKE):
            self._heard[to_dialler] = [*self._heard[to_dialler][-63:], body]
        if isinstance(message, Offer) and message.stamp not in self.known:
            self.known.append(message.stamp)

    def _lie(self, message: Message) -> bytes | None:
        """The message with one field changed, or None where no such change makes a frame. Two chunks that change places
        are beyond what a sum over bytes can tell, so that positions are lied about once."""
        changed = altered(message, self.rng, self.known)
        if changed is None:
            return None
        if isinstance(message, Chunk) and isinstance(changed, Chunk) and message.first_block != changed.first_block:
            if self._lied_about_position:
                return None
            self._lied_about_position = True
        return encode(changed)

    def _forged(self, way: tuple[str, str], to_dialler: bool) -> TransferMessage:
        """Of a transfer that is not this pair's, or of none; or what this pair's destination never had to say."""
        rng = self.rng
        source, destination = reversed(way) if to_dialler else way
        stamps = [Stamp(rng.randbytes(16), rng.randrange(3), source, destination)]
        for known in self.known:
            if (known.source_incarnation, known.destination_incarnation) != (source, destination):
                stamps += [known, replace(known, source_incarnation=source, destination_incarnation=destination)]
            stamps.append(replace(known, attempt=known.attempt + 1))
        stamp = rng.choice(stamps)
        number = rng.choice(_FAR)
        if to_dialler:
            return rng.choice(
                (Accept(stamp, number), Refuse(stamp, "forged"), Ready(stamp, 0, number, rng.choice(_FAR)), Ack(stamp),
                 Abort(stamp, "forged"))
            )  # fmt: skip
        return rng.choice(
            (Offer(stamp, rng.choice(list(TransferKind)), "forged", number), Chunk(stamp, 0, 0, 1, 32, number),
             Commit(stamp, 3, (6, 6, 6), 1), Abort(stamp, "forged"))
        )  # fmt: skip


def garbled(body: bytes, rng: Random) -> bytes:
    """Too short, too long, or with a bit flipped that makes it no frame: a flip that leaves a frame is a lie."""
    flipped = bytearray(body)
    flipped[rng.randrange(min(4, len(flipped)))] ^= 1 << rng.randrange(8)
    for broken in rng.sample([body[: rng.randrange(len(body))], body + b"\x00", bytes(flipped), rng.randbytes(20)], 4):
        try:
            decode(broken, MAX_ASK_NBYTES)
        except ValueError:
            return broken
    return b""


def altered(message: Any, rng: Random, known: list[Stamp]) -> Any | None:
    """The same with one field, at any depth, as it was not."""
    names = [field.name for field in fields(message) if (type(message), field.name) not in _TAKEN_ON_TRUST]
    if isinstance(message, Answer) or not names:
        return None
    name = rng.choice(names)
    value = getattr(message, name)
    other = altered(value, rng, known) if is_dataclass(value) else _another(value, rng, known)
    try:
        return None if other is None or other == value else replace(message, **{name: other})
    except ValueError:
        return None


def _another(value: object, rng: Random, known: list[Stamp]) -> object:
    match value:
        case StrEnum():
            return rng.choice(list(type(value)))
        case int():
            return rng.choice((max(0, value - 1), value + 1, *_FAR))
        case bytes() if len(value) == 16 and known:
            return rng.choice((rng.choice(known).transfer_id, rng.randbytes(16)))
        case bytes():
            return rng.randbytes(16 * rng.randrange(1, 4))
        case str():
            return rng.choice((*(stamp.source_incarnation for stamp in known), "", "x" * 1000))
    return None
