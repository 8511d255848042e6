"""The generator: equal seeds, growing contexts, and the shares and tails that the presets promise."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from random import Random

import pytest

from simulator.generator import PRESETS, Lengths, generate, preset
from simulator.requests import SimRequest
from simulator.transforms import ideal_hit_rate, rate_of

NUM_REQUESTS = 4000


@pytest.fixture(scope="module", params=PRESETS)
def generated(request: pytest.FixtureRequest) -> tuple[str, tuple[SimRequest, ...]]:
    return request.param, generate(preset(request.param), NUM_REQUESTS, Random(7))


def dispersion(requests: tuple[SimRequest, ...], window_s: float) -> float:
    """Variance of the counts per window over their mean: 1 for arrivals that know nothing of each other."""
    counts = Counter(int(request.at_s // window_s) for request in requests)
    per_window = [counts[index] for index in range(max(counts))]
    return statistics.pvariance(per_window) / statistics.mean(per_window)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("seed", "num_requests"), [(0, 1), (3, 50)])
def test_equal_seeds_give_equal_requests(name: str, seed: int, num_requests: int) -> None:
    requests = generate(preset(name), num_requests, Random(seed))
    assert len(requests) == num_requests and requests[0].at_s == 0
    assert requests == generate(preset(name), num_requests, Random(seed))
    assert requests != generate(preset(name), num_requests, Random(seed + 1))


def test_requests_come_in_order_and_contexts_only_grow(generated: tuple[str, tuple[SimRequest, ...]]) -> None:
    _, requests = generated
    assert [r.at_s for r in requests] == sorted(r.at_s for r in requests)
    sessions: dict[str, list[SimRequest]] = defaultdict(list)
    for request in requests:
        sessions[request.session].append(request)
    for turns in sessions.values():
        for earlier, later in itertools.pairwise(turns):
            assert later.at_s > earlier.at_s
            assert later.num_prompt_tokens > earlier.num_prompt_tokens + earlier.num_output_tokens
            assert later.hash_ids[: len(earlier.hash_ids)] == earlier.hash_ids


def test_sessions_share_nothing_but_their_common_prefix(generated: tuple[str, tuple[SimRequest, ...]]) -> None:
    _, requests = generated
    longest = {request.session: request.hash_ids for request in requests}  # the last turn's
    users = Counter(hash_id for ids in longest.values() for hash_id in ids)
    assert max(users.values()) > 20  # a popular prefix
    for ids in longest.values():
        num_shared = sum(users[hash_id] > 1 for hash_id in ids)
        assert all(users[hash_id] > 1 for hash_id in ids[:num_shared])  # at the beginning only


def test_shares_and_tails(generated: tuple[str, tuple[SimRequest, ...]]) -> None:
    name, requests = generated
    prompts = sorted(request.num_prompt_tokens for request in requests)
    outputs = sorted(request.num_output_tokens for request in requests)
    median, p99 = prompts[NUM_REQUESTS // 2], prompts[NUM_REQUESTS * 99 // 100]
    slow = generate(preset(name), NUM_REQUESTS, Random(7), 1.0)  # long enough to see most sessions whole
    turns = Counter(request.session for request in slow).values()
    if name == "tool_agent":
        assert 0.65 < ideal_hit_rate(requests) < 0.85
        assert p99 > 7 * median and 4_000 < median < 10_000
        assert outputs[NUM_REQUESTS * 99 // 100] > 6 * outputs[NUM_REQUESTS // 2]
        assert dispersion(requests, 10.0) > 2.0
        assert statistics.median(turns) <= 2 and max(turns) > 20
    else:
        assert ideal_hit_rate(requests) > 0.9
        assert statistics.median(turns) > 20
        assert p99 > 2.5 * median


def test_the_load_is_as_high_at_the_beginning_as_later(generated: tuple[str, tuple[SimRequest, ...]]) -> None:
    _, requests = generated
    half = NUM_REQUESTS // 2
    assert rate_of(requests[:half]) == pytest.approx(rate_of(requests[half:]), rel=0.3)


def test_lengths_are_clipped_and_their_median_is_theirs() -> None:
    drawn = sorted(Lengths(100, 1.0, 400).draw(Random(seed)) for seed in range(2000))
    assert drawn[0] >= 1 and drawn[-1] == 400
    assert drawn[1000] == pytest.approx(100, rel=0.1)
    with pytest.raises(ValueError, match="median >= 1"):
        Lengths(0, 1.0, 400)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="generate must be one of tool_agent, long_sessions, not 'chat'"):
        preset("chat")
    with pytest.raises(ValueError, match="requests must be positive, not 0"):
        generate(preset("tool_agent"), 0, Random(0))
