"""The bodies of OpenAI's answers, from the parts of a reply. Values in, values out: neither sockets nor clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from protos.types import FinishReason, Logprobs
from router.account import RequestAccount
from router.parts import Part

Json = dict[str, Any]
DecodeToken = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of an answer repeats."""

    id: str
    created: int  # unix seconds
    model: str
    system_fingerprint: str

    def around(self, kind: str, choices: list[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            **more,
        }


class Shape(Protocol):
    """How one of the two APIs shows a choice. `index` is the choice's place in the answer."""

    @property
    def id_prefix(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def chunk_kind(self) -> str: ...
    def chunk(self, index: int, part: Part, is_first: bool) -> Json: ...
    def whole(self, index: int, part: Part) -> Json: ...


@dataclass
class ChatShape:
    decode_token: DecodeToken
    id_prefix: str = "chatcmpl-"
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def chunk(self, index: int, part: Part, is_first: bool) -> Json:
        delta: Json = {"role": "assistant"} if is_first else {}
        if part.text or is_first:
            delta["content"] = part.text
        return self._choice(index, part) | {"delta": delta}

    def whole(self, index: int, part: Part) -> Json:
        return self._choice(index, part) | {"message": {"role": "assistant", "content": part.text, "refusal": None}}

    def _choice(self, index: int, part: Part) -> Json:
        return {"index": index, "finish_reason": _finish_reason(part), "logprobs": self._logprobs(part)}

    def _logprobs(self, part: Part) -> Json | None:
        if not part.logprobs:
            return None
        pairs = zip(part.token_ids, part.logprobs, strict=True)
        return {"content": [self._token(token_id, one) for token_id, one in pairs], "refusal": None}

    def _token(self, token_id: int, logprobs: Logprobs) -> Json:
        top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        return self._one(token_id, logprobs.logprob) | {"top_logprobs": [self._one(*one) for one in top]}

    def _one(self, token_id: int, logprob: float) -> Json:
        token = self.decode_token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


@dataclass
class CompletionShape:
    decode_token: DecodeToken
    id_prefix: str = "cmpl-"
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of a choice's tokens so far

    def chunk(self, index: int, part: Part, is_first: bool) -> Json:
        return self.whole(index, part)

    def whole(self, index: int, part: Part) -> Json:
        return {
            "index": index,
            "text": part.text,
            "finish_reason": _finish_reason(part),
            "logprobs": self._logprobs(index, part) if part.logprobs else None,
        }

    def _logprobs(self, index: int, part: Part) -> Json:
        tokens = [self.decode_token(token_id) for token_id in part.token_ids]
        offsets, offset = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in part.logprobs],
            "top_logprobs": [self._top(one) for one in part.logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprobs: Logprobs) -> dict[str, float]:
        """Of two tokens with the same text the likelier counts."""
        top: dict[str, float] = {}
        for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True):
            top.setdefault(self.decode_token(token_id), logprob)
        return top


class Usage:
    """Tokens so far, over all choices of a call; each prompt counts once."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}  # by prompt: tokens, cached ones
        self._outputs: dict[int, int] = {}  # by choice

    def note(self, prompt_index: int, index: int, part: Part) -> None:
        # Only the first choice computes the prompt: the others find it in the cache that the first has filled.
        if part.request.choice_index == 0:
            self._prompts[prompt_index] = (part.num_prompt_tokens, part.num_cached_tokens)
        else:
            self._prompts.setdefault(prompt_index, (part.num_prompt_tokens, 0))
        self._outputs[index] = part.num_output_tokens

    def body(self) -> Json:
        num_prompt_tokens = sum(num_tokens for num_tokens, _ in self._prompts.values())
        num_output_tokens = sum(self._outputs.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


def account_body(accounts: Sequence[RequestAccount]) -> Json:
    """Of the only choice, or of each in order."""
    bodies = [asdict(account) for account in accounts]
    return {"account": bodies[0]} if len(bodies) == 1 else {"accounts": bodies}


def _finish_reason(part: Part) -> str | None:
    if part.end is None:
        return None
    # The API has no word for an answer that its caller ended elsewhere.
    return "stop" if part.end.finish_reason is FinishReason.ABORT else part.end.finish_reason.value
