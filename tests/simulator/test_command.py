"""`twinring simulate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from simulator.plan import parse_workers
from simulator.result import Summary

QUICK = ["--generate", "tool_agent", "--requests", "30", "--workers", "2p1d", "--seeds", "1", "--rate", "2"]
SUMMARY_KEYS = set(Summary.__dataclass_fields__)


def simulate(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    return result.exit_code, result.stdout, result.stderr


def write_trace(path: Path, *bad_lines: str) -> Path:
    lines = [
        json.dumps({"timestamp": 300 * i, "input_length": 2000, "output_length": 4, "hash_ids": [9**30, 7 * i, 8, 9]})
        for i in range(10)
    ]
    path.write_text("\n".join([*lines, *bad_lines]))
    return path


def results(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "results.json"
    code, _, err = simulate(*arguments, "--json", str(path))
    assert code == 0, err
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


def test_table_json_and_figure(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("results.json", "figure.svg")]
    options = ["--policy", "dual_map,least_loaded", "--json", str(files[0]), "--figure", str(files[1])]
    code, out, err = simulate(*QUICK, "--rate", "1,3", *options)
    assert code == 0, err
    assert "dual_map" in out and "least_loaded" in out and "goodput" in out and "reference" in out
    assert "runs" in err
    svg = files[1].read_text()
    assert "<svg" in svg and svg.count("<path") > 20
    document = json.loads(files[0].read_text())
    assert set(document) == {"format", "version", "notes", "trace", "setup", "reference", "goodput", "cases"}
    assert (document["format"], document["version"]) == ("twinring-simulate", 1)
    assert set(document["goodput"]) == {"dual_map", "least_loaded"} == set(document["setup"]["variants"])
    asked = [(case["variant"], case["rate"]) for case in document["cases"] if not case["is_searched"]]
    assert asked == [(name, rate) for name in ("dual_map", "least_loaded") for rate in (1.0, 3.0)]
    assert all(set(case["summary"]) == SUMMARY_KEYS for case in document["cases"])
    assert all(10 < case["summary"]["num_finished"] < 20 for case in document["cases"])  # after the warm-up


def test_equal_options_give_equal_results(tmp_path: Path) -> None:
    options = [*QUICK, "--policy", "home_pair", "--no-search"]
    first = results(tmp_path, *options)
    assert results(tmp_path, *options) == first
    assert results(tmp_path, *options, "--seed", "1")["cases"] != first["cases"]


def test_processes_change_nothing(tmp_path: Path) -> None:
    options = [*QUICK, "--rate", "1,60", "--seeds", "2", "--slo-ttft", "0.4", "--drop", "8000"]
    alone = results(tmp_path, *options)
    assert results(tmp_path, *options, "--jobs", "2") == alone
    assert any(case["is_searched"] for case in alone["cases"])
    assert alone["goodput"]["dual_map"]["bound"] == "found"


def test_every_policy_runs_under_every_order(tmp_path: Path) -> None:
    orders, policies = ("first_come", "moore_hodgson"), ("dual_map", "home_pair:num_sampled=1")
    options = ["--policy", ",".join(policies), "--queue-order", ",".join(orders), "--no-search"]
    variants = results(tmp_path, *QUICK, *options)["setup"]["variants"]
    assert list(variants) == [f"{policy}, {order}" for policy in policies for order in orders]
    assert variants["home_pair:num_sampled=1, moore_hodgson"]["policy"]["num_sampled"] == 1
    assert variants["dual_map, moore_hodgson"]["queue_order"] == "moore_hodgson"
    assert variants["dual_map, moore_hodgson"]["dispatch_tokens"] == 2 * 8192


def test_settings_reach_the_cluster(tmp_path: Path) -> None:
    settings = ["router.key_depth_blocks=1", "scheduler.max_num_batched_tokens=1024", "link_nbytes_per_s=1.25e9"]
    options = [word for setting in settings for word in ("--set", setting)]
    document = results(tmp_path, *QUICK, *options, "--kv-tokens", "100000", "--no-search")
    assert document["setup"]["variants"]["dual_map"]["key_depth_blocks"] == 1
    assert document["setup"]["variants"]["dual_map"]["dispatch_tokens"] == 2048
    assert document["setup"]["scheduler"]["max_num_batched_tokens"] == 1024
    assert document["setup"]["link_nbytes_per_s"] == 1.25e9
    assert document["setup"]["hardware"]["num_kv_tokens"] == 100_000


def test_traces_with_bad_lines_stop_or_go_on(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl", '{"timestamp": 3', "[]")
    options = ["--trace", str(path), "--workers", "1p", "--rate", "1", "--seeds", "1", "--no-search"]
    code, _, err = simulate(*options)
    assert code == 1
    assert "2 lines of the trace cannot be read (line 11: not JSON" in err and "line 12: not an object" in err
    document = results(tmp_path, *options, "--skip-bad-lines", "--cut", "1000")
    assert "2 lines of the trace left out" in document["notes"][0]
    assert (document["trace"]["num_requests"], document["trace"]["num_prompt_tokens_mean"]) == (10, 1000)


def test_rates_by_more_sessions_or_by_compression(tmp_path: Path) -> None:
    """A preset is made anew for a rate, a trace is compressed; either can be asked to do as the other."""
    options = [*QUICK, "--requests", "100", "--rate", "1,20", "--no-search"]
    kept, compressed = (results(tmp_path, *options, *more) for more in ([], ["--sessions", "compress"]))
    ideal = [[case["summary"]["ideal_hit_rate"] for case in document["cases"]] for document in (kept, compressed)]
    assert ideal[0][0] > ideal[0][1] and ideal[1][0] == ideal[1][1]
    for document in (kept, compressed):
        offered = [case["summary"]["offered_rate"] for case in document["cases"]]
        assert offered == pytest.approx([1, 20], rel=0.1)
    trace = ["--trace", str(write_trace(tmp_path / "trace.jsonl")), "--workers", "1p", "--seeds", "1", "--no-search"]
    counts = [
        results(tmp_path, *trace, "--rate", "4", "--sessions", how)["cases"][0]["summary"]["num_requests"]
        for how in ("compress", "keep")
    ]
    assert counts[0] == 10 > counts[1] >= 2


def test_what_happens_in_mid_run_is_shown_over_time(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("results.json", "figure.svg")]
    options = [
        "--workers",
        "3p",
        "--fail",
        "5:prefill-1,prefill-2",
        "--join",
        "10:prefill*1",
        "--window",
        "4",
        "--warmup",
        "5",
    ]
    outputs = ["--json", str(files[0]), "--figure", str(files[1]), "--no-search"]
    code, out, err = simulate(*QUICK, *options, *outputs)
    assert code == 0, err
    assert "In both SLOs by arrival, at 2 requests/s" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("4.0", "8.0", "12.0"))]
    assert rows[0][-3:] == ["fail", "prefill-1,", "prefill-2"] and rows[1][-2:] == ["join", "prefill-3"]
    assert len(rows[2]) == 3
    document = json.loads(files[0].read_text())
    assert [change["worker_id"] for change in document["setup"]["changes"]] == ["prefill-1", "prefill-2", "prefill-3"]
    (case,) = document["cases"]
    assert [window[0] for window in case["attainment"]][:3] == [0, 4, 8]
    num_requests = sum(num_requests for _, num_requests, _, _ in case["attainment"])
    assert case["summary"]["num_requests"] < num_requests == document["trace"]["num_requests"] == 30
    assert files[1].stat().st_size > 10_000
    code, out, _ = simulate(*QUICK, "--no-search")
    assert code == 0 and "by arrival" not in out


def test_short_runs_have_a_load_too(tmp_path: Path) -> None:
    (case,) = results(tmp_path, *QUICK, "--no-search", "--rate", "10")["cases"]
    assert len(case["load"]) >= 10
    assert 0 < case["summary"]["load_cv"] <= 1


def test_json_alone_on_standard_output() -> None:
    code, out, err = simulate(*QUICK, "--no-search", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["trace"]["source"] == "tool_agent"
    assert "policy" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "rate must be positive, not '0'"),
        (["--rate=-3..4"], "rate must be positive, not '-3'"),
        (["--workers", "0p2d"], "workers must be positive, not '0p2d'"),
        (["--workers", "8x"], "workers must be like 8p8d, 8p (prefill alone) or 8c (colocated), not '8x'"),
        (["--policy", "best"], "policy name cannot be 'best': Input should be 'round_robin', 'random',"),
        (["--policy", "home_pair:sampled=2"], "unknown setting policy home_pair: sampled; known: "),
        (["--policy", "home_pair:num_sampled=-1"], "num_sampled must be at least 0, got -1"),
        (["--policy", "dual_map,dual_map"], "every variant is to be named once"),
        (["--queue-order", "last_come"], "queue_order cannot be 'last_come': Input should be 'first_come',"),
        (["--hardware", "abacus"], "hardware must be one of 8b-a100, 8b-h100"),
        (["--generate", "chat"], "generate must be one of tool_agent, long_sessions, not 'chat'"),
        (["--trace", "file"], "exactly one of --trace and --generate"),
        (["--seeds", "0"], "seeds must be positive, not 0"),
        (["--jobs", "0"], "jobs must be positive, not 0"),
        (["--requests", "-5"], "requests must be positive, not -5"),
        (["--requests", "1"], "1 requests have no rate"),
        (["--warmup", "30"], "warmup 30 leaves none of 30 requests"),
        (["--kv-tokens", "0"], "kv-tokens must be positive, not 0"),
        (["--jitter", "3"], "jitter is for traces with coarse ticks"),
        (["--sessions", "faster"], "sessions must be keep or compress, not 'faster'"),
        (["--cut", "0"], "cut must be positive, not 0"),
        (["--slo-ttft", "0.001"], "slo-ttft 0.001 s cannot be met"),
        (["--slo-tpot", "0.001"], "slo-tpot 0.001 s cannot be met"),
        (["--slo-ttft", "-1"], "slo-ttft must be positive, not -1"),
        (["--dispatch-tokens", "-1"], "dispatch_tokens"),
        (["--set", "router.colour=red"], "unknown setting router.colour; known: "),
        (["--set", "router.key_depth_blocks=red"], "router.key_depth_blocks cannot be 'red'"),
        (["--set", "wheels.num=4"], "unknown setting wheels.num; sections are router, scheduler, transfer"),
        (["--set", "red"], "set must be name=value, not 'red'"),
        (
            ["--fail", "6:prefill-7"],
            "fail '6:prefill-7': prefill-7 is not up; there are prefill-0, prefill-1, decode-0",
        ),
        (["--join", "500:prefill*4"], "join at 500 s is too late: at 2 requests/s the last one comes at"),
        (
            ["--autoscale", "fast"],
            "autoscale must be 'default', or a config file with a section autoscaler, not 'fast'",
        ),
        (["--autoscale", "default", "--workers", "2p"], "autoscaler needs workers that prefill and others that decode"),
        (["--autoscale", "default", "--fail", "6:prefill-1"], "fail cannot be given beside it"),
        (["--set", "worker_start_s=-1"], "worker_start_s must not be negative, got -1"),
        (["--window", "0"], "window must be positive, not 0"),
        (["--figure", "figure.txt"], "figure must end in .svg, .png, .pdf"),
        (["--json", "/no/such/folder/file"], "no folder for"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    code, out, err = simulate(*QUICK, *arguments)
    assert code == 1
    assert message in " ".join(err.split()), err
    assert not out and "runs" not in err


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    code, _, err = simulate("--trace", str(tmp_path / "none.jsonl"))
    assert code == 1 and "none.jsonl" in err


def test_pools_that_follow_the_load(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("num_prefill: 9\nautoscaler: {grow_after_s: 0, prefill: {max_workers: 2, max_queue: 0.1}}\n")
    options = ["--rate", "4", "--seeds", "1", "--no-search", "--workers", "1p1d", "--set", "worker_start_s=1"]
    options += ["--generate", "tool_agent", "--requests", "160", "--warmup", "0", "--autoscale", str(file)]
    path = tmp_path / "results.json"
    code, out, err = simulate(*options, "--json", str(path))
    assert code == 0, err
    assert "worker-" in out and "prefill+decode" in out
    (case,) = json.loads(path.read_text())["cases"]
    assert case["resizes"][0][1].startswith("prefill 1 -> 2: ")
    prefill = [num_prefill for _, num_prefill, _ in case["workers"]]
    assert prefill[0] == 1 and max(prefill) == 2
    end_s = case["workers"][-1][0]
    assert end_s < case["worker_s"]["prefill"] < 2.2 * end_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_prefill: 1", "no section autoscaler with settings"),
        ("autoscaler: yes", "no section autoscaler with settings"),
        ("autoscaler: {speed: 3}", "unknown setting autoscaler.speed; known: enabled, prefill, decode,"),
        ("autoscaler: {prefill: {speed: 3}}", "unknown setting autoscaler.prefill.speed; known: min_workers,"),
        ("autoscaler: {decode: {max_use: 2}}", "autoscaler.decode: Value error, max_use must be in (0, 1], got 2"),
        ("autoscaler: {prefill: 3}", "autoscaler.prefill: Input should be a dictionary"),
        ("autoscaler: {grow_after_s: soon}", "autoscaler.grow_after_s: Input should be a valid number"),
        ("autoscaler: [", "while parsing"),
    ],
)
def test_settings_of_the_autoscaler_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    code, out, err = simulate(*QUICK, "--autoscale", str(file))
    assert code == 1
    assert message in " ".join(err.split()), err
    assert not out


def test_workers_as_written() -> None:
    assert parse_workers("8p8d") == (8, 8, "disaggregated")
    assert parse_workers("12p") == (12, 0, "disaggregated")
    assert parse_workers("3c") == (3, 0, "colocated")
