"""What stands in for a model: how long its steps last, what it says, what it has of the model it stands in for."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import DEMO_MODEL
from engine.config import SchedulerConfig
from engine.local_engine import LocalEngine
from engine.model_facts import read_model_facts
from engine.modelled_runner import ModelledRunner, next_token
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.step_work import StepWork, work_of
from engine.worker_config import EngineConfig
from engine.worker_core import WorkerCore
from protos.cost_model import HARDWARE
from protos.types import GenerateRequest, Logprobs, SamplingParams

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=5)
HARDWARE_ROW = HARDWARE["8b-h100"]
COST = HARDWARE_ROW.cost
BUDGET = 16


def scheduled(num_tokens: int, num_computed: int, num_new: int, num_prompt_tokens: int = 4) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="r",
        token_ids=array("i", range(num_tokens)),
        num_prompt_tokens=num_prompt_tokens,
        num_computed_tokens=num_computed,
        num_scheduled_tokens=num_new,
        block_table=[],
        sampling_params=GREEDY,
        samples=num_computed + num_new == num_tokens,
    )


def output_of(*step: ScheduledRequest) -> SchedulerOutput:
    return SchedulerOutput(1, step, sum(each.num_scheduled_tokens for each in step))


def test_a_step_is_told_apart_into_chunks_and_decodes() -> None:
    step = [scheduled(10, 0, 8), scheduled(10, 8, 1), scheduled(10, 9, 1), scheduled(10, 4, 6), scheduled(30, 29, 1)]
    work = work_of(step)
    assert work == StepWork(((8, 0), (1, 8), (6, 4)), num_seqs=2, num_kv_tokens=40)
    assert work.step_s(COST) == COST.step_s([(8, 0), (1, 8), (6, 4)], 2, 40)


def run(
    *lengths: int, params: SamplingParams = GREEDY
) -> tuple[dict[str, list[int]], list[float], dict[str, list[int]]]:
    """Outputs, how long each step lasted, and prompts, of requests that come together."""
    steps_s: list[float] = []
    config = SchedulerConfig(max_model_len=256, max_num_batched_tokens=BUDGET, block_size=8, hash_block_size=8)
    core = WorkerCore(config, num_blocks=64, hash_key=bytes(32), model_fingerprint="model")
    prompts = {f"r{i}": list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths)}
    requests = [
        GenerateRequest(request_id, request_id, 0, array("i", prompt), len(prompt), params)
        for request_id, prompt in prompts.items()
    ]
    outputs = LocalEngine(core, ModelledRunner(COST, steps_s.append), clock=lambda: 0.0).generate(requests)
    return outputs, steps_s, prompts


@given(st.integers(2, 60))
def test_a_request_alone_takes_what_the_cost_model_says(length: int) -> None:
    outputs, steps_s, prompts = run(length)
    assert outputs == {"r0": [prompts["r0"][i % length] for i in range(GREEDY.max_tokens)]}
    num_prefills = -(-length // BUDGET)
    decodes_s = [COST.decode_s(1, length + i) for i in range(1, GREEDY.max_tokens)]
    assert steps_s[num_prefills:] == pytest.approx(decodes_s)
    if length % BUDGET != 1:  # a last chunk of one token counts as a decode
        assert sum(steps_s[:num_prefills]) == pytest.approx(COST.prompt_s(length, 0, BUDGET))


def test_requests_share_steps() -> None:
    together, alone = run(6, 7), run(6)
    assert together[0]["r0"] == alone[0]["r0"]
    assert together[1][0] == pytest.approx(COST.prefill_s([(6, 0), (7, 0)]))
    assert together[1][1] == pytest.approx(COST.decode_s(2, 7 + 8))


def test_no_token_ends_a_request_before_its_time() -> None:
    stops = replace(GREEDY, stop_token_ids=(0, 1, 3))
    outputs, _, _ = run(4, params=stops)
    assert outputs["r0"] == [2, 2, 2, 2, 2]


def test_the_next_token_depends_on_the_prompt_and_the_place_alone() -> None:
    """Another attempt, which has the earlier output as given, must go on as this one did."""
    one = scheduled(7, 6, 1)
    assert next_token(one) == next_token(
        replace(one, request_id="other", num_computed_tokens=0, num_scheduled_tokens=7)
    )


def test_log_probabilities_are_there_where_asked_for() -> None:
    asked = replace(scheduled(4, 0, 4), sampling_params=replace(GREEDY, num_logprobs=2))
    result = ModelledRunner(COST, lambda _: None).execute(output_of(asked))
    assert result.logprobs == {"r": (Logprobs(0.0),)}
    assert ModelledRunner(COST, lambda _: None).execute(output_of(scheduled(4, 0, 4))).logprobs == {}


# --- settings -----------------------------------------------------------------------------------------------------


def test_what_stands_in_has_the_models_tokens_and_the_hardwares_memory() -> None:
    engine = EngineConfig(model=DEMO_MODEL, modelled="8b-h100")
    facts = read_model_facts(DEMO_MODEL)
    assert facts.as_run_by(EngineConfig(model=DEMO_MODEL)) is facts
    modelled = facts.as_run_by(engine)
    assert (modelled.vocab_size, modelled.eos_token_ids) == (facts.vocab_size, facts.eos_token_ids)
    assert modelled.max_model_len == HARDWARE_ROW.num_kv_tokens > facts.max_model_len
    assert modelled.kv_layout("float32", 64, 64).block_nbytes == 16 * 64
    assert engine.fixed_num_blocks == HARDWARE_ROW.num_kv_tokens // 64
    assert replace(engine, num_blocks=7).fixed_num_blocks == 7
    assert EngineConfig(model=DEMO_MODEL, modelled=HARDWARE_ROW).modelled_hardware == HARDWARE_ROW


def test_what_cannot_be_modelled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"modelled must be one of 8b-a100, .*, or costs and memory, not 'abacus'"):
        EngineConfig(model=DEMO_MODEL, modelled="abacus")
    with pytest.raises(ValueError, match="must make at least one block"):
        EngineConfig(model=DEMO_MODEL, modelled=replace(HARDWARE_ROW, num_kv_tokens=63))
