"""Finds out how a server wants to be asked: its model, the optional fields it takes, and how it counts tokens. Whatever
it does not offer becomes a note beside the results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from bench.load.client import LoadClient
from bench.load.plan import Target
from bench.load.wire import Dialect, is_refusal
from bench.load.wording import FILLERS, WORDS, Lexicon, alike_words

NUM_TRIED = 64  # words; each takes two calls
NUM_CHECKED = 200  # tokens of the prompt that a lexicon is tried on
FEW, MANY = 32, 160  # words, to measure tokens per word
DIALECTS = ((True, True), (True, False), (False, True), (False, False))  # usage, ignore_eos


@dataclass(frozen=True, slots=True)
class Manner:
    dialect: Dialect
    lexicon: Lexicon
    notes: tuple[str, ...]


async def find_manner(client: LoadClient, target: Target) -> Manner:
    """ValueError where the server does not answer at all."""
    model = target.model or await first_model(client)
    dialect = await find_dialect(client, model, target)
    notes = []
    if not dialect.takes_usage:
        notes.append("the server refuses stream_options: output tokens are counted as chunks with text")
    if not dialect.takes_ignore_eos:
        notes.append("the server refuses ignore_eos: answers may be shorter than --output-tokens")
    try:
        lexicon = await exact_lexicon(client, dialect)
    except ValueError as error:
        lexicon = await average_lexicon(client, dialect)
        notes.append(f"prompt lengths are approximate ({error}); see the prompt tokens that the server counted")
    return Manner(dialect, lexicon, tuple(notes))


async def first_model(client: LoadClient) -> str:
    match await client.get_json("/v1/models"):
        case {"data": [{"id": str(model)}, *_]}:
            return model
        case answer:
            raise ValueError(f"/v1/models names no model ({str(answer)[:100]}); give --model")


async def find_dialect(client: LoadClient, model: str, target: Target) -> Dialect:
    """The richest form of a request that the server does not refuse."""
    outcome = None
    for takes_usage, takes_ignore_eos in DIALECTS:
        dialect = Dialect(model, target.endpoint, takes_usage, takes_ignore_eos)
        outcome = await client.ask(dialect.body("Hello", 2))
        if not is_refusal(outcome):
            break
    assert outcome is not None
    if not outcome.is_ok:
        raise ValueError(f"a first request to {target.base_url} failed: {outcome.error}: {outcome.error_detail}")
    return dialect


# --- how many tokens a prompt is ------------------------------------------------------------------------------------


async def exact_lexicon(client: LoadClient, dialect: Dialect) -> Lexicon:
    """ValueError where the server's tokenizer is not to be had, or words do not add up."""
    if dialect.endpoint == "completions":
        lexicon = Lexicon(await ordinary_token_ids(client, dialect.model))
        counted = await counted_by_server(client, dialect, lexicon, FEW)
        if counted == FEW:
            return lexicon
    costs = {word: await cost_of(client, dialect.model, word) for word in WORDS[:NUM_TRIED]}
    words, cost = alike_words(costs)
    filler = None
    if cost > 1:
        filler = await first_of_one_token(client, dialect.model)
    lexicon = Lexicon(words, float(cost), filler)
    text = lexicon.join(lexicon.draw(NUM_CHECKED, Random(0)))
    told, empty = await token_ids_of(client, dialect.model, str(text)), await token_ids_of(client, dialect.model, "")
    if len(told) - len(empty) != NUM_CHECKED:
        raise ValueError("the tokens of its words do not add up")
    counted = await counted_by_server(client, dialect, lexicon, NUM_CHECKED)
    return replace(lexicon, num_extra_tokens=0 if counted is None else counted - NUM_CHECKED)


async def average_lexicon(client: LoadClient, dialect: Dialect) -> Lexicon:
    """Tokens per word by the prompt tokens that two requests were said to have."""
    words = Lexicon(WORDS)
    few, many = [await counted_by_server(client, dialect, words, num_words) for num_words in (FEW, MANY)]
    if few is None or many is None or many <= few:
        return words
    tokens_per_word = (many - few) / (MANY - FEW)
    return Lexicon(WORDS, tokens_per_word, None, max(0, round(few - FEW * tokens_per_word)))


async def counted_by_server(client: LoadClient, dialect: Dialect, lexicon: Lexicon, num_tokens: int) -> int | None:
    """Prompt tokens of a drawn prompt. None where the server refuses it or does not count."""
    prompt = lexicon.join(lexicon.draw(num_tokens, Random(0)))
    return (await client.ask(dialect.body(prompt, 1))).num_prompt_tokens


async def token_ids_of(client: LoadClient, model: str, text: str) -> list[Any]:
    match await client.post_json("/tokenize", {"model": model, "prompt": text}):
        case {"tokens": list(tokens)}:
            return tokens
        case answer:
            raise ValueError(f"/tokenize gave no tokens but {str(answer)[:100]}")


async def cost_of(client: LoadClient, model: str, word: str) -> int:
    """Tokens per repetition, so that what a tokenizer puts before the first one does not count. 0: not constant."""
    four, eight = [len(await token_ids_of(client, model, word * times)) for times in (4, 8)]
    return (eight - four) // 4 if (eight - four) % 4 == 0 else 0


async def first_of_one_token(client: LoadClient, model: str) -> str:
    for filler in FILLERS:
        if await cost_of(client, model, filler) == 1:
            return filler
    raise ValueError("it has no filler of one token")


async def ordinary_token_ids(client: LoadClient, model: str) -> tuple[int, ...]:
    """Ids of plain words: no special token is among them."""
    around = set(await token_ids_of(client, model, ""))
    ids = set(await token_ids_of(client, model, "".join(WORDS))) - around
    return tuple(sorted(ids))
