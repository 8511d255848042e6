"""Bodies that nobody would send on purpose: each is answered, none by a 500, and nothing of any is left. Repeat one run
with its seed."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx2 as httpx
import pytest

from router.openai.messages import ChatRequest, CompletionRequest, TokenizeRequest
from tests.router.conftest import eventually
from tests.router.test_chat import TEMPLATE, served_with

NUM_BODIES = 1500
PATHS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest, "/tokenize": TokenizeRequest}
GOOD = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/tokenize": {"prompt": "abc"},
}
ODD = [
    None,
    True,
    False,
    0,
    1,
    3,
    -1,
    2**31,
    2**63,
    -(2**70),
    0.5,
    1e308,
    "",
    "a",
    "é\x00😀",
    "</s>",
    "a" * 400,
    [],
    [[]],
]
ODD += [[1, 2], [300], [[1], [2]], ["a", 1], [None], {}, {"a": 1}, {"1": 2}, {"999": 1}, {"include_usage": True}]
ODD += [[{"role": "user"}], [{"role": "user", "content": "x"}] * 3, [{"role": 5, "content": {}}], "echo", "stop"]


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    if depth < 3 and rng.random() < 0.15:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.1:
        return {str(rng.choice(ODD)): odd_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice(ODD)


def odd_body(rng: random.Random, path: str) -> bytes:
    """A good body with some fields made odd; now and then not JSON at all."""
    names = [*PATHS[path].model_fields, "nonsense"]
    body = dict(GOOD[path])
    for name in rng.sample(names, rng.randrange(1, 4)):
        body[name] = odd_value(rng)
    encoded = json.dumps(body).encode()
    return encoded[: rng.randrange(len(encoded))] + rng.randbytes(2) if rng.random() < 0.05 else encoded


@pytest.mark.parametrize("seed", range(3))
async def test_odd_bodies(launch: Any, seed: int) -> None:
    service = await launch("p-0", "d-0", served=served_with(TEMPLATE))
    rng, statuses = random.Random(seed), set()
    async with httpx.AsyncClient(base_url=service.http_url, timeout=20) as client:
        for _ in range(NUM_BODIES):
            path = rng.choice(list(PATHS))
            body = odd_body(rng, path)
            answer = await client.post(path, content=body)
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], body
    assert {200, 400} <= statuses
    await eventually(lambda: service.server._driver.router.num_in_flight == 0)
    assert not service.server._driver._calls
    assert not service.workers["d-0"].generating
