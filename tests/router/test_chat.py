"""Chats: rendered by the model's own template, refused by message, read aside where they are long."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from router.chat import check_messages, render
from router.validation import ChatMessage, InvalidArgument
from tests.router.answers import ids, sampling, text_of, tokens_of
from tests.router.conftest import SERVED, eventually
from tests.router.tokenizers_for_tests import byte_level
from tests.tiny_models import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


def served_with(template: str | None, **fields: Any) -> Any:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return replace(SERVED, tokenizer=tokenizer, **fields)


def chat(*turns: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in turns])


# --- refusals -----------------------------------------------------------------------------------------------------

GOOD = ChatMessage("user", "hi")


@pytest.mark.parametrize(
    ("messages", "has_template", "message"),
    [
        ([], True, "chat.messages: must have at least one message, got 0"),
        (
            [GOOD, GOOD, ChatMessage("robot", "x")],
            True,
            "chat.messages[2].role: must be one of system, user, assistant, tool, got 'robot'",
        ),
        ([GOOD, ChatMessage("assistant", "")], True, "chat.messages[1].content: must not be empty, got ''"),
        ([GOOD], False, "chat: the model has no chat template; send text or token ids, got 1"),
    ],
)
def test_a_refusal_names_the_message(messages: list[ChatMessage], has_template: bool, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_messages(messages, has_template)
    assert str(caught.value) == message


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_every_role_is_taken(role: str) -> None:
    check_messages([ChatMessage(role, "x")], has_template=True)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_raises_is_named(template: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match="the model's chat template refuses") as caught:
        render([ChatMessage("tool", "x"), GOOD], served_with(template).render_chat)
    assert words in str(caught.value)
    assert str(caught.value).endswith("got 'tool, user'")


async def test_refusals_reach_the_client(launch: Any) -> None:
    service = await launch("p-0", "d-0", served=served_with(TEMPLATE))
    for turns, message in [
        ([("user", "a"), ("robot", "b")], "chat.messages[1].role: must be one of"),
        ([], "chat.messages: must have at least one message, got 0"),
        ([("user", "x" * 190)], "chat: the prompt must have fewer tokens than max_model_len 200, got 205"),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.generate(chat=chat(*turns))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in caught.value.details()


async def test_a_model_without_a_template_says_so(launch: Any) -> None:
    service = await launch("p-0", "d-0", served=served_with(None))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.generate(chat=chat(("user", "hi")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "has no chat template" in caught.value.details()


# --- prompts ------------------------------------------------------------------------------------------------------


async def test_the_prompt_is_what_the_template_makes_of_the_messages(launch: Any) -> None:
    service = await launch("p-0", "d-0", served=served_with(TEMPLATE))
    rendered = "[system]Be terse.</s>[user]héllo</s>[answer]"
    responses = await service.generate(
        chat=chat(("system", "Be terse."), ("user", "héllo")), sampling_params=sampling(max_tokens=60, ignore_eos=True)
    )
    prompt = ids(rendered)
    assert responses[-1].complete.prompt_tokens == len(prompt)
    assert tokens_of(responses)[: len(prompt)] == prompt  # the fake workers echo


def test_special_tokens_come_from_the_template_alone() -> None:
    tokenizer = tiny_tokenizer()
    served = replace(SERVED, tokenizer=tokenizer)
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    by_transformers = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert served.encode_rendered(served.render_chat(turns)) == by_transformers


async def test_a_long_chat_is_read_aside(launch: Any) -> None:
    served = served_with(TEMPLATE, max_model_len=6000)
    threads: list[str] = []
    read = served.tokenizer.encode

    def encode(text: str, **options: bool) -> list[int]:
        threads.append(threading.current_thread().name)
        token_ids: list[int] = read(text, **options)
        return token_ids

    served.tokenizer.encode = encode
    service = await launch("p-0", "d-0", served=served)
    for worker in service.workers.values():
        worker.num_blocks = 2000
    await asyncio.sleep(0.2)
    threads.clear()
    for num_chars in (100, 3000):
        (response,) = await service.generate(chat=chat(("user", "x" * num_chars)), sampling_params=sampling())
        assert response.complete.prompt_tokens == num_chars + len(ids("[user]</s>[answer]"))
    assert threads[0] == "MainThread"
    assert threads[1].startswith("tokenizer")


# --- long prompts beside other streams ----------------------------------------------------------------------------


async def test_a_megabyte_is_tokenized_beside_a_running_stream(launch: Any) -> None:
    """The stream goes on while the prompt is read: figures are bench/tokenize_stall.py's."""
    service = await launch("p-0", "d-0", token_s=0.005)
    arrivals: list[float] = []

    async def stream(channel: grpc.aio.Channel) -> None:
        request = pb.GenerateRequest(text="abcdef", stream=True, sampling_params=sampling(max_tokens=190))
        async for _ in InferenceStub(channel).Generate(request, timeout=60):
            arrivals.append(time.monotonic())

    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        running = asyncio.create_task(stream(channel))
        await eventually(lambda: bool(arrivals))
        sent_at = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError, match="must have fewer tokens"):
            await service.generate(text="some words " * 95_000, sampling_params=sampling())
        refused_at = time.monotonic()
        await running
    beside = [at for at in arrivals if sent_at < at < refused_at]
    assert len(beside) >= 5, (len(beside), refused_at - sent_at)


async def test_a_chat_is_one_text(launch: Any) -> None:
    """The same prompt, sent as text and as a chat, is the same request."""
    service = await launch("p-0", "d-0", served=served_with("{{ messages[0].content }}"))
    fields = {"sampling_params": sampling(max_tokens=6)}
    as_text = await service.generate(text="abcdefgh", **fields)
    as_chat = await service.generate(chat=chat(("user", "abcdefgh")), **fields)
    assert text_of(as_chat) == text_of(as_text)
    assert tokens_of(as_chat) == tokens_of(as_text)
