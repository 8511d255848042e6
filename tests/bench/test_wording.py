"""Prompts: exactly as long as asked, equal where they must be, different where not."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.wording import WORDS, Lexicon, alike_words, random_prompt

IDS = Lexicon(tuple(range(10, 90)))
THREES = Lexicon(WORDS, 3.0, ".")
LEXICONS = st.sampled_from([IDS, Lexicon(WORDS), THREES, Lexicon(WORDS, 3.0, ".", num_extra_tokens=5)])


def num_tokens_of(lexicon: Lexicon, prompt: str | list[int]) -> int:
    """As a tokenizer of this lexicon would count."""
    if isinstance(prompt, list):
        return len(prompt)
    num_fillers = prompt.count(".")
    return int(len(prompt.replace(".", " ").split()) * lexicon.tokens_per_unit) + num_fillers + lexicon.num_extra_tokens


@given(LEXICONS, st.integers(6, 600), st.integers(0, 600))
def test_prompts_are_exactly_as_long_as_asked(lexicon: Lexicon, num_tokens: int, num_shared: int) -> None:
    prompt = random_prompt(lexicon, Random, 0, "a", num_tokens, min(num_shared, num_tokens))
    assert num_tokens_of(lexicon, prompt) == num_tokens


@given(LEXICONS, st.integers(0, 300), st.integers(0, 300), st.integers(0, 9))
def test_a_shorter_draw_begins_a_longer_one(lexicon: Lexicon, one: int, other: int, seed: int) -> None:
    shorter, longer = (lexicon.draw(num_tokens, Random(seed)) for num_tokens in sorted((one, other)))
    words = [unit for unit in shorter if unit != lexicon.filler]
    assert longer[: len(words)] == words


def test_only_the_shared_prefix_is_shared() -> None:
    prompts = [random_prompt(IDS, Random, 0, own_seed, 500, 100) for own_seed in "ab"]
    assert prompts[0][:100] == prompts[1][:100]
    assert sum(a == b for a, b in zip(prompts[0][100:], prompts[1][100:], strict=True)) < 40
    assert prompts[0][:100] != random_prompt(IDS, Random, 1, "a", 500, 100)[:100]


def test_equal_seeds_give_equal_prompts() -> None:
    assert random_prompt(THREES, Random, 0, "a", 50, 0) == random_prompt(THREES, Random, 0, "a", 50, 0)


def test_words_that_cost_alike() -> None:
    costs = {f" w{index}": 1 + index % 3 for index in range(40)} | {" odd": 0}
    words, cost = alike_words(costs)
    assert cost == 1 and len(words) == 14 and " odd" not in words


def test_too_few_words_that_cost_alike() -> None:
    with pytest.raises(ValueError, match="no 8 words of 20"):
        alike_words({f" w{index}": index for index in range(20)})
