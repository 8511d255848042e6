"""Tokens and limits of tenants, without a server."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.tenants import Bucket, Tenant, TenantConfig, Tenants, Unauthenticated

EPSILON = 1e-6


def tenant_config(name: str, token: str = "", **limits: float | bool | None) -> TenantConfig:
    digest = hashlib.sha256((token or f"token-of-{name}").encode()).hexdigest()
    return TenantConfig(name, digest, **limits)  # type: ignore[arg-type]


# --- tokens -------------------------------------------------------------------------------------------------------


def test_a_token_is_its_tenant() -> None:
    tenants = Tenants([tenant_config("ann", is_operator=True, max_priority=3), tenant_config("bob")])
    assert tenants.identify("Bearer token-of-ann") == Tenant("ann", True, 3)
    assert tenants.identify("bearer   token-of-bob ") == Tenant("bob", False, 0)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "token-of-ann",
        "Basic token-of-ann",
        "Bearer token-of-an",
        "Bearer token-of-ann2",
        "Bearer Token-of-ann",
        "Bearer token-of-ann token-of-ann",
        "Bearer ann",
        f"Bearer {hashlib.sha256(b'token-of-ann').hexdigest()}",  # whoever has read the file has no token yet
        "Bearer t\u00f6ken",
    ],
)
def test_no_other_header_is_anybody(authorization: str | None) -> None:
    tenants = Tenants([tenant_config("ann")])
    with pytest.raises(Unauthenticated) as caught:
        tenants.identify(authorization)
    assert "oken-of" not in str(caught.value)


@given(st.text())
def test_a_guess_is_nobody(guess: str) -> None:
    with pytest.raises(Unauthenticated):
        Tenants([tenant_config("ann", "\x00 no header has this")]).identify(f"Bearer {guess}")


def test_without_tenants_everybody_is_the_operator() -> None:
    tenant = Tenants([]).identify("Bearer anything")
    assert (tenant.is_operator, tenant.max_priority, tenant.cache_salt) == (True, None, b"")


def test_each_tenant_has_a_cache_of_its_own() -> None:
    assert len({Tenant(name).cache_salt for name in ("", "ann", "bob", "a", "n")}) == 5


@pytest.mark.parametrize(
    ("name", "token", "words"), [("ann", "other", "two tenants have the name of ann"), ("bob", "t", "the token of ann")]
)
def test_a_name_and_a_token_stand_for_one_tenant(name: str, token: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tenants([tenant_config("ann", "t"), tenant_config(name, token)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"token_sha256": "A" * 64}, "token_sha256 of tenant ann must be 64 lower-case hex digits"),
        ({"token_sha256": "a" * 63}, "token_sha256 of tenant ann"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests of tenant ann must be above 0 and finite, got 0"),
        ({"max_requests_per_minute": -1.0}, "max_requests_per_minute of tenant ann"),
        ({"max_tokens_per_minute": float("nan")}, "max_tokens_per_minute of tenant ann"),
        ({"max_tokens_per_minute": float("inf")}, "max_tokens_per_minute of tenant ann"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(tenant_config("ann"), **fields)  # type: ignore[arg-type]


def test_a_wrong_hash_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="token_sha256") as caught:
        TenantConfig("ann", "a-plain-token")
    assert "a-plain-token" not in str(caught.value)


# --- buckets ------------------------------------------------------------------------------------------------------

Calls = list[tuple[float, float]]  # (seconds since the last one, what it takes)
RATES = st.floats(0.1, 1000)


def calls_of(amounts: st.SearchStrategy[float]) -> st.SearchStrategy[Calls]:
    return st.lists(st.tuples(st.floats(0, 90), amounts), max_size=40)


@given(per_minute=RATES, calls=calls_of(st.just(1.0)))
def test_no_span_has_more_calls_than_its_minutes_and_a_burst(per_minute: float, calls: Calls) -> None:
    bucket, now, taken = Bucket(per_minute), 1000.0, []
    for pause_s, amount in calls:
        now += pause_s
        if bucket.wait_s(now) == 0:
            bucket.take(amount, now)
            taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            burst = max(1.0, per_minute)  # a bucket that holds less than one call lets one through, in debt
            span_s = taken[last] - taken[first]
            assert last - first + 1 <= burst + per_minute * span_s / 60 + EPSILON


@given(per_minute=RATES, calls=calls_of(st.floats(0, 5000)))
def test_what_is_taken_is_paid_for(per_minute: float, calls: Calls) -> None:
    """Of any run of calls, all but the last one, whose size nobody knew, were within the limit."""
    bucket, now, taken = Bucket(per_minute), 1000.0, []
    for pause_s, amount in calls:
        now += pause_s
        if bucket.wait_s(now) == 0:
            bucket.take(amount, now)
            taken.append((now, amount))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            total = sum(amount for _, amount in taken[first:last])
            assert total <= per_minute * (1 + (taken[last][0] - taken[first][0]) / 60) + EPSILON


@given(per_minute=RATES, debt=st.floats(0, 5000))
def test_a_call_is_taken_after_the_wait_and_not_before(per_minute: float, debt: float) -> None:
    bucket = Bucket(per_minute)
    assert bucket.wait_s(1000.0) == 0
    bucket.take(per_minute + debt, 1000.0)
    wait_s = bucket.wait_s(1000.0)
    assert wait_s >= debt * 60 / per_minute - EPSILON
    assert bucket.wait_s(1000.0 + wait_s * 0.99) > 0
    assert bucket.wait_s(1000.0 + wait_s + 0.01) == 0


def test_what_has_overflowed_does_not_pay_for_later() -> None:
    bucket = Bucket(60)
    assert bucket.wait_s(0.0) == 0
    bucket.take(100, 600.0)  # at the end of a call of ten minutes
    assert bucket.wait_s(600.0) == pytest.approx(41)


# --- tenants ------------------------------------------------------------------------------------------------------


def test_a_tenant_does_not_use_anothers_limit() -> None:
    tenants = Tenants(
        [tenant_config("ann", max_requests_per_minute=1), tenant_config("bob", max_requests_per_minute=1)]
    )
    ann, bob = Tenant("ann"), Tenant("bob")
    assert tenants.admit(ann, 1, 0.0) is None
    over = tenants.admit(ann, 1, 0.0)
    assert over is not None
    assert (over.message, over.retry_after_s) == ("tenant ann is over its limit of 1 requests a minute", 60.0)
    assert tenants.admit(bob, 1, 0.0) is None


def test_output_counts_when_the_call_has_ended() -> None:
    tenants, ann = Tenants([tenant_config("ann", max_tokens_per_minute=60)]), Tenant("ann")
    assert tenants.admit(ann, 20, 0.0) is None
    assert tenants.over(ann, 0.0) is None
    tenants.ended(ann, 50, 0.0)
    over = tenants.over(ann, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(11)  # 10 tokens of debt, and one to go on with


def test_a_refused_call_takes_nothing() -> None:
    config = tenant_config("ann", max_concurrent_requests=1, max_requests_per_minute=2, max_tokens_per_minute=100)
    tenants, ann = Tenants([config]), Tenant("ann")
    assert tenants.admit(ann, 10, 0.0) is None
    for _ in range(5):
        assert tenants.admit(ann, 10, 0.0) is not None
    tenants.ended(ann, 0, 0.0)
    assert tenants.admit(ann, 10, 0.0) is None


class Concurrency(RuleBasedStateMachine):
    """As many calls as the limit says, whatever order they come and end in."""

    @initialize(limit=st.integers(1, 4))
    def start(self, limit: int) -> None:
        self.limit = limit
        self.tenants = Tenants([tenant_config("ann", max_concurrent_requests=limit)])
        self.num_running = 0

    @rule()
    def arrive(self) -> None:
        is_taken = self.tenants.admit(Tenant("ann"), 5, 0.0) is None
        assert is_taken == (self.num_running < self.limit)
        self.num_running += is_taken

    @precondition(lambda self: self.num_running)
    @rule(num_output_tokens=st.integers(0, 100))
    def end(self, num_output_tokens: int) -> None:
        self.tenants.ended(Tenant("ann"), num_output_tokens, 0.0)
        self.num_running -= 1

    @invariant()
    def is_full_only_at_its_limit(self) -> None:
        if hasattr(self, "tenants"):
            assert (self.tenants.over(Tenant("ann"), 0.0) is not None) == (self.num_running == self.limit)


TestConcurrency = Concurrency.TestCase
