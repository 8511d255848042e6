"""What every HTTP request is asked first: who sends it, and how much."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from router.calls import Calls
from router.openai.errors import ApiError
from router.tenants import Tenant, Unauthenticated


def authenticate(calls: Calls, request: Request, operators_only: bool = False) -> Tenant:
    """ApiError 401 without a known token, 403 with one that may not do this."""
    try:
        tenant = calls.identify(request.headers.get("authorization"))
    except Unauthenticated as error:
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, "authentication_error", "invalid_api_key", str(error), headers=headers) from error
    if operators_only and not tenant.is_operator:
        raise ApiError(403, "permission_error", "not_an_operator", f"tenant {tenant.name} is not an operator's")
    return tenant


async def body_of(request: Request, max_nbytes: int, timeout_s: float) -> bytes:
    """ApiError 413 as soon as it is known that the body is too large, 408 where it takes longer than timeout_s."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_nbytes:
        raise _too_large(int(declared), max_nbytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > max_nbytes:
                    raise _too_large(len(body), max_nbytes)
    except TimeoutError as error:
        message = f"the body was not there within {timeout_s:g} s"
        raise ApiError(408, "invalid_request_error", "request_timeout", message) from error
    except ClientDisconnect as error:
        raise ApiError(400, "invalid_request_error", "incomplete_body", "the body ended early") from error
    return bytes(body)


def _too_large(num_bytes: int, max_nbytes: int) -> ApiError:
    message = f"body: must have at most {max_nbytes} bytes, got {num_bytes} or more"
    return ApiError(413, "invalid_request_error", "request_too_large", message)
