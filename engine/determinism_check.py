"""Finds out in which sizes this machine computes a model's rows with the same bits, before anybody relies on it.

Whether the number of rows, or the place among them, changes a row's sums is a property of the kernels, and they differ
between machines. Another order of additions shows in random data at once: tries are compared, bit by bit. Only a
function of single numbers (SiLU, GELU) may differ between vector and scalar code too seldom for that: sizes in which
there is anything for scalar code to do are not tried."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Protocol

import torch
from torch.nn import functional

from engine.deterministic_runner import fixed_forward
from engine.fixed_attention import attend_in_splits
from engine.fixed_shapes import SIZES, SPLIT, FixedShapes
from engine.model_loader import LoadedModel
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry, build_step_inputs
from protos.types import SamplingParams

NUM_AT_LEAST = 16  # rows that every size is tried with, and whose bits go into the digest
NUM_DECODES = 8  # rows that are also attended as requests of their own
LANES = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16  # float32s that a vector loop takes at once
GRAIN = 32768  # elements that PyTorch gives to a thread at least
NOTHING_DRAWN = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=1)

Bits = Sequence[torch.Tensor]  # each [num_rows, ...]: what was computed for each row


class Trial(Protocol):
    sizes: tuple[int, ...]  # that can be tried, ascending

    def bits(self, size: int) -> Bits:
        """Of some rows, computed `size` at a time."""

    def moved(self, size: int) -> Bits:
        """Of the same rows, each in another place."""


@torch.inference_mode()
def find_fixed_shapes(loaded: LoadedModel) -> FixedShapes:
    """ValueError where this machine has no such sizes. Takes about as long as a prompt of 700 tokens."""
    queries, attended = sizes_alike(AttentionTrial(loaded))
    rows, computed = sizes_alike(ModelTrial(loaded, queries)) if queries else ((), ())
    if not rows:
        raise ValueError(
            f"deterministic: on this machine, in {torch.get_num_threads()} threads, {loaded.dtype} rows of "
            f"{loaded.facts.path} get other bits in other places, whatever their number"
        )
    return FixedShapes(rows, queries, _digest([*attended, *computed]))


def sizes_alike(trial: Trial) -> tuple[tuple[int, ...], Bits]:
    """The largest size in which a row's place changes nothing, behind the smaller ones that give the same as it; and
    what it gives. Nothing where there is none."""
    for largest in reversed(trial.sizes):
        bits = trial.bits(largest)
        if _alike(bits, trial.moved(largest)):
            smaller = (size for size in trial.sizes if size < largest)
            return (*(size for size in smaller if _alike(bits, trial.moved(size))), largest), bits
    return (), ()


def _alike(one: Bits, other: Bits) -> bool:
    """In those rows that both have."""
    return all(torch.equal(_raw(a[: len(b)]), _raw(b[: len(a)])) for a, b in zip(one, other, strict=True))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits: 0.0 and -0.0 are two things."""
    return tensor.contiguous().view(torch.uint8)


def _digest(bits: Bits) -> str:
    digest = blake2b(digest_size=8)
    for each in bits:
        digest.update(_raw(each[:NUM_AT_LEAST]).numpy().tobytes())
    return digest.hexdigest()


class AttentionTrial:
    """Rows at the end of one context of random keys and values."""

    def __init__(self, loaded: LoadedModel) -> None:
        facts, config = loaded.facts, loaded.model.config
        group_size = facts.num_attention_heads // facts.num_kv_heads
        generator = torch.Generator().manual_seed(0)
        self.sizes = tuple(size for size in SIZES if size >= group_size)
        self._softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        self._scaling = facts.head_dim**-0.5
        self._kv = torch.randn(2, 1, facts.num_kv_heads, 3 * SPLIT, facts.head_dim, generator=generator)
        shape = (1, facts.num_kv_heads, SIZES[-1], group_size, facts.head_dim)
        self._rows = torch.randn(shape, generator=generator)
        positions = torch.arange(SIZES[-1])[:, None] + 2 * SPLIT - NUM_AT_LEAST  # some see two splits, some all three
        hidden = torch.arange(3 * SPLIT) > positions
        self._mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None]

    def bits(self, size: int) -> Bits:
        together = self._attended(self._rows, self._kv, self._mask, size)
        return together, together[:NUM_DECODES]

    def moved(self, size: int) -> Bits:
        first, rest = (
            self._attended(self._rows[:, :, rows], self._kv, self._mask[:, :, rows], size)
            for rows in (slice(0, 1), slice(1, None))
        )
        return torch.cat((first, rest)), self._decoded(size)

    def _decoded(self, size: int) -> torch.Tensor:
        """Each row as a request of its own, with more padding behind its context."""
        rows = self._rows[:, :, :NUM_DECODES].transpose(0, 2)
        kv = torch.cat((self._kv, self._kv[..., :SPLIT, :]), dim=3).repeat(1, NUM_DECODES, 1, 1, 1)
        mask = functional.pad(self._mask[:, :, :NUM_DECODES], (0, SPLIT), value=-torch.inf)
        return self._attended(rows, kv, mask.transpose(0, 2), size)

    def _attended(self, rows: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
        out = attend_in_splits(rows, kv[0], kv[1], mask, self._scaling, self._softcap, (size,))
        return out.transpose(1, 2).flatten(0, 1)  # [num_rows, num_kv_heads, group_size, head_dim]


class ModelTrial:
    """One prompt, computed in chunks: keys, values and logits of all of its tokens."""

    def __init__(self, loaded: LoadedModel, queries: tuple[int, ...]) -> None:
        width = loaded.model.config.intermediate_size
        layout = loaded.facts.kv_layout(loaded.dtype, block_size=1, hash_block_size=1)
        num_threads = torch.get_num_threads()
        self.sizes = tuple(size for size in SIZES if leaves_no_remainder(size, width, num_threads))
        self._loaded = loaded
        self._queries = queries
        self._kv_cache = PagedKVCache(layout, SIZES[-1] + 1)  # a block for every token
        self._token_ids = array("i", (7919 * index % loaded.facts.vocab_size for index in range(SIZES[-1] + 1)))

    def bits(self, size: int) -> Bits:
        return self._computed([0], size)

    def moved(self, size: int) -> Bits:
        return self._computed([0, 1], size)

    def _computed(self, starts: list[int], size: int) -> Bits:
        """In chunks that begin at starts, and then every `size` tokens."""
        num_tokens = max(size, NUM_AT_LEAST)
        while starts[-1] + size < num_tokens:
            starts.append(starts[-1] + size)
        ends = [*starts[1:], starts[-1] + size]
        logits = [self._chunk(start, end, size) for start, end in zip(starts, ends, strict=True)]
        return self._kv_cache.tensor[: ends[-1]].clone(), torch.cat(logits)

    def _chunk(self, start: int, end: int, size: int) -> torch.Tensor:
        """Logits of all of its rows."""
        table = list(range(end))
        request = ScheduledRequest("", self._token_ids, end, start, end - start, table, NOTHING_DRAWN, samples=True)
        geometry = SlotGeometry.of(self._kv_cache)
        step = build_step_inputs([request], geometry, self._kv_cache.tensor.device, SPLIT)
        step = replace(step, sampled_rows=torch.arange(end - start))
        shapes = FixedShapes((size,), self._queries, "")
        return fixed_forward(self._loaded.model, step, self._kv_cache, shapes)


def leaves_no_remainder(num_rows: int, width: int, num_threads: int) -> bool:
    """Whether vector loops over [num_rows, width], shared by the threads, have nothing left over for scalar code."""
    num_parts = min(num_threads, -(-num_rows * width // GRAIN))
    return num_rows * width % (LANES * num_parts) == 0 and (num_parts == 1 or width % LANES == 0)
