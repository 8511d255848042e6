"""What runs on a CUDA device, on the CPU under Triton's interpreter: the same tokens as the plain runner, whether steps
are launched or replayed, and nothing in a recorded step that would ask the device for a number."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from engine.decode_buffers import NOWHERE, DecodeBuffers, bucket_of, decode_buckets
from engine.decode_graphs import Replay, Tensors, draw_plain
from engine.device_runner import DeviceRunner
from engine.device_steps import build_paged_step
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.sampler import sample, signed_key
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.step_inputs import SlotGeometry
from protos.types import SamplingParams
from tests.engine.test_model_runner import DrivenRequest
from tests.tiny_models import save_tiny_model

BLOCK_SIZE, NUM_BLOCKS, NUM_NEW_TOKENS = 16, 24, 4
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS)
WARM = replace(GREEDY, temperature=0.8, seed=11)
PROMPTS = [[7, 3, 250, 4, 9], [1], [(5 * i) % 251 for i in range(21)]]


class EagerRecorder:
    """Replays by computing again, into what was given the first time; counts."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, run: Callable[[], Tensors]) -> tuple[Tensors, Replay]:
        made = run()

        def replay() -> None:
            self.num_replays += 1
            for kept, new in zip(made, run(), strict=True):
                kept.copy_(new)

        return made, replay


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    sizes = {"num_hidden_layers": 2}
    return load_model(save_tiny_model(tmp_path_factory.mktemp("m"), "mistral", sliding_window=9, **sizes))


def poisoned_cache(loaded: LoadedModel) -> PagedKVCache:
    cache = PagedKVCache(loaded.facts.kv_layout(loaded.dtype, BLOCK_SIZE, BLOCK_SIZE), NUM_BLOCKS)
    cache.tensor.fill_(torch.nan)
    return cache


def generate(runner: ModelRunner | DeviceRunner, params: Sequence[SamplingParams]) -> list[list[int]]:
    """In chunks of seven tokens, so that steps mix decodes and chunks."""
    free = list(range(NUM_BLOCKS))
    requests = []
    for index, (prompt, each) in enumerate(zip(PROMPTS, params, strict=True)):
        blocks = [free.pop(index) for _ in range(-(-(len(prompt) + NUM_NEW_TOKENS) // BLOCK_SIZE))]
        requests.append(DrivenRequest(str(index), array("i", prompt), len(prompt), blocks, each))
    while unfinished := [r for r in requests if len(r.output) < NUM_NEW_TOKENS]:
        chunks = tuple(r.chunk(7) for r in unfinished)
        result = runner.execute(SchedulerOutput(0, chunks, sum(c.num_scheduled_tokens for c in chunks)))
        for request, chunk in zip(unfinished, chunks, strict=True):
            request.num_computed_tokens += chunk.num_scheduled_tokens
            request.token_ids.extend(result.sampled.get(request.request_id, ()))
    return [r.output for r in requests]


def test_launched_and_replayed_steps_give_the_plain_runners_tokens(loaded: LoadedModel) -> None:
    params = [GREEDY, WARM, replace(WARM, top_k=5)]
    expected = generate(ModelRunner(loaded, poisoned_cache(loaded)), params)
    runner = DeviceRunner(loaded, poisoned_cache(loaded))
    assert generate(runner, params) == expected
    recorder, told = EagerRecorder(), list[str]()
    runner = DeviceRunner(loaded, poisoned_cache(loaded))
    runner.record_graphs(3, 64, recorder, told.append)
    assert generate(runner, params) == expected
    assert recorder.num_replays > 0
    assert told[0] == "recording decode graphs (0 of 3)"
    plain = [GREEDY, WARM, replace(WARM, seed=5)]
    replays = recorder.num_replays
    assert generate(runner, plain) == generate(ModelRunner(loaded, poisoned_cache(loaded)), plain)
    assert recorder.num_replays > replays


class _NoQuestions(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined,misc]
    """Fails on what a CUDA graph cannot record: to ask the device for a number, or for a shape that depends on one."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in self.FORBIDDEN, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_recorded_step_asks_the_device_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import triton_attention

    # The interpreter itself asks; what is left is everything else that a step does.
    monkeypatch.setattr(triton_attention, "write_rows", lambda *rest: None)
    monkeypatch.setattr(triton_attention, "attend", lambda rows, *rest: torch.zeros_like(rows).contiguous())
    runner = DeviceRunner(model := load_model(save_tiny_model(tmp_path, family)), poisoned_cache(model))
    step = DecodeBuffers(2, 64, runner._geometry, torch.device("cpu")).step(2)
    with torch.inference_mode(), _NoQuestions():
        logits = runner._forward(step)
        draw_plain(logits, torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoQuestions():
        logits.sum().item()


def test_draw_plain_draws_what_sample_draws() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 300) * 3
    params = [replace(GREEDY, temperature=0.1 * (row % 12), seed=row) for row in range(40)]
    keys = torch.tensor([[signed_key(p.seed, 100 + row)] for row, p in enumerate(params)])
    temperatures = torch.tensor([[p.temperature] for p in params])
    assert draw_plain(logits, temperatures, keys).tolist() == sample(logits, params, [100 + r for r in range(40)])


@given(st.integers(1, 600), st.integers(1, 600))
def test_every_step_that_fits_finds_a_bucket_with_little_padding(max_rows: int, num_rows: int) -> None:
    buckets = decode_buckets(max_rows)
    decodes = [a_decode(5)] * num_rows
    found = bucket_of(decodes, buckets)
    if num_rows > max_rows:
        assert found is None
    else:
        assert found is not None and num_rows <= found < num_rows + min(16, num_rows) and found <= max_rows


def test_what_is_no_decode_finds_none() -> None:
    assert bucket_of([], (1, 2)) is None
    assert bucket_of([a_decode(5), replace(a_decode(5), num_scheduled_tokens=2)], (1, 2)) is None
    assert bucket_of([replace(a_decode(5), samples=False)], (1, 2)) is None


def a_decode(num_computed: int) -> ScheduledRequest:
    tokens = array("i", range(100, 101 + num_computed))
    return ScheduledRequest("r", tokens, 1, num_computed, 1, [3, 9, 4], GREEDY, True)


def test_buffers_hold_what_a_step_has_and_padding_behind_it() -> None:
    geometry = SlotGeometry(16, 64, 2)
    buffers = DecodeBuffers(4, 48, geometry, torch.device("cpu"))
    shown = buffers.step(4)
    addresses = [shown.input_ids.data_ptr(), shown.block_tables.data_ptr(), shown.kv_lens.data_ptr()]
    for lengths in ([5, 17, 40, 0], [33], [1, 2]):
        scheduled = [a_decode(length) for length in lengths]
        buffers.fill(scheduled, 4)
        expected = build_paged_step(scheduled, geometry, torch.device("cpu"))
        used = len(scheduled)
        for name in ("input_ids", "position_ids"):
            assert getattr(shown, name)[0, :used].equal(getattr(expected, name)[0])
        for name in ("slot_mapping", "kv_lens", "sampled_rows"):
            assert getattr(shown, name)[:used].equal(getattr(expected, name))
        assert shown.block_tables[:used, : expected.block_tables.shape[1]].equal(expected.block_tables)
        assert shown.slot_mapping[used:].eq(NOWHERE).all() and shown.kv_lens[used:].eq(0).all()
    assert addresses == [shown.input_ids.data_ptr(), shown.block_tables.data_ptr(), shown.kv_lens.data_ptr()]
