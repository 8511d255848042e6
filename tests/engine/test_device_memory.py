"""How many KV blocks a worker makes: the arithmetic of a GPU's memory, and what a CPU worker does without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import runners
from engine.device_memory import DeviceMemory, kv_nbytes_beside
from engine.device_runner import DeviceRunner
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.runners import largest_step, make_runner, num_blocks_beside, warm_up
from engine.worker_config import CPU_KV_NBYTES, EngineConfig
from tests.tiny_models import save_tiny_model

GIB = 1 << 30
H100 = DeviceMemory(total=80 * GIB, free=63 * GIB, allocated=16 * GIB, peak=18 * GIB)


def test_kv_gets_what_the_share_leaves_beside_model_step_and_links() -> None:
    assert kv_nbytes_beside(H100, 0.75, GIB) == (60 - 18 - 1) * GIB


def test_what_others_have_taken_is_not_there() -> None:
    """Two workers on one card: the second finds what the first has left."""
    crowded = replace(H100, free=10 * GIB)
    assert kv_nbytes_beside(crowded, 0.9, GIB) == (10 - 2 - 1) * GIB


@pytest.mark.parametrize("changes", [{"free": 2 * GIB}, {"peak": 72 * GIB}])
def test_no_room_is_refused_with_the_numbers(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"gpu_memory_utilization 0\.9 of 81920 MiB"):
        kv_nbytes_beside(replace(H100, **changes), 0.9, GIB)


def test_the_largest_step_runs_and_is_as_large_as_allowed(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_model(tmp_path))
    engine = EngineConfig(
        model=str(tmp_path), max_num_seqs=3, max_num_batched_tokens=50, block_size=8, hash_block_size=8
    )
    step = largest_step(engine, max_model_len=2048)
    assert [r.num_scheduled_tokens for r in step.scheduled] == [17, 17, 16]
    blocks = [block_id for request in step.scheduled for block_id in request.block_table]
    assert sorted(blocks) == list(range(8))
    cache = PagedKVCache(loaded.facts.kv_layout("float32", 8, 8), 8)
    runner = make_runner(loaded, cache, engine, 2048, lambda progress: None)
    assert isinstance(runner, ModelRunner)
    assert set(runner.execute(step).sampled) == {"0", "1", "2"}


def test_a_warm_up_decodes_too_and_makes_do_with_the_blocks_there_are(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_model(tmp_path))
    engine = EngineConfig(
        model=str(tmp_path), max_num_seqs=3, max_num_batched_tokens=50, block_size=8, hash_block_size=8
    )
    runner = ModelRunner(loaded, PagedKVCache(loaded.facts.kv_layout("float32", 8, 8), 2))
    steps: list[list[int]] = []
    execute = runner.execute
    runner.execute = lambda step: steps.append([r.num_scheduled_tokens for r in step.scheduled]) or execute(step)  # type: ignore[method-assign,func-returns-value]
    warm_up(runner, engine, 2048)
    assert steps == [[17, 17, 16], [50], [1, 1, 1]]
    assert runner.kv_cache.tensor.count_nonzero() > 0


def test_no_room_for_the_largest_step_names_what_may_be_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded = load_model(save_tiny_model(tmp_path))
    cache = PagedKVCache(loaded.facts.kv_layout("float32", 8, 8), 5)
    monkeypatch.setattr(runners, "_runner_over", lambda *_: DeviceRunner(loaded, cache))
    monkeypatch.setattr(DeviceRunner, "record_graphs", full)
    monkeypatch.setattr(runners, "CudaRecorder", lambda device: None)
    with pytest.raises(ValueError, match="beside 5 KV blocks: lower kv_cache_bytes"):
        make_runner(loaded, cache, EngineConfig(model=str(tmp_path)), 2048, lambda progress: None)


def test_a_worker_on_a_cpu_takes_what_it_is_told_or_a_little(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_model(tmp_path))
    engine = EngineConfig(model=str(tmp_path), block_size=8, hash_block_size=8)
    block_nbytes = loaded.facts.kv_layout("float32", 8, 8).block_nbytes
    assert num_blocks_beside(loaded, engine, 2048) == CPU_KV_NBYTES // block_nbytes
    assert num_blocks_beside(loaded, replace(engine, kv_cache_bytes=10 * block_nbytes), 2048) == 10
    assert num_blocks_beside(loaded, replace(engine, num_blocks=7), 2048) == 7


def test_only_on_a_gpu_is_the_size_left_to_what_is_there() -> None:
    assert EngineConfig(model="m", device="cuda").kv_nbytes is None
    assert EngineConfig(model="m", device="cuda", kv_cache_bytes=5).kv_nbytes == 5
    assert EngineConfig(model="m", device="cuda", modelled="8b-h100").kv_nbytes == CPU_KV_NBYTES
    with pytest.raises(ValueError, match=r"gpu_memory_utilization .* 1\.5"):
        EngineConfig(model="m", gpu_memory_utilization=1.5)
