"""OpenAI's API over real HTTP, asked by the real openai client, before fake workers that echo the prompt."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.router.answers import ids
from tests.router.conftest import eventually, with_fields
from tests.router.http_client import get, post
from tests.router.test_chat import TEMPLATE, served_with
from tests.router.tokenizers_for_tests import EOS_TOKEN_ID

CHAT = served_with(TEMPLATE)
QUESTION = [{"role": "user", "content": "hé"}]
RENDERED = "[user]hé</s>[answer]"  # which the echo repeats up to </s>


def events_of(body: str) -> list[str]:
    """The data of each server-sent event."""
    assert body.endswith("\n\n")
    lines = body.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines), lines
    return [line.removeprefix("data: ") for line in lines]


def listener_of(service: Any) -> Any:
    """Accepted sockets have its options."""
    (listening,) = service.server._http._server.servers
    (listener,) = listening.sockets
    return listener


async def error_of(service: Any, path: str, body: object) -> tuple[int, dict[str, Any]]:
    answer = await post(service, path, body)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error


# --- answers ------------------------------------------------------------------------------------------------------


async def test_a_chat_whole_and_streamed(launch: Any) -> None:
    service = await launch("p-0", "d-0", served=CHAT, token_s=0.005)
    client = service.openai()
    whole = await client.chat.completions.create(model="echo", messages=QUESTION, temperature=0)
    choice = whole.choices[0]
    assert choice.message.content == "[user]hé"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids("[user]hé")) + 1 + len(ids("[answer]"))
    assert whole.usage.completion_tokens == len(ids("[user]hé")) + 1  # and the token that stops
    assert whole.id.startswith("chatcmpl-")
    assert whole.model == "echo"

    stream = await client.chat.completions.create(
        model="echo", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "[user]hé"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert len(chunks) > 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_a_developers_message_is_a_systems_and_parts_are_joined(launch: Any) -> None:
    service = await launch("p-0", "d-0", served=CHAT)
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    answer = await post(service, "/tokenize", {"messages": messages})
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert answer.json()["tokens"] == (await post(service, "/tokenize", {"messages": plain})).json()["tokens"]


@pytest.mark.parametrize(
    ("prompt", "text"), [("abc", "abcabc"), (ids("abc"), "abcabc"), ([ids("abc")], "abcabc"), (["abc"], "abcabc")]
)
async def test_a_completion_of_every_kind_of_prompt(launch: Any, prompt: Any, text: str) -> None:
    service = await launch("p-0", "d-0")
    answer = await service.openai().completions.create(model="echo", prompt=prompt, max_tokens=6)
    assert [choice.text for choice in answer.choices] == [text]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)


async def test_a_completion_has_sixteen_tokens_where_nothing_is_said(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    answer = await service.openai().completions.create(model="echo", prompt="abc")
    assert answer.choices[0].text == "abcabcabcabcabca"


async def test_several_prompts_times_n_in_order(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.002)
    client = service.openai()
    prompts = ["one", "two", "drei"]
    answer = await client.completions.create(model="echo", prompt=prompts, n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two", "dre", "dre"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 18)  # each prompt once

    stream = await client.completions.create(
        model="echo", prompt=prompts, n=2, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = dict.fromkeys(range(6), ""), None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == ["one", "one", "two", "two", "dre", "dre"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 18)


@pytest.mark.parametrize("stop", ["END", ["xyz", "END"]])
async def test_a_stop_string(launch: Any, stop: Any) -> None:
    service = await launch("p-0", "d-0")
    answer = await service.openai().completions.create(model="echo", prompt="some END and", max_tokens=100, stop=stop)
    assert answer.choices[0].text == "some "
    assert answer.choices[0].finish_reason == "stop"
    kept = await post(
        service,
        "/v1/completions",
        {"prompt": "some END and", "max_tokens": 100, "stop": stop, "include_stop_str_in_output": True},
    )
    assert kept.json()["choices"][0]["text"] == "some END"


async def test_sampling_reaches_the_workers(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    await service.openai().completions.create(
        model="echo",
        prompt="abc",
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        seed=-3,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"7": -2},
        logprobs=2,
        extra_body={
            "top_k": -1,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "priority": 4,
        },
    )
    request = next(submit for command in service.workers["p-0"].commands for submit in command.submits)
    params = request.sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.25, 0, -3)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.5, -1, ((7, -2),))
    assert (params.min_p, params.repetition_penalty, params.min_tokens) == (0.125, 1.5, 2)
    assert (params.max_tokens, params.num_logprobs) == (5, 2)
    assert params.stop_token_ids == (9,)
    assert EOS_TOKEN_ID not in params.stop_token_ids
    assert request.priority == 4


async def test_the_account_on_demand(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    whole = await post(service, "/v1/completions", {"prompt": "abc", "max_tokens": 4, "include_account": True})
    account = whole.json()["account"]
    assert (account["prefill_worker"], account["decode_worker"], account["mode"]) == ("p-0", "d-0", "disaggregated")
    assert account["num_kv_bytes"] == 100
    two = await post(service, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "include_account": True})
    assert [one["prefill_worker"] for one in two.json()["accounts"]] == ["p-0", "p-0"]
    streamed = await post(
        service, "/v1/completions", {"prompt": "abc", "max_tokens": 4, "include_account": True, "stream": True}
    )
    *_, last, done = events_of(streamed.text)
    assert json.loads(last)["account"]["prefill_worker"] == "p-0"
    assert json.loads(last)["choices"] == []
    assert done == "[DONE]"
    assert "account" not in (await post(service, "/v1/completions", {"prompt": "abc", "max_tokens": 4})).json()


async def test_usage_with_every_chunk(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.005)
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await post(
        service, "/v1/completions", {"prompt": "abc", "max_tokens": 4, "stream": True, "stream_options": options}
    )
    usages = [json.loads(event)["usage"] for event in events_of(answer.text)[:-1]]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == 4


async def test_models_tokens_version_and_health(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    client = service.openai()
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["echo"]
    assert (await client.models.retrieve("echo")).id == "echo"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        await client.models.retrieve("other/one")
    tokens = (await post(service, "/tokenize", {"prompt": "héllo"})).json()
    assert tokens == {"count": 6, "max_model_len": 200, "tokens": ids("héllo")}
    assert (await get(service, "/health")).json() == {"status": "ok"}
    assert (await get(service, "/ready")).status_code == 200
    assert (await get(service, "/version")).json().keys() == {"version"}
    assert b"twinring_requests_total" in (await get(service, "/metrics")).content


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "a", "temperature": -1}, "temperature", "must be finite and at least 0, got -1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "'hot'"),
        ({"prompt": "a", "top_p": 2}, "top_p", "must be in (0, 1], got 2"),
        ({"prompt": "a", "n": 17}, "n", "must be in [1, 16], got 17"),
        ({"prompt": ["a"] * 20, "n": 16}, "n", "prompts times n must be at most 128"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "must be at least 1, got 0"),
        ({"prompt": "a", "seed": 2**63}, "seed", "got 9223372036854775808"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop[1]", "must not be empty, got ''"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "keys must be token ids, got 'x'"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "must be in [0, 20], got 21"),
        ({"prompt": [1, 300]}, "prompt[1]", "must be a token id in [0, 257), got 300"),
        ({"prompt": []}, "prompt", "the prompt must have at least one token, got 0"),
        ({"prompt": 7}, "prompt", "got 7"),
        ({"prompt": "a", "best_of": 3}, "best_of", "must be n, 1, or not set, got 3"),
        ({"prompt": "a", "echo": True}, "echo", "got True"),
        ({"prompt": "a", "stream": "yes"}, "stream", "got 'yes'"),
        ({"prompt": "a", "temprature": 1}, "temprature", "is not a parameter of this server, got 1"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x", "is not a parameter"),
        ({}, "prompt", "must be set"),
        ([1], "body", "[1]"),
    ],
)
async def test_a_completion_is_refused_by_the_name_of_the_field(
    launch: Any, body: object, param: str, words: str
) -> None:
    service = await launch("p-0", "d-0")
    status, error = await error_of(service, "/v1/completions", body)
    assert status == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": QUESTION, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": QUESTION, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": QUESTION, "response_format": {"type": "json_object"}}, "response_format.type"),
        ({"messages": QUESTION, "max_completion_tokens": 0}, "max_tokens"),
    ],
)
async def test_a_chat_is_refused_by_the_name_of_the_field(launch: Any, fields: dict[str, Any], param: str) -> None:
    service = await launch("p-0", "d-0", served=CHAT)
    status, error = await error_of(service, "/v1/chat/completions", fields)
    assert status == 400, error
    assert error["param"].startswith(param), error


@pytest.mark.parametrize("body", [{"prompt": "x" * 300, "max_tokens": 1}, {"prompt": "x", "max_tokens": 300}])
async def test_what_does_not_fit_the_context_has_its_own_code(launch: Any, body: object) -> None:
    service = await launch("p-0", "d-0")
    status, error = await error_of(service, "/v1/completions", body)
    assert (status, error["code"]) == (400, "context_length_exceeded")


async def test_a_body_that_is_no_json_or_too_large(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_fields(max_message_bytes=1000))
    status, error = await error_of(service, "/v1/completions", b'{"prompt": "a')
    assert (status, error["param"]) == (400, "body")
    status, error = await error_of(service, "/v1/completions", {"prompt": "x" * 1000})
    assert (status, error["code"]) == (413, "request_too_large")

    async def pieces() -> Any:
        for _ in range(11):
            yield b"x" * 100

    answer = await post(service, "/v1/completions", pieces())  # of a length that is not told
    assert answer.status_code == 413


async def test_a_body_that_does_not_come(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_fields(read_timeout_s=0.2))
    reader, writer = await asyncio.open_connection("127.0.0.1", service.server.http_port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert b"408" in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_unknown_models_and_routes(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    client = service.openai()
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here, only 'echo' is") as caught:
        await client.completions.create(model="gpt", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="it has no embeddings to give"):
        await client.embeddings.create(model="echo", input="a")
    answer = await get(service, "/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "there is nothing at /v1/nothing")
    answer = await get(service, "/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_not_ready_and_overloaded_say_when_to_come_back(launch: Any) -> None:
    service = await launch()
    answer = await post(service, "/v1/completions", {"prompt": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (await get(service, "/ready")).status_code == 503
    assert (await get(service, "/health")).status_code == 200

    full = await launch("p-0", "d-0", config=with_fields(max_in_flight=1), token_s=0.05)
    client = full.openai()
    running = asyncio.create_task(client.completions.create(model="echo", prompt="abc", max_tokens=100))
    await eventually(lambda: full.server._driver.router.num_in_flight == 1)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="echo", prompt="abc")
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.type == "rate_limit_error"
    running.cancel()
    await eventually(lambda: full.server._driver.router.num_in_flight == 0)


async def test_a_short_answer_waits_for_no_acknowledgement(launch: Any) -> None:
    """Accepted sockets have it from the listener. Without it each answer on a kept connection takes 40 ms more."""
    service = await launch("p-0", "d-0")
    assert listener_of(service).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- in mid-stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_stops_its_workers(launch: Any, stream: bool) -> None:
    service = await launch("p-0", "d-0", token_s=0.02)
    body = json.dumps({"prompt": "abc", "max_tokens": 150, "stream": stream, "n": 2}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", service.server.http_port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    if stream:
        assert b"200" in await reader.readline()
    await eventually(lambda: len(service.workers["d-0"].generating) == 2)
    writer.transport.abort()
    await eventually(lambda: not service.workers["d-0"].generating, timeout_s=1.0)
    assert service.server._driver.router.num_in_flight == 0


async def test_a_failure_behind_the_first_chunk_is_the_last_event(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.02, config=with_fields(max_attempts=1))
    stream = await service.openai().completions.create(model="echo", prompt="abc", max_tokens=150, stream=True)
    assert (await anext(stream)).choices[0].text
    await service.workers["d-0"].kill()
    with pytest.raises(openai.APIError, match="1 attempts failed"):
        [chunk async for chunk in stream]


async def test_a_client_that_does_not_read_is_cut_off(launch: Any) -> None:
    served = replace(served_with(None), max_model_len=60000)
    service = await launch(
        "p-0", "d-0", served=served, config=with_fields(write_timeout_s=0.3, max_output_buffer_tokens=200)
    )
    for worker in service.workers.values():
        worker.num_blocks = 20000
    await asyncio.sleep(0.3)  # the next heartbeat tells of the blocks
    listener_of(service).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or megabytes fit into the kernel
    body = json.dumps({"prompt": "abc", "max_tokens": 50000, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", service.server.http_port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        connection.sendall(body)
        await eventually(lambda: service.server._driver.router.num_in_flight == 1)
        await eventually(lambda: service.server._driver.router.num_in_flight == 0)
    await eventually(lambda: not service.workers["d-0"].generating)
