"""The first frames of a stream between two workers, whatever it is for: who is there, and that both know the cluster's
secret. Decides what is said before that is proven: a challenge, and nothing else. Knows nothing of what follows."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from kvtransfer.config import TransferConfig
from kvtransfer.counters import TransferCounters
from kvtransfer.handshake import DIALLED, DIALLING, proof_of, proves
from kvtransfer.messages import NONCE_NBYTES, Challenge, Hello, HelloRefused, Proof, Terms
from kvtransfer.peer_channel import ChannelLost, PeerChannel
from protos.types import PeerRef

logger = logging.getLogger("twinring.kvtransfer")


class Greeter:
    """One worker's part in handshakes. Each of them has a nonce of its own at each end."""

    def __init__(
        self,
        me: PeerRef,
        terms: Terms,
        secret: bytes,
        config: TransferConfig,
        judge: Callable[[Hello], HelloRefused | None],
        counters: TransferCounters,
    ) -> None:
        self._me = me
        self._terms = terms
        self._secret = secret
        self._timeout_s = config.connect_timeout_s
        self._judge = judge
        self._counters = counters

    async def greet(self, channel: PeerChannel, peer: PeerRef, beacon: str = "") -> None:
        """The dialling end. The next frame is the answer to it, which may be HelloRefused. Raises ChannelLost."""
        hello = Hello(self._me, peer.incarnation, self._terms, beacon, secrets.token_bytes(NONCE_NBYTES))
        await channel.write(hello)
        challenge = await channel.read(self._timeout_s)
        if not isinstance(challenge, Challenge):
            raise ChannelLost(f"answered a hello by {type(challenge).__name__}")
        if not proves(challenge.proof, self._secret, DIALLED, hello, challenge.nonce):
            raise ChannelLost("it does not know this cluster's secret")
        await channel.write(Proof(proof_of(self._secret, DIALLING, hello, challenge.nonce)))

    async def welcome(self, channel: PeerChannel) -> Hello | None:
        """The dialled end: who is there, or None where it was refused. Raises ChannelLost."""
        hello = await channel.read(self._timeout_s)
        if not isinstance(hello, Hello):
            raise ChannelLost(f"a stream that opens with {type(hello).__name__}")
        nonce = secrets.token_bytes(NONCE_NBYTES)
        await channel.write(Challenge(nonce, proof_of(self._secret, DIALLED, hello, nonce)))
        proof = await channel.read(self._timeout_s)
        is_proven = isinstance(proof, Proof) and proves(proof.proof, self._secret, DIALLING, hello, nonce)
        stranger = HelloRefused("this cluster's secret was not proven", is_final=False)
        if (refusal := self._judge(hello) if is_proven else stranger) is None:
            return hello
        self._counters.num_refused_hellos += 1
        logger.error("refused a stream from %s: %s", hello.sender.worker_id, refusal.reason)
        await channel.write(refusal)
        return None
