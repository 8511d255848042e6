"""Where one attempt runs: who prefills, who decodes, and whether the KV moves between them. Pure: reads the view,
changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from router.admission import Refusal, early_refusal
from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.policy import Choice, DualMap, LeastPending, MostFreeBlocks, Policy


@dataclass(frozen=True, slots=True)
class Plan:
    """`decode` is None where the worker that prefills also decodes; decode_reason then says why."""

    prefill: WorkerView
    prefill_reason: str
    decode: WorkerView | None
    decode_reason: str
    home_worker_ids: tuple[str, ...] = ()
    num_predicted_cached_tokens: int = 0

    @property
    def decoding_worker(self) -> WorkerView:
        return self.decode or self.prefill


class Planner:
    """Weighs the home pair. The other choices are the head of a ranking: the view keeps workers in the order of the
    policy that would choose among them."""

    def __init__(self, config: RouterConfig, view: ClusterView) -> None:
        self._config = config
        self._view = view
        self._with_home: Policy = DualMap(config.ttft_slo_s)
        self._without_home: Policy = LeastPending()
        self._decode: Policy = MostFreeBlocks()

    def plan(
        self, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int, beside: Sequence[str] = ()
    ) -> Plan | None:
        """None where no worker is up. num_remaining_tokens: how many the request may still generate; beside: where
        another choice of the same call runs."""
        if beside and all(worker_id in self._view.workers for worker_id in beside):
            return self._plan_beside(links, num_tokens, beside)
        if not self._view.prefill_workers():
            return self._plan_on_decode_worker(links, num_tokens)
        home = self._view.home_worker_ids(links)
        pool = [self._view.workers[worker_id] for worker_id in home] or self._view.prefill_workers()[:1]
        policy = self._with_home if home else self._without_home
        prefill, reason = self._choose(policy, pool, links, num_tokens)
        decode, decode_reason = self._plan_decode(prefill, links, num_tokens, num_remaining_tokens)
        num_cached_tokens = self._view.candidate(prefill, links, num_tokens).num_cached_tokens
        return Plan(prefill, reason, decode, decode_reason, home, num_cached_tokens)

    def refusal(
        self, plan: Plan, links: Sequence[bytes], num_tokens: int, priority: int, deadline_s: float | None
    ) -> Refusal | None:
        """Why a new request is not to be taken now, although this is the best place for it."""
        prefill, decoding = (
            self._view.candidate(view, links, num_tokens) for view in (plan.prefill, plan.decoding_worker)
        )
        return early_refusal(self._config, num_tokens, priority, deadline_s, prefill, decoding)

    def choose_decode(
        self, prefill: WorkerView, links: Sequence[bytes], num_tokens: int, refused: Collection[str]
    ) -> tuple[WorkerView, str] | None:
        """A decode worker that has not refused this attempt; one that `prefill` has a link to, where there is one."""
        roomiest: WorkerView | None = None
        for view in self._view.decode_workers():
            if view.worker_id in refused:
                continue
            if view.worker_id in prefill.warm_links:
                roomiest = view
                break
            roomiest = roomiest or view
        return self._choose(self._decode, [roomiest], links, num_tokens) if roomiest else None

    def _plan_beside(self, links: Sequence[bytes], num_tokens: int, beside: Sequence[str]) -> Plan:
        prefill, *others = (self._view.workers[worker_id] for worker_id in beside)
        num_cached_tokens = self._view.candidate(prefill, links, num_tokens).num_cached_tokens
        home, reason = self._view.home_worker_ids(links), "beside the first choice"
        return Plan(prefill, reason, others[0] if others else None, reason, home, num_cached_tokens)

    def _plan_decode(
        self, prefill: WorkerView, links: Sequence[bytes], num_tokens: int, num_remaining_tokens: int
    ) -> tuple[WorkerView | None, str]:
        if self._config.mode == "colocated":
            return None, "colocated: every worker serves its requests from end to end"
        if num_remaining_tokens == 1:
            return None, "only 1 token is left to generate, and prefill makes it"
        chosen = self.choose_decode(prefill, links, num_tokens, refused=())
        return chosen or (None, "no decode worker is up")

    def _plan_on_decode_worker(self, links: Sequence[bytes], num_tokens: int) -> Plan | None:
        pool = self._view.decode_workers()[:1]
        if not pool:
            return None
        worker, reason = self._choose(self._decode, pool, links, num_tokens)
        return Plan(worker, f"no prefill worker is up; {reason}", None, "no prefill worker is up")

    def _choose(
        self, policy: Policy, pool: Sequence[WorkerView], links: Sequence[bytes], num_tokens: int
    ) -> tuple[WorkerView, str]:
        choice: Choice = policy.choose(num_tokens, [self._view.candidate(view, links, num_tokens) for view in pool])
        return self._view.workers[choice.worker_id], choice.reason
