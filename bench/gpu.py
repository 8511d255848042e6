"""The one run on a machine with a CUDA GPU: first whether the engine is right there, then how fast it is. Sections are
independent: one that fails is reported, the others go on, and the run ends with code 1; `--only decode,fit` chooses.
Random weights and random or poisoned data; no setting of the card is touched."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch

from bench import _gpu_actor, _gpu_engine, _gpu_kernels, _gpu_links, _gpu_peer, _gpu_speed, _gpu_split
from bench._gpu_card import GIB, Card, copy_nbytes_per_s, flops_per_s, nccl_version, read_nbytes_per_s, software
from bench._gpu_models import LLAMA_8B, Shape, loaded_model, plain_model
from bench.harness import Figure
from engine.decode_graphs import CudaRecorder, Recorder
from kvtransfer.config import TransportName
from protos.cost_fit import PhaseFit, fit_costs
from protos.types import KVLayout

DESCRIPTION = "the engine on a CUDA GPU: is it right, and how fast (--only SECTION,SECTION; needs the GPU)"

NO_GPU = 3  # exit code
CONTEXTS = (1024, 8192)
PROMPTS = (2048, 8192, 32768)
LINK_KINDS: tuple[TransportName, ...] = ("cuda_ipc", "nccl", "shared_memory", "gloo")
DECODE_TARGETS = {1: 0.70, 16: 0.65, 64: 0.65}  # of what the measured bandwidth allows
SPLIT_RATES = (2.0, 4.0, 6.0, 8.0)  # requests a second
SPLIT_BLOCKS = (2800, 600, 2200)  # of one process that does both; of the two that do one
PREFILL_TARGET = 0.50  # of the measured peak

Figures = Iterator[Figure]


@dataclass
class Run:
    """What the sections share. Invariant: `bench` is the 8B model on the card, made when it is first wanted."""

    card: Card
    quick: bool
    shape: Shape = LLAMA_8B
    link_layout: KVLayout = _gpu_links.LAYOUT_8B
    facts: dict[str, float] = field(default_factory=dict)
    _bench: _gpu_speed.Bench | None = None

    @property
    def runs(self) -> int:
        return 3 if self.quick else 10

    @property
    def bench(self) -> _gpu_speed.Bench:
        if self._bench is None:
            self.measured("copy")  # while there is room for it
            self.card.give_back()
            tell("making the 8B model with random weights, recording its decode graphs")
            self._bench = _gpu_speed.make_bench(self.card, loaded_model(self.shape, "bfloat16", self.card))
        return self._bench

    def drop_bench(self) -> None:
        self._bench = None
        self.card.give_back()

    def recorder(self) -> Recorder:
        return CudaRecorder(self.card.device)

    def measured(self, name: str) -> float:
        """bandwidth [bytes/s] or flops [1/s], of this card in this run."""
        if not self.facts:
            num_bytes = 4 * GIB if self.card.is_gpu else 1 << 20
            copy = copy_nbytes_per_s(self.card, num_bytes, self.runs)
            read = read_nbytes_per_s(self.card, num_bytes, self.runs)
            peak = flops_per_s(self.card, 8192 if self.card.is_gpu else 64, self.runs)
            self.facts = {"copy": copy, "read": read, "bandwidth": max(copy, read), "flops": peak}
        return self.facts[name]


# --- is it right --------------------------------------------------------------------------------------------------


def card(run: Run) -> Figures:
    yield Figure("copy_on_device", run.measured("copy") / 1e9, "GB/s", note="bytes read plus written")
    yield Figure("read_on_device", run.measured("read") / 1e9, "GB/s", note="matrix times vector")
    yield Figure("peak_bf16", run.measured("flops") / 1e12, "TFLOP/s", note="8192 x 8192 x 8192")


def kernels(run: Run) -> Figures:
    for dtype, cases in itertools.groupby(_gpu_kernels.kernel_cases(), lambda case: case.dtype):
        yield from guarded(f"kernels_{dtype}", kernel_figures(run, dtype, cases))


def kernel_figures(run: Run, dtype: str, cases: Iterable[_gpu_kernels.KernelCase]) -> Figures:
    worst = 0.0
    for case in cases:
        error = _gpu_kernels.worst_error(case, run.card)
        tell(f"{dtype} {error:.2g} {case}")
        worst = math.inf if math.isnan(error) else max(worst, error)
    yield exact(f"kernel_error_{dtype}", worst, "", _gpu_kernels.TOLERANCES[dtype])


def golden(run: Run) -> Figures:
    num_new = 8 if run.quick else _gpu_engine.NUM_NEW_TOKENS
    for dtype, layers in itertools.product(("float32", "bfloat16"), ("", "_fused_kernels")):
        found, late = _gpu_engine.golden_errors(run.card, dtype, run.recorder, num_new, bool(layers))
        for name, wrong in found.items():
            yield exact(f"wrong_tokens_{dtype}_{name}{layers}", wrong, "tokens", 0.0)
        tell(f"compiled after the warm-up: {late}")
        yield exact(f"compiled_late_{dtype}{layers}", len(late), "kernels", 0.0)


def graphs(run: Run) -> Figures:
    num_new = 8 if run.quick else _gpu_engine.NUM_NEW_TOKENS
    different = _gpu_engine.replay_differences(run.card, run.recorder, num_new)
    yield exact("requests_that_replay_changes", different, "requests", 0.0)


def memory(run: Run) -> Figures:
    run.drop_bench()
    loaded = loaded_model(run.shape, "bfloat16", run.card)
    for utilization in (0.5, 0.9):
        left = _gpu_engine.memory_left(run.card, loaded, utilization)
        yield Figure(f"kv_at_{utilization:.0%}", left["kv"], "GiB")
        yield Figure(f"free_at_{utilization:.0%}", left["free"], "GiB", 0.5, note="after the largest step, for links")
        run.card.give_back()


# --- how fast -----------------------------------------------------------------------------------------------------


def decode(run: Run) -> Figures:
    bench = run.bench
    for context in CONTEXTS:
        for batch in sorted({1, 16, 64, _gpu_speed.largest_batch(bench, context)}):
            if batch > _gpu_speed.largest_batch(bench, context):
                continue
            step_s = _gpu_speed.decode_s(bench, batch, context, run.runs)
            allowed_s = _gpu_speed.decode_roofline_s(bench, batch, context, run.measured("bandwidth"))
            key = f"decode_{batch}_at_{context}"
            yield Figure(key, batch / step_s, "tok/s", note=f"{step_s * 1e3:.2f} ms a step")
            yield Figure(f"{key}_of_roofline", allowed_s / step_s, "", DECODE_TARGETS.get(batch))


def fused_kernels(run: Run) -> Figures:
    """Decode and prefill with more of a layer in Triton, beside `decode` and `prefill`."""
    run.drop_bench()
    bench = _gpu_speed.make_bench(run.card, loaded_model(run.shape, "bfloat16", run.card, layer_kernels=True))
    for batch in (1, 16, 64):
        step_s = _gpu_speed.decode_s(bench, batch, CONTEXTS[0], run.runs)
        yield Figure(f"decode_{batch}_at_{CONTEXTS[0]}_fused_kernels", batch / step_s, "tok/s")
    seconds = _gpu_speed.prefill_s(bench, PROMPTS[0], max(3, run.runs // 2))
    yield Figure(f"prefill_{PROMPTS[0]}_fused_kernels", PROMPTS[0] / seconds, "tok/s")


def prefill(run: Run) -> Figures:
    for num_tokens in PROMPTS:
        if num_tokens > run.bench.num_kv_tokens:
            continue
        seconds = _gpu_speed.prefill_s(run.bench, num_tokens, max(3, run.runs // 2))
        share = _gpu_speed.prefill_flops(run.shape, num_tokens) / seconds / run.measured("flops")
        yield Figure(f"prefill_{num_tokens}", num_tokens / seconds, "tok/s", note=f"{seconds * 1e3:.1f} ms")
        yield Figure(f"prefill_{num_tokens}_of_peak", share, "", PREFILL_TARGET)


def fit(run: Run) -> Figures:
    fitted = fit_costs(_gpu_speed.measured_moments(run.bench, runs=3))
    yield from phase_figures("prefill", fitted.prefill)
    yield from phase_figures("decode", fitted.decode)
    hardware = {"cost": asdict(fitted.cost), "num_kv_tokens": run.bench.num_kv_tokens}
    tell(json.dumps(hardware | {"kv_nbytes_per_token": run.bench.kv_nbytes_per_token}))


def phase_figures(name: str, phase: PhaseFit) -> Figures:
    yield Figure(f"fit_{name}_error", phase.relative_error, "", 0.05, "lower", f"{phase.num_steps} steps")
    for coefficient, value in phase.coefficients.items():
        yield Figure(coefficient, value * 1e6, "us", note=f"+- {phase.standard_errors[coefficient] * 1e6:.2g}")


def links(run: Run) -> Figures:
    """Between two processes on this card; NCCL only where it has both of them there."""
    run.drop_bench()
    copied = run.measured("copy") / 2 / 1e9  # bytes that arrive
    for name in LINK_KINDS:
        if name == "nccl" and (refusal := _gpu_links.nccl_refusal(nccl_version())):
            yield Figure("nccl_not_run", 1.0, "", note=refusal)
            continue
        yield from guarded(name, link_figures(run, name, copied))


def link_figures(run: Run, name: TransportName, copied: float) -> Figures:
    plan = link_plan(run, name)
    values = _gpu_links.link_values(plan, run.card, run.runs)
    rate = plan.num_bytes / values["seconds"] / 1e9
    yield exact(f"{name}_wrong_runs", values["wrong"], "runs", 0.0)
    yield Figure(name, rate, "GB/s", note=f"{rate / copied:.1%} of a copy on the device; {plan.num_bytes >> 20} MiB")
    yield Figure(f"{name}_hidden", values["hidden"], "", note="of a move, behind products in the sending process")
    yield Figure(f"{name}_memory", values["nbytes"] / 2**20, "MiB", note="of the card, both ends with staging")
    yield Figure(f"{name}_killed_peer", _gpu_links.killed_peer_s(plan, run.card), "s", 6.0, "lower")


def link_plan(run: Run, name: TransportName) -> _gpu_links.Plan:
    num_blocks = 128 if run.card.is_gpu else 6  # 1 GiB
    return _gpu_links.Plan(name, str(run.card.device), run.link_layout, num_blocks, chunk_blocks=2)


def split(run: Run) -> Figures:
    """With KV for as many tokens in sum, a step budget as large, the same arrivals and promises."""
    run.drop_bench()
    both, prefill_only, decode_only = (
        _gpu_actor.Setting(run.shape, "bfloat16", str(run.card.device), num_blocks) for num_blocks in SPLIT_BLOCKS
    )
    loads = [_gpu_actor.Load(rate, 20 if run.quick else 60, 2048, 128) for rate in SPLIT_RATES]
    note = f"TTFT {loads[0].max_ttft_s:g} s, TPOT {loads[0].max_tpot_s:g} s"
    with _gpu_actor.colocated(both) as serve:
        for load in loads:
            yield Figure(f"goodput_colocated_at_{load.rate:g}", serve(load), "requests/s", note=note)
    del serve  # it holds weights and KV
    run.card.give_back()
    with _gpu_split.split(prefill_only, decode_only, "cuda_ipc", chunk_blocks=2) as serve:
        for load in loads:
            yield Figure(f"goodput_split_at_{load.rate:g}", serve(load), "requests/s", note=note)


def generate(run: Run) -> Figures:
    run.drop_bench()
    model = plain_model(run.shape, "bfloat16", run.card.device, "sdpa")
    for batch in (1, 16, 64):
        rate = _gpu_peer.generate_rate(run.card, model, run.shape, batch, CONTEXTS[0], runs=3)
        yield Figure(f"transformers_generate_{batch}_at_{CONTEXTS[0]}", rate, "tok/s")


def continuous(run: Run) -> Figures:
    run.drop_bench()
    batches = (1, 16, 64)
    rates = _gpu_peer.continuous_rates(run.card, run.shape, "bfloat16", batches, CONTEXTS[0])
    for batch, rate in zip(batches, rates, strict=True):
        yield Figure(f"transformers_continuous_{batch}_at_{CONTEXTS[0]}", rate, "tok/s")


CHECKS = (card, kernels, golden, graphs, memory, links)
SPEEDS = (decode, prefill, fit, fused_kernels, split, generate, continuous)
SECTIONS: dict[str, Callable[[Run], Figures]] = {section.__name__: section for section in (*CHECKS, *SPEEDS)}


def run(quick: bool, only: tuple[str, ...] = ()) -> list[Figure]:
    """SystemExit with code NO_GPU where there is none."""
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA GPU here, nothing was run", file=sys.stderr)
        raise SystemExit(NO_GPU)
    for name, found in software().items():
        tell(f"{name}: {found}")
    state = Run(Card(torch.device("cuda", 0)), quick)
    return [figure for name in only or SECTIONS for figure in section_figures(name, state)]


def section_figures(name: str, state: Run) -> list[Figure]:
    """Told one by one as they are made: a run that is cut off has said what it found."""
    tell(f"== {name}")
    started_at = time.monotonic()
    figures: list[Figure] = []
    for figure in guarded(name, SECTIONS[name](state)):
        figures.append(figure)
        tell(json.dumps({"section": name, **asdict(figure)}))
    state.card.give_back()
    tell(f"== {name}: {time.monotonic() - started_at:.0f} s")
    return figures


def guarded(name: str, figures: Figures) -> Figures:
    """What goes wrong in them becomes the last of them."""
    try:
        yield from figures
    except Exception as error:  # noqa: BLE001  # whatever it is, what comes next may still have something to say
        tell(traceback.format_exc())
        last_line = traceback.format_exception_only(error)[-1].strip()
        yield Figure(f"{name}_failed", 1.0, "", 0.0, "lower", last_line[:200])


def exit_code(figures: list[Figure]) -> int:
    """1 where something is wrong; a figure that misses its speed is not."""
    return int(any(f.better == "lower" and f.meets_target is False and not f.key.startswith("fit_") for f in figures))


def exact(key: str, value: float, unit: str, most: float) -> Figure:
    return Figure(key, math.inf if math.isnan(value) else value, unit, most, "lower")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
