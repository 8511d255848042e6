"""The harness: targets, turns, and what `python -m bench` prints."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from bench import harness
from bench.harness import (
    Figure,
    benchmark_names,
    description_of,
    interleave,
    load_benchmark,
    median_of,
    print_table,
    to_json,
)

FIGURES = [
    Figure("throughput", 120.0, "tok/s", target=100.0),
    Figure("ttft", 0.3, "s", target=0.2, better="lower", note="[p99]"),
    Figure("num_requests", 8, "requests"),
]


def test_targets() -> None:
    assert [figure.meets_target for figure in FIGURES] == [True, False, None]
    assert Figure("exact", 0.2, "s", target=0.2, better="lower").meets_target


def test_table_shows_every_figure() -> None:
    output = StringIO()
    print_table(Console(file=output, width=120), "demo", FIGURES)
    rows = {line.split("│")[1].strip(): line for line in output.getvalue().splitlines() if line.startswith("│")}
    assert ">= 100" in rows["throughput"] and "met" in rows["throughput"]
    assert "<= 0.2" in rows["ttft"] and "missed" in rows["ttft"] and "[p99]" in rows["ttft"]
    assert "cores" in output.getvalue()


def test_json_is_one_object() -> None:
    told = json.loads(to_json("demo", FIGURES, harness))
    assert told["name"] == "demo"
    assert told["machine"]["cores"] >= 1
    assert [(figure["key"], figure["meets_target"]) for figure in told["figures"]] == [
        ("throughput", True),
        ("ttft", False),
        ("num_requests", None),
    ]


def test_interleave_takes_turns() -> None:
    calls: list[str] = []

    def record(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    values = interleave(2, {"a": lambda: record("a"), "b": lambda: record("b")})
    assert calls == ["a", "b", "b", "a"]
    assert values == {"a": [1.0, 4.0], "b": [2.0, 3.0]}


def test_median_of() -> None:
    values = iter([9.0, 1.0, 2.0])
    assert median_of(3, lambda: next(values)) == 2.0


def test_unknown_benchmark_is_named() -> None:
    with pytest.raises(ValueError, match="'nope'"):
        load_benchmark("nope")


@pytest.mark.parametrize("name", benchmark_names())
def test_every_benchmark_has_its_parts(name: str) -> None:
    benchmark = load_benchmark(name)
    assert description_of(name) == benchmark.DESCRIPTION
    assert benchmark.DESCRIPTION and "\n" not in benchmark.DESCRIPTION
    assert callable(benchmark.run)
