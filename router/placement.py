"""Where one attempt runs: who prefills, who decodes, and whether the KV moves between them. Pure: reads the view,
changes nothing there. Which worker prefills is a policy's to say (policies/), which decodes decode_placement.py's."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from router.admission import Refusal, early_refusal
from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.decode_placement import DecodePlacement
from router.placement_view import RequestView
from router.policies.estimates import estimate
from router.policies.make import make_policy
from router.policy import Choice, MostFreeBlocks
from router.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Plan:
    """`decode` is None where the worker that prefills also decodes; decode_reason then says why. The estimates count on
    KV that the worker may pull from `pull_worker_ids`."""

    prefill: WorkerView
    prefill_reason: str
    decode: WorkerView | None
    decode_reason: str
    home_worker_ids: tuple[str, ...] = ()
    pull_worker_ids: tuple[str, ...] = ()  # best first
    returns_to: WorkerView | None = None  # the home that its KV is brought to
    num_predicted_cached_tokens: int = 0
    num_predicted_pulled_tokens: int = 0
    num_prefill_tokens: int = 0  # to compute
    prefill_s: float = 0.0  # what that takes; 0 where no speed is known yet
    ttft_s: float = 0.0
    is_beside: bool = False  # another choice of its call

    @property
    def decoding_worker(self) -> WorkerView:
        return self.decode or self.prefill


class Planner:
    """Asks the policy who prefills, then `decode` who decodes.

    Invariant: of itself it changes only what policies keep from one request to the next (whose turn it is, the state
    of the sampler)."""

    def __init__(self, config: RouterConfig, view: ClusterView) -> None:
        self._config = config
        self._view = view
        self._prefill = make_policy(config.policy, config.ttft_slo_s, config.block_size)
        self.decode = DecodePlacement(config, view)
        self._sampler = Sampler(config.ring_seed)

    def copy(self) -> Planner:
        """One that chooses as this one would next, and leaves this one as it is."""
        planner = Planner(self._config, self._view)
        planner._prefill, planner._sampler = deepcopy((self._prefill, self._sampler))
        planner.decode = self.decode
        return planner

    def plan(
        self, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int, beside: Sequence[str] = ()
    ) -> Plan | None:
        """None where no worker is up. num_remaining_tokens: how many the request may still generate; beside: where
        another choice of the same call runs."""
        request = self._request(links, num_tokens)
        if beside and all(map(self._view.takes_work, beside)):
            return self._plan_beside(request, beside)
        if not self._view.prefill_workers():
            return self._plan_on_decode_worker(request)
        plan = self._plan_prefill(request, self._prefill.place(request))
        plan = self._with_decode(plan, links, num_tokens, num_remaining_tokens)
        return self._plan_local(request, plan) or plan

    def plan_at(
        self, worker_id: str, reason: str, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int
    ) -> Plan:
        """With this worker to prefill."""
        plan = self._plan_prefill(self._request(links, num_tokens), Choice(worker_id, reason))
        return self._with_decode(plan, links, num_tokens, num_remaining_tokens)

    def plan_again(self, plan: Plan, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int) -> Plan:
        """Who decodes is chosen when the request is sent: time has passed since it was placed."""
        is_kept = plan.is_beside and (plan.decode is None or self._view.takes_work(plan.decode.worker_id))
        if is_kept or plan.prefill.worker_id not in self._view.rings.members:
            return plan
        return self._with_decode(plan, links, num_tokens, num_remaining_tokens)

    def other_plans(self, plan: Plan, links: Sequence[bytes], num_tokens: int, within_s: float) -> list[Plan]:
        """Where a request that is queued may move: the rest of its home pair and whoever else the policy allows, less
        those that are busy for within_s already."""
        request = self._request(links, num_tokens)
        others = dict.fromkeys(request.home_pair())
        if self._config.policy.name == "home_pair":
            others |= dict.fromkeys(request.sample(self._config.policy.num_sampled))
        others.pop(plan.prefill.worker_id, None)
        free = [worker_id for worker_id in others if self._view.workers[worker_id].backlog_s(plan.prefill_s) < within_s]
        return [self._plan_prefill(request, Choice(worker_id, "")) for worker_id in free]

    def refusal(self, plan: Plan, priority: int, deadline_s: float | None) -> Refusal | None:
        """Why a new request is not to be taken now, although this is the best place for it."""
        return early_refusal(self._config, plan.ttft_s, priority, deadline_s, plan.prefill, plan.decoding_worker)

    def _request(self, links: Sequence[bytes], num_tokens: int) -> RequestView:
        return RequestView(self._config, self._view, self._sampler, links, num_tokens)

    def _plan_prefill(self, request: RequestView, choice: Choice) -> Plan:
        """Without a word on who decodes."""
        candidate = request.candidate(choice.worker_id)
        sources, num_held_tokens = self._sources(request, choice)
        num_pullable_tokens = max(0, num_held_tokens - candidate.num_cached_tokens)
        pull_s = request.pull_s(choice.worker_id, num_pullable_tokens)
        estimated = estimate(request, candidate, num_pullable_tokens, pull_s)
        num_ready_tokens = candidate.num_cached_tokens + estimated.num_pulled_tokens
        return Plan(
            prefill=self._view.workers[choice.worker_id],
            prefill_reason=choice.reason,
            decode=None,
            decode_reason="",
            home_worker_ids=request.home_pair(),
            # To ask takes time, and a place among those that are served: only where there should be something.
            pull_worker_ids=sources if estimated.num_pulled_tokens else (),
            returns_to=self._returns_to(request, choice.worker_id),
            num_predicted_cached_tokens=candidate.num_cached_tokens,
            num_predicted_pulled_tokens=estimated.num_pulled_tokens,
            num_prefill_tokens=request.num_tokens - num_ready_tokens,
            prefill_s=request.prefill_s(choice.worker_id, num_ready_tokens),
            ttft_s=estimated.ttft_s,
        )

    def _sources(self, request: RequestView, choice: Choice) -> tuple[tuple[str, ...], int]:
        """Whom to pull from, best first, and how many tokens the best is thought to hold: who decoded the answer of the
        turn before holds that, too, unless it was brought home meanwhile; and a home that is on its way out."""
        sources = choice.sources or request.home_pair()
        num_held_tokens = max((request.candidate(one).num_cached_tokens for one in sources), default=0)
        for other in (request.held_by_leaving(), request.answer()):
            if other and other.num_tokens > num_held_tokens and other.worker_id != choice.worker_id:
                sources = (other.worker_id, *(one for one in sources if one != other.worker_id))
                num_held_tokens = other.num_tokens
        return sources, num_held_tokens

    def _returns_to(self, request: RequestView, worker_id: str) -> WorkerView | None:
        """Where it runs away from home: the home that lacks least of it."""
        home = request.home_pair()
        if not (self._config.returns and home) or worker_id in home or self._config.policy.name != "home_pair":
            return None
        return self._view.workers[max(home, key=lambda one: request.candidate(one).num_cached_tokens)]

    def _plan_beside(self, request: RequestView, beside: Sequence[str]) -> Plan:
        reason = "beside the first choice"
        plan = self._plan_prefill(request, Choice(beside[0], reason))
        decode = self._view.workers[beside[1]] if len(beside) > 1 else None
        return replace(plan, decode=decode, decode_reason=reason, is_beside=True)

    def _plan_on_decode_worker(self, request: RequestView) -> Plan | None:
        pool = self._view.decode_workers()[:1]
        if not pool:
            return None
        choice = MostFreeBlocks().choose(request.num_tokens, [request.candidate(pool[0].worker_id)])
        plan = self._plan_prefill(request, replace(choice, reason=f"no prefill worker is up; {choice.reason}"))
        return replace(plan, decode_reason="no prefill worker is up")

    def _plan_local(self, request: RequestView, plan: Plan) -> Plan | None:
        """On the worker that is to decode, where little is left to compute there: no handoff, and not behind what is
        queued for the worker that would prefill."""
        if plan.decode is None or not self._config.max_local_prefill_tokens:
            return None
        reason = self.decode.local_reason(request.candidate(plan.decode.worker_id), request.num_tokens)
        if not reason:
            return None
        local = self._plan_prefill(request, Choice(plan.decode.worker_id, plan.decode_reason))
        return replace(local, decode_reason=reason, returns_to=None)

    def _with_decode(self, plan: Plan, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int) -> Plan:
        decode, reason = self._plan_decode(plan.prefill, links, num_tokens, num_remaining_tokens)
        return replace(plan, decode=decode, decode_reason=reason)

    def _plan_decode(
        self, prefill: WorkerView, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int
    ) -> tuple[WorkerView | None, str]:
        if self._config.mode == "colocated":
            return None, "colocated: every worker serves its requests from end to end"
        if num_remaining_tokens == 1:
            return None, "only 1 token is left to generate, and prefill makes it"
        chosen = self.decode.choose(prefill, links, num_tokens, num_remaining_tokens, refused=())
        return chosen or (None, "no decode worker is up")
