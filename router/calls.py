"""A client's call from its arrival to its last word, whichever protocol it came by. Decides who may call, what is
refused before any worker hears of it, and that nothing of a call is left when it ends."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from array import array
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

from protos.types import GenerateRequest, SamplingParams
from router.call_writer import CallWriter, CutOff
from router.choices import choices_of
from router.config import RouterConfig
from router.detokenizer import TokenText
from router.driver import Driver
from router.events import AbortRequested, Arrived, Fail, RefusedFor
from router.explain import Explanation, explain
from router.metrics import RouterMetrics
from router.prompts import PromptReader, TooManyPrompts
from router.recent_requests import RecentRequests
from router.reply import Reply
from router.served_model import ServedModel
from router.status import ClusterStatus
from router.tenants import Tenant, Tenants, Unauthenticated
from router.text_stream import TextStream
from router.validation import InvalidArgument, Limits, PublicRequest, check_request, to_sampling_params


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a call is for, and what its transport says of it."""

    tenant: Tenant
    deadline_s: float | None = None
    trace_context: str = ""


class Calls:
    def __init__(
        self,
        config: RouterConfig,
        served: ServedModel,
        driver: Driver,
        status: ClusterStatus,
        metrics: RouterMetrics,
        unavailable: Callable[[], str],
    ) -> None:
        """`unavailable` says why no request is taken now; empty: they are taken."""
        self.recent = RecentRequests()
        self._tenants = Tenants(config.tenants)
        self._metrics = metrics
        self._prompts = PromptReader(served, config)
        self._config = config
        self._served = served
        self._token_text = TokenText.of(served)
        self._driver = driver
        self._status = status
        self._unavailable = unavailable

    def close(self) -> None:
        self._prompts.close()

    def identify(self, authorization: str | None) -> Tenant:
        """From the value of an Authorization header; Unauthenticated where it names no tenant."""
        try:
            return self._tenants.identify(authorization)
        except Unauthenticated:
            self._metrics.refused(RefusedFor.UNAUTHENTICATED)
            raise

    async def tokenize(self, public: PublicRequest, tenant: Tenant) -> array[int]:
        """The prompt's token ids, as `read` would have them; the same errors."""
        self._check_tenant(public, tenant)
        try:
            return await self._prompts.token_ids(public)
        except TooManyPrompts as error:
            raise self._refused(public, RefusedFor.TOKENIZER_BUSY, str(error)) from error

    async def read(self, public: PublicRequest, caller: Caller) -> Arrived:
        """InvalidArgument where the request is at fault, CutOff where this server cannot take it now."""
        try:
            return await self._read(public, caller)
        except InvalidArgument:
            self._metrics.refused(RefusedFor.INVALID)
            raise

    async def _read(self, public: PublicRequest, caller: Caller) -> Arrived:
        reason = self._unavailable()
        if reason:
            raise self._refused(public, RefusedFor.NOT_READY, reason, code="UNAVAILABLE")
        served = self._served
        limits = Limits(served.max_model_len, self._status.max_kv_tokens(), served.vocab_size, served.eos_token_ids)
        check_request(public, limits, self._config)
        token_ids = await self.tokenize(public, caller.tenant)
        sampling_params = to_sampling_params(public, token_ids, limits, draw_seed=lambda: secrets.randbits(63))
        if self._text(public).matched_stop is not None:
            message = "the output had ended, with a stop string"
            raise InvalidArgument("output_token_ids", len(public.output_token_ids), message)
        request = _internal_request(public, token_ids, sampling_params, caller)
        return Arrived(request, self._prompts.links(token_ids, caller.tenant.cache_salt))

    def _check_tenant(self, public: PublicRequest, tenant: Tenant) -> None:
        """Before there is any work with it; `admit` counts it, later."""
        over = self._tenants.over(tenant, time.monotonic())
        if over is not None:
            raise self._refused(public, RefusedFor.TENANT_LIMIT, over.message, over.retry_after_s)
        if tenant.max_priority is not None and public.priority > tenant.max_priority:
            message = f"tenant {tenant.name} may have at most {tenant.max_priority}"
            raise InvalidArgument("priority", public.priority, message)

    def _refused(
        self,
        public: PublicRequest,
        reason: RefusedFor,
        message: str,
        retry_after_s: float = 1.0,
        code: str = "RESOURCE_EXHAUSTED",
    ) -> CutOff:
        self._metrics.refused(reason)
        return CutOff(Fail(public.request_id, code, message, retry_after_s, reason))

    async def run(
        self, public: PublicRequest, arrived: Arrived, stream: bool, tenant: Tenant, writer: CallWriter
    ) -> None:
        """All choices to their last word, or to the first failure: then the writer has said so, and CutOff comes. A
        call that is cancelled stops its workers at once."""
        choices = [replace(arrived, request=choice) for choice in choices_of(arrived.request, public.n)]
        replies = [
            Reply(self._config, self._driver, self.recent, choice, self._text(public), stream, writer)
            for choice in choices
        ]
        over = self._tenants.admit(tenant, arrived.request.num_prompt_tokens, time.monotonic())
        if over is not None:
            refused = self._refused(public, RefusedFor.TENANT_LIMIT, over.message, over.retry_after_s)
            await writer.cut_off(refused.fail)
        try:
            calls = self._driver.open_calls(choices)
            try:
                await run_all(reply.run(call) for reply, call in zip(replies, calls, strict=True))
            finally:  # also where the client has cancelled
                self._driver.close_calls(calls)
        finally:
            num_output_tokens = sum(reply.num_output_tokens for reply in replies)
            self._tenants.ended(tenant, num_output_tokens, time.monotonic())

    def abort(self, tenant: Tenant, client_request_id: str) -> bool:
        """False: the tenant has no such request in flight."""
        request_ids = self._driver.router.find(tenant.name, client_request_id)
        for request_id in request_ids:
            self._driver.feed(AbortRequested(request_id))
        return bool(request_ids)

    @property
    def view_version(self) -> int:
        return self._status.view_version

    def explain(self, arrived: Arrived) -> Explanation:
        request = arrived.request
        return explain(
            self._config,
            self._driver.router.view,
            self._driver.router.planner,
            arrived.links,
            len(request.token_ids),
            request.sampling_params.max_tokens - request.num_committed_tokens,
            request.priority,
            request.deadline_s,
        )

    def _text(self, public: PublicRequest) -> TextStream:
        """The text of a reply, which goes on behind the output that the caller has."""
        text = TextStream(self._token_text, public.stop, public.min_tokens, public.include_stop)
        text.push(public.output_token_ids)
        return text


def _internal_request(
    public: PublicRequest, token_ids: array[int], sampling_params: SamplingParams, caller: Caller
) -> GenerateRequest:
    request_id = uuid.uuid4().hex
    return GenerateRequest(
        request_id=request_id,
        client_request_id=public.request_id or f"req-{request_id}",
        attempt=0,
        token_ids=token_ids + array("i", public.output_token_ids),
        num_prompt_tokens=len(token_ids),
        sampling_params=sampling_params,
        tenant=caller.tenant.name,
        cache_salt=caller.tenant.cache_salt,
        priority=public.priority,
        deadline_s=caller.deadline_s,
        trace_context=caller.trace_context,
    )


async def run_all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """To the end of all of them, or of the first that fails: then the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
