"""Which token comes next, from logits and nothing else.

Keeps no state: the noise of a sampled token is a hash of (seed, position, token id), so the same request draws the same
token in any batch, on any worker, after any failover. Penalties are logits.py's; stops and text belong to others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from protos.types import SamplingParams

_MASK64 = (1 << 64) - 1
# The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token id per row. logits: [num_rows, vocab_size]; positions: index of the sampled token in its request."""
    assert logits.shape[0] == len(params) == len(positions)
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        picked = logits if len(drawn) == len(params) else logits[drawn]
        chosen = _draw(picked, [params[row] for row in drawn], [positions[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Gumbel-argmax: adding Gumbel noise to log-probabilities and taking the largest samples from them exactly."""
    temperature = torch.tensor([[max(p.temperature, 1e-5)] for p in params], device=logits.device)
    # The largest logit becomes 0 first: a small temperature then gives large negative numbers, never inf - inf.
    scaled = (logits.float() - logits.amax(-1, keepdim=True).float()) / temperature
    if any(p.min_p > 0 for p in params):
        scaled = scaled.masked_fill(scaled < _least(params, scaled.device), -torch.inf)
    keys = [_row_key(p.seed, position) for p, position in zip(params, positions, strict=True)]
    if all(p.top_k == 0 and p.top_p >= 1.0 for p in params):
        token_ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(scaled)
        return _noisy_argmax(scaled, token_ids, keys)
    scaled, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    widest = max((p.top_k or scaled.shape[-1]) if p.top_p >= 1.0 else scaled.shape[-1] for p in params)
    excluded = _excluded(scaled, params)
    return _noisy_argmax(scaled.masked_fill(excluded, -torch.inf)[:, :widest], token_ids[:, :widest], keys)


def _least(params: Sequence[SamplingParams], device: torch.device) -> torch.Tensor:
    """The scaled logit that min_p asks for: the likeliest token has 0, so a ratio of probabilities is a difference."""
    return torch.tensor([[math.log(p.min_p) if p.min_p > 0 else -math.inf] for p in params], device=device)


def _excluded(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Which of the descending scaled logits top-k, then top-p leave out; the likeliest always stays."""
    size = scaled.shape[-1]
    top_k = torch.tensor([[p.top_k or size] for p in params], device=scaled.device)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float32, device=scaled.device)
    beyond_k = torch.arange(size, device=scaled.device) >= top_k
    probs = scaled.masked_fill(beyond_k, -torch.inf).softmax(-1)
    likelier = probs.cumsum(-1) - probs  # mass of the tokens before this one
    beyond_p = (likelier >= top_p) & (top_p < 1.0)  # sums of float32 may pass 1: top_p = 1 must exclude nothing
    beyond_p[:, 0] = False
    return beyond_k | beyond_p


def _noisy_argmax(scaled: torch.Tensor, token_ids: torch.Tensor, keys: Sequence[int]) -> list[int]:
    """scaled, token_ids: [num_rows, num_candidates]; keys: one per row."""
    key = torch.tensor([[_signed(k)] for k in keys], dtype=torch.int64, device=scaled.device)
    tokens: list[int] = token_ids.gather(-1, noisy_best(scaled, token_ids, key)).squeeze(-1).tolist()
    return tokens


def noisy_best(scaled: torch.Tensor, token_ids: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The column of each row's largest sum of logit and noise, [num_rows, 1]. key: [num_rows, 1], int64."""
    bits = _mix(key + token_ids * _signed(_GAMMA))
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)  # in (0, 1), both ends open
    gumbel = uniform.log_().neg_().log_().neg_()
    return (scaled + gumbel).argmax(-1, keepdim=True)


def signed_key(seed: int, position: int) -> int:
    """Of one row, as noisy_best takes it."""
    return _signed(_row_key(seed, position))


def _row_key(seed: int, position: int) -> int:
    """64 bits from seed and position; mixed twice, so that neighbouring seeds and positions share nothing."""
    return _mix_int(_mix_int(seed & _MASK64) + position * _GAMMA)


def _mix_int(x: int) -> int:
    x = (x + _GAMMA) & _MASK64
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK64
    return x ^ (x >> 31)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, whose products wrap like unsigned ones."""
    x = (x ^ _shifted(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX_2)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Right shift without the sign: torch has no unsigned one."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
