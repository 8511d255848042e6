"""Whether two workers may open a link to each other, and if not, why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from kvtransfer.config import TransferConfig
from kvtransfer.messages import Hello, HelloRefused, Terms, clip
from protos.types import PROTOCOL_VERSION, KVLayout, PeerRef


def terms_of(layout: KVLayout, config: TransferConfig) -> Terms:
    return Terms(PROTOCOL_VERSION, layout, config.checksum, config.chunk_nbytes)


def mismatch(theirs: Terms, mine: Terms) -> str:
    """The first thing that differs, with both values; empty where nothing does."""
    pairs = [(name, getattr(theirs, name), getattr(mine, name)) for name in ("protocol_version",)]
    pairs += [(f.name, getattr(theirs.layout, f.name), getattr(mine.layout, f.name)) for f in fields(KVLayout)]
    pairs += [(name, getattr(theirs, name), getattr(mine, name)) for name in ("checksum", "chunk_nbytes")]
    for name, their_value, my_value in pairs:
        if their_value != my_value:
            return f"{name} differs: {their_value!r} dials {my_value!r}"
    return ""


def judge_hello(hello: Hello, me: PeerRef, terms: Terms, members: Mapping[str, PeerRef] | None) -> HelloRefused | None:
    """None: welcome. `members` by worker id, None before the first membership. It may lag at either end, so that what
    it forbids is refused for now only."""
    if hello.receiver_incarnation != me.incarnation:
        stale = f"{me.worker_id} is incarnation {me.incarnation}, not {hello.receiver_incarnation}"
        return HelloRefused(clip(stale), is_final=True)
    if difference := mismatch(hello.terms, terms):
        return HelloRefused(clip(difference), is_final=True)
    known = members.get(hello.sender.worker_id) if members is not None else hello.sender
    if known is None or known.incarnation != hello.sender.incarnation:
        unknown = f"{hello.sender.worker_id} incarnation {hello.sender.incarnation} is not a member"
        return HelloRefused(clip(unknown), is_final=False)
    return None
