"""Two actors and one, on the CPU at a size that means nothing: every request is served, over a real link."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench._gpu_actor import Load, Setting, Times, colocated
from bench._gpu_models import Shape
from bench._gpu_split import split
from protos.types import TokenOutput

TINY = Shape(64, 128, 2, 4, 2, 300, 512)
SETTING = Setting(TINY, "float32", "cpu", 200, block_size=16, max_num_batched_tokens=64, max_num_seqs=8)
LOAD = Load(rate=50.0, num_requests=6, prompt_len=70, num_new=5, max_ttft_s=60.0, max_tpot_s=60.0)


def test_one_actor_serves_all() -> None:
    with colocated(SETTING) as serve:
        assert serve(LOAD) > 0
        assert serve(replace(LOAD, max_tpot_s=1e-9)) == 0.0


@pytest.mark.slow
def test_two_actors_serve_all() -> None:
    with split(SETTING, SETTING, "shared_memory", 2) as serve:
        assert serve(LOAD) > 0
        assert serve(LOAD) > 0


def test_goodput_counts_who_got_both_promises() -> None:
    load = Load(rate=1.0, num_requests=3, prompt_len=1, num_new=3, max_ttft_s=1.0, max_tpot_s=0.5)
    times = Times()
    for name, at in (("0", (0.5, 0.9, 1.4)), ("1", (3.5, 3.6, 3.7)), ("2", (4.2, 5.0, 5.5))):
        for index, moment in enumerate(at):
            times.note(TokenOutput(name, 1, index, (7,)), moment)
    assert times.is_complete(load)
    assert times.goodput(load, [0.0, 2.0, 4.0]) == 1 / 5.5  # the second came late, the third goes on too slowly
