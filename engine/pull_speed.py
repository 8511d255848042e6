"""What a pull costs on this worker: as it is set, or measured from its own pulls. Measures only; whether a prefix is
pulled or computed is pull_destination.py's."""

from __future__ import annotations

from engine.config import PullConfig
from protos.cost_model import PullCost

# Before the first pull, and again when the last one is long ago: a 10 Gb/s network that is not idle.
ASSUMED_NBYTES_PER_S = 1e9
ASSUMED_BASE_S = 0.005
ASSUMED_TOKENS = 256  # weight of the assumption, as if a pull of so many tokens had been measured
# Of what was known before, when a pull ends: it follows a change of load within about ten pulls.
KEPT_AFTER_PULL = 0.8
# The same after a step: what was measured is forgotten over some thousands of them, so that a network that has been
# slow once is tried again.
KEPT_AFTER_STEP = 0.9995


class PullSpeed:
    """Invariant: where the settings have a number, `cost` is what they say; else it lies between what was assumed and
    what was measured. Seconds per token are those in which KV moved, the base is all other time that a pull took."""

    def __init__(self, config: PullConfig | None, kv_nbytes_per_token: int) -> None:
        self._config = config
        self._assumed_s_per_token = kv_nbytes_per_token / ASSUMED_NBYTES_PER_S
        self._num_tokens = float(ASSUMED_TOKENS)
        self._moving_s = ASSUMED_TOKENS * self._assumed_s_per_token
        self._base_s = ASSUMED_BASE_S

    @property
    def cost(self) -> PullCost | None:
        """None: nobody pulls here."""
        if self._config is None:
            return None
        if self._config.s_per_token is not None:
            return PullCost(self._config.s_per_token, self._config.base_s)
        return PullCost(self._moving_s / self._num_tokens, self._base_s)

    def note_pull(self, num_tokens: int, moving_s: float, waited_s: float) -> None:
        """waited_s: from the question until everything was here; KV moved for moving_s of it."""
        self._num_tokens = KEPT_AFTER_PULL * self._num_tokens + num_tokens
        self._moving_s = KEPT_AFTER_PULL * self._moving_s + moving_s
        self._note_base(max(0.0, waited_s - moving_s))

    def note_late(self, waited_s: float) -> None:
        """It was given up."""
        self._note_base(waited_s)

    def note_step(self) -> None:
        forgotten = 1 - KEPT_AFTER_STEP
        self._num_tokens += forgotten * (ASSUMED_TOKENS - self._num_tokens)
        self._moving_s += forgotten * (ASSUMED_TOKENS * self._assumed_s_per_token - self._moving_s)
        self._base_s += forgotten * (ASSUMED_BASE_S - self._base_s)

    def _note_base(self, base_s: float) -> None:
        self._base_s += (1 - KEPT_AFTER_PULL) * (base_s - self._base_s)
