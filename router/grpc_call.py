"""Who calls over gRPC, and how a call is told that it ends: metadata in, status codes out."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc

from router.calls import Calls
from router.events import Fail
from router.tenants import Tenant, Unauthenticated


async def authenticate(calls: Calls, context: Any, operators_only: bool = False) -> Tenant:
    """Or the call ends here: UNAUTHENTICATED without a known token, PERMISSION_DENIED with one that may not do this."""
    metadata = dict(context.invocation_metadata() or ())
    try:
        tenant = calls.identify(metadata.get("authorization"))
    except Unauthenticated as error:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
    if operators_only and not tenant.is_operator:
        message = f"tenant {tenant.name} is not an operator's"
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, message)
    return tenant


async def end_call(context: Any, fail: Fail) -> NoReturn:
    """gRPC's own key tells clients when to come back."""
    pushback = (
        () if fail.retry_after_s is None else (("grpc-retry-pushback-ms", str(math.ceil(1000 * fail.retry_after_s))),)
    )
    await context.abort(grpc.StatusCode[fail.code], fail.message, trailing_metadata=pushback)
    raise AssertionError("abort returns by raising")
