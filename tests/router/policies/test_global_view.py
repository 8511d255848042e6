from __future__ import annotations

from math import inf

from router.policies.global_view import ExploitExplore, MinTtft, OverlapCost, Threshold
from tests.router.policies.view import PREFILL_S_PER_TOKEN, FakeView, Load

PULL_S = PREFILL_S_PER_TOKEN / 5


def view(*loads: Load, pull_s: float = PULL_S) -> FakeView:
    named = {f"p-{index}": load for index, load in enumerate(loads)}
    return FakeView(named, num_tokens=1000, pull_s_per_token=pull_s)


THRESHOLD = Threshold(min_match_share=0.5, max_imbalance_tokens=2000, max_imbalance_ratio=1.5)


def test_threshold_takes_the_longest_match_while_the_pool_is_balanced() -> None:
    choice = THRESHOLD.place(view(Load(100), Load(2100, num_cached_tokens=512), Load(0, num_cached_tokens=496)))
    assert choice.worker_id == "p-2"  # 2100 tokens apart: unbalanced
    choice = THRESHOLD.place(view(Load(100), Load(2100, num_cached_tokens=512), Load(100, num_cached_tokens=496)))
    assert (choice.worker_id, choice.reason) == ("p-1", "longest match: 512 of 1000 tokens cached")


def test_threshold_is_unbalanced_only_by_amount_and_by_ratio() -> None:
    far_but_alike = view(Load(10_000), Load(13_000, num_cached_tokens=512))
    assert THRESHOLD.place(far_but_alike).worker_id == "p-1"
    assert THRESHOLD.place(view(Load(10_000), Load(16_000, num_cached_tokens=512))).worker_id == "p-0"


def test_threshold_takes_the_shortest_queue_where_no_match_is_long_enough() -> None:
    choice = THRESHOLD.place(view(Load(100), Load(200, num_cached_tokens=496)))
    assert choice.worker_id == "p-0"
    assert choice.reason == "shortest queue: 100 tokens pending, at most 496 of 1000 tokens cached"


def test_min_ttft_weighs_the_match_against_the_queue() -> None:
    assert MinTtft(pulls=False).place(view(Load(0), Load(700, num_cached_tokens=800))).worker_id == "p-1"
    assert MinTtft(pulls=False).place(view(Load(0), Load(900, num_cached_tokens=800))).worker_id == "p-0"


def test_min_ttft_moves_the_longest_match_where_that_is_quicker() -> None:
    seen = view(Load(0), Load(700, num_cached_tokens=800), Load(100))
    choice = MinTtft(pulls=True).place(seen)
    assert (choice.worker_id, choice.sources) == ("p-0", ("p-1",))
    assert choice.reason == "least of 3: TTFT 0.36 s with 0 tokens cached and 800 pulled"
    stays = MinTtft(pulls=True).place(view(Load(0), Load(700, num_cached_tokens=800), pull_s=inf))
    assert (stays.worker_id, stays.sources) == ("p-1", ())


def test_exploit_takes_a_match_of_half_whatever_the_queue() -> None:
    policy = ExploitExplore(min_match_share=0.5, pulls=False)
    assert policy.place(view(Load(0), Load(10**6, num_cached_tokens=512))).worker_id == "p-1"
    assert policy.place(view(Load(0), Load(10**6, num_cached_tokens=496))).worker_id == "p-0"
    lighter = policy.place(view(Load(10**6, num_cached_tokens=512), Load(9, num_cached_tokens=512), Load(0)))
    assert (lighter.worker_id, lighter.reason) == ("p-1", "exploit: 512 of 1000 tokens cached")


def test_explore_may_move_a_short_match() -> None:
    seen = view(Load(0), Load(900, num_cached_tokens=480))
    choice = ExploitExplore(min_match_share=0.5, pulls=True).place(seen)
    assert (choice.worker_id, choice.sources) == ("p-0", ("p-1",))
    assert ExploitExplore(min_match_share=0.5, pulls=False).place(seen).sources == ()


def test_overlap_weighs_blocks_to_compute_against_blocks_held() -> None:
    seen = view(Load(0, num_held_blocks=50), Load(320, num_cached_tokens=320, num_held_blocks=20), Load(400))
    # Blocks to compute: 62.5, 62.5, 87.5; held: 50, 20, 0.
    assert OverlapCost(overlap_weight=1.0, block_size=16).place(seen).worker_id == "p-1"
    assert OverlapCost(overlap_weight=0.5, block_size=16).place(seen).worker_id == "p-2"
    assert OverlapCost(overlap_weight=9.0, block_size=16).place(seen).reason.startswith("overlap: cost 582.5 blocks")
