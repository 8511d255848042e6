from __future__ import annotations

from router.policy import Candidate, DualMap, LeastPending, MostFreeBlocks

POLICY = DualMap(ttft_slo_s=5.0)


def test_affinity_is_the_default() -> None:
    warm = Candidate("p-1", num_cached_tokens=128, num_pending_tokens=1000, prefill_s_per_token=0.001)
    cold = Candidate("p-0", num_pending_tokens=0, prefill_s_per_token=0.001)
    choice = POLICY.choose(200, [cold, warm])
    assert choice.worker_id == "p-1"
    assert choice.reason == "affinity: 128 of 200 tokens cached, TTFT 1.07 s <= 5 s"


def test_load_decides_once_the_slo_is_threatened() -> None:
    warm = Candidate("p-1", num_cached_tokens=128, num_pending_tokens=6000, prefill_s_per_token=0.001)
    cold = Candidate("p-0", num_pending_tokens=100, prefill_s_per_token=0.001)
    choice = POLICY.choose(200, [warm, cold])
    assert choice.worker_id == "p-0"
    assert choice.reason == "load: TTFT 0.30 s, warm p-1 6.07 s > 5 s"


def test_the_warm_one_is_kept_where_nothing_is_lighter() -> None:
    warm = Candidate("p-1", num_cached_tokens=128, num_pending_tokens=6000, prefill_s_per_token=0.001)
    cold = Candidate("p-0", num_pending_tokens=9000, prefill_s_per_token=0.001)
    assert POLICY.choose(200, [warm, cold]).worker_id == "p-1"


def test_between_equally_warm_ones_the_lighter_is_taken() -> None:
    candidates = [Candidate("p-0", num_pending_tokens=50), Candidate("p-1", num_pending_tokens=10)]
    assert POLICY.choose(200, candidates).worker_id == "p-1"


def test_a_prompt_without_home_goes_to_the_least_pending() -> None:
    choice = LeastPending().choose(5, [Candidate("p-0", num_pending_tokens=7), Candidate("p-1", num_pending_tokens=3)])
    assert choice.worker_id == "p-1"
    assert "5 tokens fill no hash block" in choice.reason


def test_decode_goes_where_the_room_is_then_where_fewer_requests_are() -> None:
    roomy = Candidate("d-1", num_blocks=100, num_free_blocks=60, num_requests=9)
    full = Candidate("d-0", num_blocks=100, num_free_blocks=10, num_requests=1)
    choice = MostFreeBlocks().choose(5, [full, roomy])
    assert choice.worker_id == "d-1"
    assert choice.reason == "most room: 60 of 100 blocks free, 9 requests there"
    tied = Candidate("d-2", num_blocks=100, num_free_blocks=60, num_requests=2)
    assert MostFreeBlocks().choose(5, [full, roomy, tied]).worker_id == "d-2"
