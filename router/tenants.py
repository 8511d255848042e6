"""Who may call, and how much: bearer tokens to tenants, and each tenant's limits. Pure; knows no headers but the value
of one, and no clock but what it is told."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """None: no limit."""

    name: str  # in logs and errors
    token_sha256: str  # hex: tokens are 256 random bits, so a plain hash keeps them
    is_operator: bool = False  # may read the cluster's state and metrics, drain and scale
    max_priority: int = 0  # higher ones go ahead of others' requests
    max_concurrent_requests: int | None = None  # several prompts of one HTTP call are several requests
    max_requests_per_minute: float | None = None  # a minute's worth may come at once
    max_tokens_per_minute: float | None = None  # prompt and output

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a tenant's name must not be empty")
        if len(self.token_sha256) != 64 or set(self.token_sha256) - set("0123456789abcdef"):
            raise ValueError(f"token_sha256 of tenant {self.name} must be 64 lower-case hex digits")
        for name in ("max_concurrent_requests", "max_requests_per_minute", "max_tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} of tenant {self.name} must be above 0 and finite, got {value}")


def refuse_repeated(configs: Sequence[TenantConfig]) -> None:
    """ValueError where a name or a token stands for two tenants."""
    names, hashes = [config.name for config in configs], [config.token_sha256 for config in configs]
    for what, values in (("name", names), ("token", hashes)):
        repeated = [name for name, value in zip(names, values, strict=True) if values.count(value) > 1]
        if repeated:
            raise ValueError(f"two tenants have the {what} of {repeated[0]}")


class Unauthenticated(Exception):
    """Says what is wrong with the caller's token, never what the token was."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a call is for. Without configured tenants every caller is the one that has no name and sees everything."""

    name: str = ""
    is_operator: bool = True
    max_priority: int | None = None  # None: any

    @property
    def cache_salt(self) -> bytes:
        """Tenants share no prefix cache: equal prompts have different hashes (and none can be guessed: they are
        keyed)."""
        return self.name.encode()


@dataclass(frozen=True, slots=True)
class OverLimit:
    message: str
    retry_after_s: float


class Bucket:
    """A token bucket that holds a minute's worth and may go into debt: what a call takes is known only at its end.

    Invariant: what is taken in any span of t seconds is at most per_minute * (1 + t / 60), and what the calls that were
    running before it took at their end."""

    def __init__(self, per_minute: float) -> None:
        self._per_minute = per_minute
        self._level = per_minute
        self._filled_at = 0.0

    def wait_s(self, now: float) -> float:
        """Until a call is taken; 0: now."""
        self._fill(now)
        # One unit, or all that a slower bucket can hold, must be there.
        return max(0.0, (min(1.0, self._per_minute) - self._level) * 60 / self._per_minute)

    def take(self, amount: float, now: float) -> None:
        self._fill(now)  # first: what overflowed before cannot pay for this
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._per_minute, self._level + (now - self._filled_at) * self._per_minute / 60)
        self._filled_at = now


class _Quota:
    """One tenant's use against its limits."""

    def __init__(self, config: TenantConfig) -> None:
        self.config = config
        self.num_running = 0
        self.requests = config.max_requests_per_minute and Bucket(config.max_requests_per_minute)
        self.tokens = config.max_tokens_per_minute and Bucket(config.max_tokens_per_minute)


class Tenants:
    """Invariant: num_running of a tenant is the number of its calls between admit and ended."""

    def __init__(self, configs: Sequence[TenantConfig]) -> None:
        refuse_repeated(configs)
        self._quotas = {config.name: _Quota(config) for config in configs}

    def identify(self, authorization: str | None) -> Tenant:
        """From the value of an Authorization header. Unauthenticated where there is no valid token in it."""
        if not self._quotas:
            return Tenant()
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("a bearer token is needed: Authorization: Bearer TOKEN")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found: TenantConfig | None = None
        for quota in self._quotas.values():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(digest, quota.config.token_sha256):
                found = quota.config
        if found is None:
            raise Unauthenticated("the bearer token is not known")
        return Tenant(found.name, found.is_operator, found.max_priority)

    def over(self, tenant: Tenant, now: float) -> OverLimit | None:
        """What a call would be refused for now. Changes nothing."""
        quota = self._quotas.get(tenant.name)
        return None if quota is None else _over(quota, now)

    def admit(self, tenant: Tenant, num_prompt_tokens: int, now: float) -> OverLimit | None:
        """None: the call may start, and `ended` must follow."""
        limit = self.over(tenant, now)
        quota = self._quotas.get(tenant.name)
        if limit is None and quota is not None:
            quota.num_running += 1
            if quota.requests:
                quota.requests.take(1, now)
            if quota.tokens:
                quota.tokens.take(num_prompt_tokens, now)
        return limit

    def ended(self, tenant: Tenant, num_output_tokens: int, now: float) -> None:
        quota = self._quotas.get(tenant.name)
        if quota is None:
            return
        quota.num_running -= 1
        if quota.tokens:
            quota.tokens.take(num_output_tokens, now)


def _over(quota: _Quota, now: float) -> OverLimit | None:
    config = quota.config
    if config.max_concurrent_requests is not None and quota.num_running >= config.max_concurrent_requests:
        message = f"tenant {config.name} has {quota.num_running} requests running, the most that it may have"
        return OverLimit(message, 1.0)
    for bucket, limit, what in (
        (quota.requests, config.max_requests_per_minute, "requests"),
        (quota.tokens, config.max_tokens_per_minute, "tokens"),
    ):
        if bucket and (wait_s := bucket.wait_s(now)) > 0:
            return OverLimit(f"tenant {config.name} is over its limit of {limit:g} {what} a minute", wait_s)
    return None
