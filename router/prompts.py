"""Turns a client's prompt into token ids and the chain of its hash blocks, without holding up the event loop."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from protos.block_hash import chain_hashes
from router.chat import check_messages, num_chars, render
from router.config import RouterConfig
from router.served_model import ServedModel
from router.validation import ChatMessage, PublicRequest

MAX_INLINE_CHARS = 2000  # a longer text is tokenized in a thread
NUM_THREADS = 2


class TooManyPrompts(RuntimeError):
    """The threads have as many prompts before them as they may have."""


class PromptReader:
    def __init__(self, served: ServedModel, config: RouterConfig) -> None:
        self._served = served
        self._config = config
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")
        self._num_tokenizing = 0
        # A tokenizer settles its truncation and padding in its first call; later calls only read, from any thread.
        served.encode("warm")

    async def token_ids(self, request: PublicRequest) -> array[int]:
        if request.input_ids is not None:
            return array("i", request.input_ids)
        if request.messages is not None:
            check_messages(request.messages, self._served.has_chat_template)
            return await self._read(partial(self._read_chat, request.messages), num_chars(request.messages))
        assert request.text is not None
        return await self._read(partial(self._read_text, request.text), len(request.text))

    def links(self, token_ids: array[int], cache_salt: bytes) -> tuple[bytes, ...]:
        root = self._served.root(cache_salt)
        return tuple(chain_hashes(token_ids, self._served.hash_block_size, root, self._served.hash_key))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_text(self, text: str) -> array[int]:
        return array("i", self._served.encode(text))

    def _read_chat(self, messages: tuple[ChatMessage, ...]) -> array[int]:
        return array("i", self._served.encode_rendered(render(messages, self._served.render_chat)))

    async def _read(self, work: Callable[[], array[int]], size: int) -> array[int]:
        return work() if size <= MAX_INLINE_CHARS else await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], array[int]]) -> array[int]:
        if self._num_tokenizing >= self._config.max_tokenizing:
            raise TooManyPrompts(f"{self._num_tokenizing} long prompts wait to be tokenized, the most that may")
        self._num_tokenizing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work)
        finally:
            self._num_tokenizing -= 1
