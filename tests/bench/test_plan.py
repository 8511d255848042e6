"""What the generator refuses to be asked, by field and value."""

from __future__ import annotations

from typing import Any

import pytest

from bench.load.outcome import Slo
from bench.load.plan import Plan, Target, parse_concurrencies, parse_rates


def test_lists() -> None:
    assert parse_rates("1,2.5, 4") == (1.0, 2.5, 4.0)
    assert parse_concurrencies("1,8") == (1, 8)


@pytest.mark.parametrize("text", ["", "1,,2", "fast"])
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="rate must be numbers with commas between them"):
        parse_rates(text)


def test_half_a_client() -> None:
    with pytest.raises(ValueError, match=r"concurrency must be whole numbers, not 1\.5"):
        parse_concurrencies("1.5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, "exactly one of --rate, --concurrency and --trace"),
        ({"concurrencies": (1,)}, "exactly one of"),
        ({"trace": "file"}, "exactly one of"),
        ({"rates": (1.0, 0.0)}, "rate must be positive, not 0"),
        ({"rates": (-2.0,)}, "rate must be positive, not -2"),
        ({"rates": (float("nan"),)}, "rate must be positive, not nan"),
        ({"rates": (), "concurrencies": (0,)}, "concurrency must be positive, not 0"),
        ({"duration_s": 0.0}, "duration must be positive, not 0"),
        ({"num_requests": -1}, "requests must be positive, not -1"),
        ({"duration_s": 1.0, "num_requests": 1}, "--duration or --requests, not both"),
        ({"burst_size": 0}, "burst-size must be positive"),
        ({"num_prompt_tokens": 0}, "prompt-tokens must be positive"),
        ({"num_output_tokens": 0}, "output-tokens must be positive"),
        ({"speed": 0.0}, "speed must be positive"),
        ({"trace_scale": -1.0}, "trace-scale must be positive"),
        ({"slo": Slo(0.0, 1.0)}, "slo-ttft must be positive"),
        ({"slo": Slo(1.0, 0.0)}, "slo-tpot must be positive"),
        ({"num_shared_tokens": 513}, r"between 0 and prompt-tokens \(512\), not 513"),
        ({"num_shared_tokens": -1}, "shared-prefix-tokens"),
        ({"num_warmup": -1}, "warmup must not be negative, but is -1"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"rates": (1.0,), **changes})


def test_a_level_ends_somewhere() -> None:
    assert Plan(rates=(1.0,)).level_duration_s == 30.0
    assert Plan(rates=(1.0,), num_requests=5).level_duration_s is None
    assert Plan(trace="file").level_duration_s is None


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", ""])
def test_urls_that_cannot_be(url: str) -> None:
    with pytest.raises(ValueError, match="url must begin with http"):
        Target(url)


def test_a_url_may_name_the_version() -> None:
    assert Target("http://h:1/v1/").base_url == Target("http://h:1").base_url == "http://h:1"


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(Target("http://h", token="secret"))
