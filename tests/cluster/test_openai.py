"""OpenAI's API of a real cluster, asked by the real openai client, sync and async: what it says is what gRPC says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI, OpenAI

from cluster.client_types import Message, Sampling
from tests.cluster.server import Server, serving

pytestmark = pytest.mark.ray

PROMPT = "This program is free software"
MODEL = "demo_model"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("openai")) as one:
        yield one


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", timeout=60) as one:
        yield one


def test_a_completion_is_the_one_of_grpc(client: OpenAI, server: Server) -> None:
    sampling = Sampling(max_tokens=24, temperature=0.8, seed=11, n=2, logprobs=2)
    with server.client() as grpc_client:
        expected = grpc_client.choices(PROMPT, sampling)
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0.8, seed=11, n=2, logprobs=2
    )
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    for choice, one in zip(answer.choices, expected, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx([each.logprob for each in one.logprobs], abs=1e-5)
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.text_offset[-1] + len(choice.logprobs.tokens[-1]) == len(choice.text)
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0.8, seed=11, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0].text


async def test_many_chats_at_once(server: Server) -> None:
    """Streams of sixteen, each its own: the text of a chat does not depend on what runs beside it."""
    questions = [f"What is licence number {number}?" for number in range(16)]
    with server.client() as grpc_client:
        sampling = Sampling(max_tokens=16, temperature=0.0)
        expected = [grpc_client.generate([Message("user", question)], sampling).text for question in questions[:2]]
    async with AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", timeout=60) as client:

        async def ask(question: str) -> tuple[str, int]:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                max_completion_tokens=16,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                top_logprobs=1,
            )
            text, num_logprobs, num_tokens = "", 0, 0
            async for chunk in stream:
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    num_logprobs += len(choice.logprobs.content or ()) if choice.logprobs else 0
                num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
            assert num_logprobs == num_tokens
            return text, num_tokens

        answers = await asyncio.gather(*map(ask, questions))
    assert [text for text, _ in answers[:2]] == expected
    assert all(0 < num_tokens <= 16 for _, num_tokens in answers)


def test_the_account_tells_of_the_cache(client: OpenAI) -> None:
    long = "The licenses for most software are designed to take away your freedom. " * 12
    accounts = [
        client.completions.create(
            model=MODEL, prompt=long, max_tokens=4, temperature=0, extra_body={"include_account": True}
        ).model_extra["account"]
        for _ in range(2)
    ]
    assert accounts[0]["num_cached_tokens"] == 0
    assert accounts[1]["num_cached_tokens"] > 0
    assert accounts[1]["prefill_worker"] == accounts[0]["prefill_worker"]
    assert accounts[0]["num_kv_bytes"] > 0


async def test_a_client_that_closes_its_stream(server: Server) -> None:
    """assert_clean, at the end of the server, finds nothing held."""
    async with AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", timeout=60) as client:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        assert (await anext(stream)).choices[0].text is not None
        await stream.close()
    with server.client() as grpc_client:
        async with asyncio.timeout(5):
            while grpc_client.status().num_requests_in_flight:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.02)
