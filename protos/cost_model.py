"""What steps of a worker cost, in the form that the router, the workers and the simulator share, and rows for known
hardware. Pure arithmetic: who measures and who fits is elsewhere.

    prefill [s] = base + max(floor, per_token * sum n_i) + per_token_pair * sum n_i * (c_i + n_i / 2)
    decode  [s] = base + per_seq * B + per_kv_token * K

n_i new and c_i cached tokens of each prompt in the step; B sequences that decode, K tokens of KV that they read. The
rows are fitted to published kernel measurements, with a mean error of 1-4 % (docs/simulator.md)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PrefillChunk = tuple[int, int]  # new tokens, cached tokens before them


@dataclass(frozen=True, slots=True)
class CostModel:
    """All in seconds."""

    prefill_base_s: float
    prefill_floor_s: float
    prefill_s_per_token: float
    prefill_s_per_token_pair: float
    decode_base_s: float
    decode_s_per_seq: float
    decode_s_per_kv_token: float

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def prefill_s(self, chunks: Iterable[PrefillChunk]) -> float:
        """One step that prefills these chunks; 0 without any."""
        num_tokens, num_pairs = 0, 0.0
        for num_new, num_cached in chunks:
            num_tokens += num_new
            num_pairs += num_new * (num_cached + num_new / 2)
        if num_tokens == 0:
            return 0.0
        linear_s = max(self.prefill_floor_s, self.prefill_s_per_token * num_tokens)
        return self.prefill_base_s + linear_s + self.prefill_s_per_token_pair * num_pairs

    def decode_s(self, num_seqs: int, num_kv_tokens: int) -> float:
        """One step in which num_seqs sequences get a token each; 0 without any."""
        if num_seqs == 0:
            return 0.0
        return self.decode_base_s + self.decode_s_per_seq * num_seqs + self.decode_s_per_kv_token * num_kv_tokens

    def step_s(self, chunks: Iterable[PrefillChunk], num_seqs: int, num_kv_tokens: int) -> float:
        """A step that does both pays the weights' way through memory once: the decodes add what they cost beyond it."""
        prefill_s, decode_s = self.prefill_s(chunks), self.decode_s(num_seqs, num_kv_tokens)
        if prefill_s == 0 or decode_s == 0:
            return prefill_s + decode_s
        return prefill_s + decode_s - self.decode_base_s

    def prompt_s(self, num_new_tokens: int, num_cached_tokens: int, max_step_tokens: int) -> float:
        """A whole prompt alone, in steps of at most max_step_tokens tokens."""
        total_s, done = 0.0, 0
        while done < num_new_tokens:
            step = min(max_step_tokens, num_new_tokens - done)
            total_s += self.prefill_s([(step, num_cached_tokens + done)])
            done += step
        return total_s


def prefill_line(base_s: float, s_per_token: float, s_per_token_pair: float) -> CostModel:
    """Without a floor, and of a worker of which nothing is known about decoding."""
    return CostModel(base_s, 0.0, s_per_token, s_per_token_pair, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class PullCost:
    """What a worker waits for KV from another one, in seconds."""

    s_per_token: float
    base_s: float = 0.0  # question, answer, a link that must be made

    def pull_s(self, num_tokens: int) -> float:
        return self.base_s + self.s_per_token * num_tokens


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker's costs and memory. tensor_parallel GPUs make up a worker."""

    cost: CostModel
    num_kv_tokens: int  # that its device memory holds
    kv_nbytes_per_token: int


def _row(
    t0: float, w: float, a: float, b: float, d0: float, d1: float, d2: float, kv_tokens: int, nbytes: int
) -> Hardware:
    """From milliseconds."""
    cost = CostModel(t0 / 1e3, w / 1e3, a / 1e3, b / 1e3, d0 / 1e3, d1 / 1e3, d2 / 1e3)
    return Hardware(cost, kv_tokens, nbytes)


# Llama 3.1, bf16.
HARDWARE = {
    "8b-a100": _row(7.23, 4.81, 0.05485, 2.969e-6, 11.51, 0.0358, 8.20e-5, 412_000, 131_072),
    "8b-h100": _row(2.49, 4.46, 0.01948, 8.026e-7, 6.39, 0.0094, 4.35e-5, 412_000, 131_072),
    "8b-h200": _row(1.60, 3.77, 0.01975, 8.104e-7, 4.94, 0.0111, 3.03e-5, 830_000, 131_072),
    "70b-a100x4": _row(18.05, 12.56, 0.15186, 3.705e-6, 27.71, 0.0990, 5.75e-5, 424_000, 327_680),
    "70b-h100x4": _row(6.40, 10.63, 0.06063, 1.003e-6, 15.16, 0.0315, 2.81e-5, 424_000, 327_680),
    "70b-h200x4": _row(4.12, 9.30, 0.06097, 1.014e-6, 12.19, 0.0312, 1.88e-5, 1_094_000, 327_680),
}
