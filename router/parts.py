"""What a reply is made of, whatever protocol carries it: stretches of output, the last with the end. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protos.types import FinishReason, GenerateRequest, Logprobs
from router.account import RequestAccount


@dataclass(frozen=True, slots=True)
class End:
    finish_reason: FinishReason
    matched: str | int | None  # the stop string or the stop token that ended the output
    account: RequestAccount


@dataclass(frozen=True, slots=True)
class Part:
    """Output tokens [first_index, first_index + len(token_ids)) of one choice with their text, and the counts so
    far."""

    request: GenerateRequest
    first_index: int
    token_ids: Sequence[int]
    text: str
    num_cached_tokens: int
    logprobs: Sequence[Logprobs] = ()  # one for each token, where asked for
    end: End | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.first_index + len(self.token_ids)
