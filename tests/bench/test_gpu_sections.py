"""The sections of `scripts/bench gpu` at sizes that mean nothing, on the CPU: that they run, and that what is wrong is
told. What they find on a GPU is not tested here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bench import _gpu_engine, _gpu_kernels, _gpu_links, _gpu_speed, gpu
from bench._gpu_card import Card
from bench._gpu_kernels import KernelCase, worst_error
from bench._gpu_models import Shape, loaded_model
from bench.harness import Figure
from engine import triton_attention
from protos.types import KVLayout
from tests.engine.test_device_runner import EagerRecorder

TINY = Shape(64, 128, 2, 4, 2, 300, 512)
CPU = Card(torch.device("cpu"))
CASE = KernelCase(((0, 1), (20, 1), (3, 5)), "float32", num_heads=4, head_dim=32, block_size=16)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    monkeypatch.setattr(gpu, "CONTEXTS", (40,))
    monkeypatch.setattr(gpu, "PROMPTS", (70,))
    monkeypatch.setattr(gpu.Run, "recorder", lambda run: EagerRecorder())
    made = gpu.Run(CPU, quick=True, shape=TINY)
    made._bench = _gpu_speed.make_bench(CPU, loaded_model(TINY, "float32", CPU), num_blocks=100)
    return made


@pytest.mark.parametrize("name", ["card", "decode", "prefill", "generate"])
def test_a_section_gives_figures(state: gpu.Run, name: str) -> None:
    figures = gpu.section_figures(name, state)
    assert figures and gpu.exit_code(figures) == 0
    assert all(math.isfinite(figure.value) and figure.value > 0 for figure in figures)


@pytest.mark.slow
def test_links_are_measured_between_two_processes(state: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the kinds that need no GPU."""
    monkeypatch.setattr(gpu, "LINK_KINDS", ("shared_memory",))
    state.link_layout = KVLayout("random", "bfloat16", 2, 2, 16, 16, 16, itemsize=2)
    figures = {figure.key: figure for figure in gpu.section_figures("links", state)}
    assert figures["shared_memory_wrong_runs"].value == 0
    assert figures["shared_memory"].value > 0
    assert figures["shared_memory_killed_peer"].meets_target
    assert gpu.exit_code(list(figures.values())) == 0


def test_bytes_that_changed_on_the_way_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout("random", "bfloat16", 2, 2, 16, 16, 16, itemsize=2)
    plan = _gpu_links.Plan("gloo", "cpu", layout, 6, 2)
    with _gpu_links.linked(plan, CPU) as pair:
        assert pair.move()[1]
        wait = pair.link.wait
        monkeypatch.setattr(pair.link, "wait", lambda number: wait(number).bitwise_not_())
        assert not pair.move()[1]


def test_nccl_is_tried_where_it_takes_two_ranks_on_one_card() -> None:
    assert "2.28.9 refuses" in _gpu_links.nccl_refusal((2, 28, 9))
    assert not _gpu_links.nccl_refusal((2, 30, 1))


def test_costs_are_fitted_to_the_steps_of_a_grid(state: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def grid(bench: _gpu_speed.Bench) -> Iterator[object]:
        for size in (1, 2, 4, 8):
            for length in (20, 60, 150):
                yield _gpu_speed.decode_step(bench, size, length).scheduled
                yield _gpu_speed.prefill_steps(bench, 10 * size, length)[0].scheduled

    monkeypatch.setattr(_gpu_speed, "_grid", grid)
    figures = {figure.key for figure in gpu.section_figures("fit", state)}
    assert {"decode_base_s", "prefill_s_per_token", "fit_decode_error"} <= figures


def test_right_kernels_pass_and_wrong_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst_error(CASE, CPU) < 1e-6
    assert worst_error(replace(CASE, window=9, softcap=3.0), CPU) < 1e-6
    attend = triton_attention.attend

    def off_by_one(rows: torch.Tensor, layer: int, step: object, *rest: object) -> torch.Tensor:
        step.kv_lens[1] -= 1  # type: ignore[attr-defined]
        return attend(rows, layer, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_attention, "attend", off_by_one)
    assert worst_error(CASE, CPU) > 1e-3


def test_the_cases_cover_every_dtype() -> None:
    assert {case.dtype for case in _gpu_kernels.kernel_cases()} == set(_gpu_kernels.TOLERANCES)


def test_golden_tokens_are_right_and_others_are_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (1, 5)
    monkeypatch.setattr(_gpu_engine, "LENGTHS", lengths)
    monkeypatch.setattr(_gpu_engine, "NUM_BLOCKS", 8)
    monkeypatch.setattr(_gpu_engine, "prompts", lambda: [[7], [1, 2, 3, 4, 5]])
    monkeypatch.setattr(_gpu_engine, "SMALL", replace(_gpu_engine.SMALL, num_layers=1))
    wrong, _ = _gpu_engine.golden_errors(CPU, "float32", EagerRecorder, 2)
    assert wrong == {"torch": 0, "launched": 0, "replayed": 0}
    _, reference = _gpu_engine.golden_pair(CPU, "float32")
    assert _gpu_engine.wrong_tokens(reference, [[7]], [[0, 0, 0, 0]], 0.0) > 0


def test_a_section_that_fails_is_told_and_the_run_goes_on(
    state: gpu.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: gpu.Run) -> gpu.Figures:
        yield Figure("before", 1.0, "")
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.SECTIONS, "decode", broken)
    figures = gpu.section_figures("decode", state)
    assert [figure.key for figure in figures] == ["before", "decode_failed"]
    assert figures[1].note == "RuntimeError: no kernel image"
    assert gpu.exit_code(figures) == 1
    assert '"key": "before"' in capsys.readouterr().err
    assert gpu.exit_code([gpu.exact("wrong_tokens", 1, "tokens", 0.0)]) == 1
    assert gpu.exit_code([gpu.exact("error", math.nan, "", 0.1)]) == 1
    assert gpu.exit_code([Figure("decode_1_of_roofline", 0.1, "", 0.7)]) == 0, "slow is not wrong"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpu.run(quick=True)
    assert exit_.value.code == gpu.NO_GPU
    assert capsys.readouterr().err == "gpu: there is no CUDA GPU here, nothing was run\n"
