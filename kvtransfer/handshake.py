"""Whether two workers may open a link to each other, and if not, why; and how each knows that the other has the
cluster's secret. Pure: nonces are handed in. greeter.py says it on a stream:

    hello ->, <- challenge, proof ->, and only then an answer

A proof is a keyed hash over the hello, which names both lives, and the nonces of both: it is worth nothing on another
stream, and neither end's proof passes for the other's."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import fields

from kvtransfer.config import TransferConfig
from kvtransfer.messages import Hello, HelloRefused, Terms, clip, encode
from protos.types import PROTOCOL_VERSION, KVLayout, PeerRef

DIALLING, DIALLED = b"dialling", b"dialled "  # of equal length


def peer_secret(cluster_key: bytes) -> bytes:
    """From the key that workers and routers hash blocks with: one key is handed out, and serves each purpose apart."""
    return hmac.digest(cluster_key, b"twinring peers", "sha256")


def proof_of(secret: bytes, end: bytes, hello: Hello, nonce: bytes) -> bytes:
    """That this end of the stream knows the secret; nonce is the challenge's."""
    return hmac.digest(secret, end + nonce + encode(hello), "sha256")


def proves(proof: bytes, secret: bytes, end: bytes, hello: Hello, nonce: bytes) -> bool:
    return hmac.compare_digest(proof, proof_of(secret, end, hello, nonce))


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
