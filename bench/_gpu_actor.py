"""An engine that runs on the card as in a worker, with nothing around it, and requests that arrive at random: how many
a second get what they are promised. Who else is on the card is not known here."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from bench._gpu_card import Card
from bench._gpu_models import GREEDY, Shape, loaded_model
from engine.config import SchedulerConfig
from engine.engine_thread import EngineThread
from engine.events import Effect, Submitted
from engine.paged_kv_cache import PagedKVCache
from engine.runners import make_runner
from engine.worker_config import EngineConfig
from engine.worker_core import WorkerCore
from protos.types import FinishReason, GenerateRequest, Handoff, TokenOutput

DRAIN_S = 120.0  # after the last arrival


@dataclass(frozen=True, slots=True)
class Load:
    """Poisson arrivals of random prompts of one length, and what each is promised."""

    rate: float  # requests a second
    num_requests: int
    prompt_len: int
    num_new: int
    max_ttft_s: float = 1.0
    max_tpot_s: float = 0.05

    def arrivals(self) -> list[float]:
        rng, at, times = random.Random(11), 0.0, []
        for _ in range(self.num_requests):
            at += rng.expovariate(self.rate)
            times.append(at)
        return times


@dataclass(frozen=True, slots=True)
class Setting:
    """Of one process."""

    shape: Shape
    dtype: str
    device: str
    num_blocks: int
    block_size: int = 64
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            model="random",
            dtype=self.dtype,
            device=self.device,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            hash_block_size=self.block_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )

    @property
    def scheduler(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_model_len=self.shape.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            block_size=self.block_size,
            hash_block_size=self.block_size,
            enable_prefix_caching=False,
        )


class Actor:
    """An engine that runs. `on_effects` is called on its threads, one at a time."""

    def __init__(self, setting: Setting, on_effects: Callable[[Sequence[Effect]], None]) -> None:
        card = Card(torch.device(setting.device))
        loaded = loaded_model(setting.shape, setting.dtype, card)
        layout = loaded.facts.kv_layout(setting.dtype, setting.block_size, setting.block_size)
        self.cache = PagedKVCache(layout, setting.num_blocks, card.device)
        runner = make_runner(loaded, self.cache, setting.engine, setting.shape.max_model_len, lambda progress: None)
        core = WorkerCore(setting.scheduler, setting.num_blocks, bytes(32), "random", "actor")
        self.crashed: list[BaseException] = []
        self.engine = EngineThread(core, runner.execute, on_effects, self.crashed.append)
        self.engine.start()

    def submit(self, index: int, load: Load, to: Handoff | None = None, source: Handoff | None = None) -> None:
        rng = random.Random(index)
        tokens = array("i", [rng.randrange(250) for _ in range(load.prompt_len)])
        params = replace(GREEDY, max_tokens=load.num_new)
        name = str(index)
        request = GenerateRequest(name, name, 1, tokens, len(tokens), params, handoff_to=to, handoff_from=source)
        self.engine.post(Submitted(request))


@dataclass
class Times:
    """When tokens came, by request. Appended to by several threads, read when all have ended."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def clear(self) -> None:
        for each in (self.first, self.last, self.num_tokens, self.errors):
            each.clear()

    def note(self, output: TokenOutput, at: float) -> None:
        if output.finish_reason is FinishReason.ERROR:
            self.errors.append(output.error)
        for _ in output.token_ids:
            self.first.setdefault(output.request_id, at)
            self.last[output.request_id] = at
            self.num_tokens[output.request_id] = self.num_tokens.get(output.request_id, 0) + 1

    def is_complete(self, load: Load) -> bool:
        return sum(self.num_tokens.values()) >= load.num_requests * load.num_new

    def goodput(self, load: Load, due: Sequence[float]) -> float:
        """Requests a second that met both promises, over the time from the first arrival to the last token."""
        met = 0
        for index, arrived_at in enumerate(due):
            name = str(index)
            ttft_s = self.first[name] - arrived_at
            tpot_s = (self.last[name] - self.first[name]) / max(1, load.num_new - 1)
            met += ttft_s <= load.max_ttft_s and tpot_s <= load.max_tpot_s
        return met / (max(self.last.values()) - due[0])


def served(load: Load, times: Times, submit: Callable[[int], None], crashed: Sequence[BaseException]) -> float:
    """Goodput. RuntimeError where something failed or did not end."""
    began_at = time.monotonic() + 0.1
    due = [began_at + after for after in load.arrivals()]
    for index, at in enumerate(due):
        time.sleep(max(0.0, at - time.monotonic()))
        submit(index)
    give_up_at = time.monotonic() + DRAIN_S
    while not times.is_complete(load):
        if crashed or times.errors or time.monotonic() > give_up_at:
            got = sum(times.num_tokens.values())
            raise RuntimeError(f"{got} tokens came: {[*crashed, *times.errors][:1] or 'then no more'}")
        time.sleep(0.01)
    return times.goodput(load, due)


@contextmanager
def colocated(setting: Setting) -> Iterator[Callable[[Load], float]]:
    times = Times()
    actor = Actor(setting, lambda effects: note_tokens(times, effects))

    def serve(load: Load) -> float:
        times.clear()
        return served(load, times, lambda index: actor.submit(index, load), actor.crashed)

    try:
        yield serve
    finally:
        actor.engine.stop(5.0)


def note_tokens(times: Times, effects: Sequence[Effect]) -> None:
    """On the engine's threads."""
    at = time.monotonic()
    for effect in effects:
        if isinstance(effect, TokenOutput):
            times.note(effect, at)
