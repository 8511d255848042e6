"""One call to a Ray actor, with a deadline: Ray's own may wait for minutes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def answer(call: Awaitable[Any], timeout_s: float) -> Any:
    """An actor's own error is raised as it was there; Ray's wrapping of it would read as a remote traceback."""
    from ray.exceptions import RayTaskError

    try:
        return await asyncio.wait_for(call, timeout_s)
    except RayTaskError as error:
        raise error.cause from error
