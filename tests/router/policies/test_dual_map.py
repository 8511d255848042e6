from __future__ import annotations

from router.policies.dual_map import DualMap
from router.policy import Choice
from tests.router.policies.view import FakeView, Load

POLICY = DualMap(ttft_slo_s=5.0)
WARM, COLD = FakeView({"p-0": Load(), "p-1": Load()}).home


def place(warm: Load, cold: Load, policy: DualMap = POLICY) -> Choice:
    return policy.place(FakeView({WARM: warm, COLD: cold}, num_tokens=200))


def test_affinity_is_the_default() -> None:
    choice = place(Load(1000, num_cached_tokens=128), Load(0))
    assert choice.worker_id == WARM
    assert choice.reason == "affinity: 128 of 200 tokens cached, TTFT 1.07 s <= 5 s"


def test_load_decides_once_the_slo_is_threatened() -> None:
    choice = place(Load(6000, num_cached_tokens=128), Load(100))
    assert choice.worker_id == COLD
    assert choice.reason == f"load: TTFT 0.30 s, warm {WARM} 6.07 s > 5 s"


def test_without_the_slo_switch_load_never_decides() -> None:
    choice = place(Load(6000, num_cached_tokens=128), Load(100), DualMap(5.0, has_slo_switch=False))
    assert (choice.worker_id, choice.reason) == (WARM, "affinity: 128 of 200 tokens cached, whatever its load")


def test_the_slo_is_the_limit_to_the_token() -> None:
    assert place(Load(4928, num_cached_tokens=128), Load(0)).worker_id == WARM  # 5.000 s
    assert place(Load(4929, num_cached_tokens=128), Load(0)).worker_id == COLD


def test_the_warm_one_is_kept_where_nothing_is_lighter() -> None:
    choice = place(Load(6000, num_cached_tokens=128), Load(9000))
    assert choice.worker_id == WARM
    assert choice.reason == "affinity: 128 of 200 tokens cached, TTFT 6.07 s, and no candidate is lighter"


def test_between_equally_warm_ones_the_lighter_is_taken() -> None:
    assert place(Load(50), Load(10)).worker_id == COLD
    assert place(Load(10), Load(50)).worker_id == WARM


def test_nobody_but_the_pair_is_considered() -> None:
    idle = {f"p-{index}": Load() for index in range(8)}
    home = FakeView(idle).home
    choice = POLICY.place(FakeView({**idle, **{one: Load(10**6) for one in home}}, num_tokens=200))
    assert choice.worker_id in home


def test_a_prompt_without_home_goes_to_the_least_pending() -> None:
    choice = POLICY.place(FakeView({"p-0": Load(7), "p-1": Load(3)}, num_tokens=5))
    assert choice.worker_id == "p-1"
    assert choice.reason == "no home: 5 tokens fill no hash block; lightest with 3 tokens pending"
