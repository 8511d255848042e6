"""What prompts are made of: units (token ids, or words) of which a known number makes a known number of tokens. Draws
them from randomness that is handed in, so that equal seeds give equal prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from simulator.requests import SimRequest

TEXT = (  # common words of English
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part "
)
WORDS = tuple(f" {word}" for word in TEXT.split())
FILLERS = (" a", ".", " I", "a", "\n", "1")  # of these, most tokenizers make one token
MIN_WORDS = 8  # fewer would make prompts that resemble each other

Unit = str | int  # a word, or a token id
Prompt = str | list[int]
RngOf: TypeAlias = "Callable[[str], Random]"  # randomness by its seed


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Invariant: all units make tokens_per_unit tokens each, wherever they stand; the filler makes one."""

    units: tuple[str, ...] | tuple[int, ...]
    tokens_per_unit: float = 1.0
    filler: str | None = None  # needed to hit any length where a unit makes several tokens
    num_extra_tokens: int = 0  # what the server adds to every prompt: a template, a first token

    def draw(self, num_tokens: int, rng: Random) -> list[Unit]:
        """Units for so many tokens. With the same rng, a shorter draw is the beginning of a longer one, but for the
        fillers at its end."""
        assert num_tokens >= 0
        num_units = num_tokens / self.tokens_per_unit
        drawn: list[Unit] = list(
            rng.choices(self.units, k=int(num_units) if self.filler is not None else round(num_units))
        )
        if self.filler is not None:
            drawn += [self.filler] * (num_tokens - round(len(drawn) * self.tokens_per_unit))
        return drawn

    def join(self, units: Sequence[Unit]) -> Prompt:
        if self.units and isinstance(self.units[0], int):
            return [int(unit) for unit in units]
        return "".join(str(unit) for unit in units)


def alike_words(costs: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The largest set of words that make the same number of tokens, and that number; of equal sets the cheaper.
    ValueError where no set is large enough."""
    sizes = Counter(cost for cost in costs.values() if cost > 0)
    cost, size = max(sizes.items(), key=lambda item: (item[1], -item[0]), default=(0, 0))
    if size < MIN_WORDS:
        raise ValueError(f"no {MIN_WORDS} words of {len(costs)} make the same number of tokens")
    return tuple(word for word, its_cost in costs.items() if its_cost == cost), cost


# --- prompts --------------------------------------------------------------------------------------------------------


def random_prompt(
    lexicon: Lexicon, rng_of: RngOf, seed: int, own_seed: str, num_tokens: int, num_shared_tokens: int
) -> Prompt:
    """All prompts of a seed begin with the same num_shared_tokens; what follows depends on own_seed too."""
    num_tokens = max(1, num_tokens - lexicon.num_extra_tokens)
    num_shared_tokens = min(num_shared_tokens, num_tokens)
    shared = lexicon.draw(num_shared_tokens, rng_of(f"{seed}/shared"))
    own = lexicon.draw(num_tokens - num_shared_tokens, rng_of(f"{seed}/{own_seed}"))
    return lexicon.join([*shared, *own])


def traced_prompt(lexicon: Lexicon, rng_of: RngOf, seed: int, request: SimRequest) -> Prompt:
    """Equal where the hash ids are equal: each block is drawn by its own id alone."""
    num_left = max(1, request.num_prompt_tokens - lexicon.num_extra_tokens)
    units: list[Unit] = []
    for hash_id in request.hash_ids:
        units += lexicon.draw(min(num_left, request.block_tokens), rng_of(f"{seed}/block {hash_id}"))
        num_left -= min(num_left, request.block_tokens)
    return lexicon.join(units)
