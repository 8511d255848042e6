"""Telling both ends of a handoff about each other, and what happens where a decode worker has no room. Which worker
decodes is decode_placement.py's to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from protos.types import Abort, Handoff, HandoffRefused, Retarget
from router.cluster_view import WorkerView
from router.config import RouterConfig
from router.decode_placement import DecodePlacement
from router.events import Effect, Send
from router.in_flight import Attempt, InFlight


class Handoffs:
    """Keeps nothing: whoever is to decode is in the attempt's plan, and is charged for it in the view."""

    def __init__(self, config: RouterConfig, decode: DecodePlacement, make_transfer_id: Callable[[], bytes]) -> None:
        self._block_size = config.block_size
        self._decode = decode
        self._make_transfer_id = make_transfer_id

    def place(self, in_flight: InFlight, attempt: Attempt, now: float) -> list[Effect]:
        """Charge the worker that will decode; tell it to expect the KV where that is not the one that prefills."""
        plan = attempt.plan
        num_blocks = -(-in_flight.num_tokens // self._block_size)
        plan.decoding_worker.place_to_decode(in_flight.request_id, num_blocks, in_flight)
        if plan.decode is None:
            return []
        handoff = Handoff(attempt.transfer_id, plan.prefill.ref)
        submit = replace(in_flight.submit(attempt, now), handoff_from=handoff)
        return [Send(plan.decode.worker_id, submits=(submit,))]

    def refused(
        self, in_flight: InFlight, attempt: Attempt, view: WorkerView, refusal: HandoffRefused, now: float
    ) -> list[Effect] | None:
        """The decode worker has no room. The prefill worker keeps the KV until it hears where to go. None: the word is
        late."""
        refusing = attempt.plan.decode
        if refusing is None or view is not attempt.plan.prefill or refusing.worker_id in attempt.reported:
            return None
        abort = Send(refusing.worker_id, aborts=(Abort(in_flight.request_id, attempt.number),))
        refusing.note_refused(in_flight.request_id)
        attempt.refused.add(refusing.worker_id)
        return [abort, *self._retarget(in_flight, attempt, f"{refusing.worker_id} refused: {refusal.reason}", now)]

    def _retarget(self, in_flight: InFlight, attempt: Attempt, reason: str, now: float) -> list[Effect]:
        """To another decode worker; where every one has refused, the prefill worker decodes."""
        prefill = attempt.plan.prefill
        chosen = self._decode.choose(
            prefill, in_flight.links, in_flight.num_tokens, in_flight.num_remaining_tokens, attempt.refused
        )
        decode, decode_reason = chosen or (None, "no other decode worker is left")
        attempt.plan = replace(attempt.plan, decode=decode, decode_reason=f"{decode_reason}; {reason}")
        attempt.transfer_id = self._make_transfer_id()
        submit = self.place(in_flight, attempt, now)
        retarget = Retarget(in_flight.request_id, attempt.number, attempt.handoff_to())
        return [*submit, Send(prefill.worker_id, retargets=(retarget,))]
