"""Plain HTTP requests to a test's service."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx

TIMEOUT_S = 20.0


async def post(service: Any, path: str, body: object, **options: Any) -> httpx.Response:
    """`body`: bytes, or pieces of them, as they are; all else as JSON."""
    is_raw = isinstance(body, bytes) or hasattr(body, "__aiter__")
    content = {"content": body} if is_raw else {"json": body}
    async with httpx.AsyncClient(base_url=service.http_url, timeout=TIMEOUT_S) as client:
        return await client.post(path, **content, **options)


async def get(service: Any, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=service.http_url, timeout=TIMEOUT_S) as client:
        return await client.get(path, **options)
