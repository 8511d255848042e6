"""`twinring bench serve` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from tests.bench.openai_server import OpenAIServer, serving

QUICK = ["--requests", "4", "--prompt-tokens", "20", "--output-tokens", "3"]
LEVEL_KEYS = """elapsed_s error_example errors e2e_s goodput_requests_per_s itl_s load loop_lag_p99_s name notes
    num_cached_tokens_mean num_in_slo num_ok num_output_tokens_mean num_prompt_tokens_mean num_sent offered_s
    output_tokens_per_s requests_per_s send_lateness_p99_s tpot_s ttft_s"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(OpenAIServer()) as server:
        yield server.url


def bench(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_table_json_and_figure(url: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("results.json", "figure.svg")]
    options = ["--json", str(files[0]), "--figure", str(files[1])]
    code, out, err = bench("--url", url, "--rate", "50,100", *QUICK, *options)
    assert code == 0, err
    assert "rate 50" in out and "rate 100" in out and "goodput" in out
    assert "<svg" in files[1].read_text()
    results = json.loads(files[0].read_text())
    assert set(results) == {"format", "version", "url", "endpoint", "plan", "notes", "levels"}
    assert (results["format"], results["version"]) == ("twinring-bench-serve", 1)
    assert [level["load"] for level in results["levels"]] == [50.0, 100.0]
    assert set(results["levels"][0]) == set(LEVEL_KEYS.split())
    assert set(results["levels"][0]["ttft_s"]) == {"p50", "p90", "p99", "mean"}
    assert results["levels"][0]["num_ok"] == 4
    assert "token" not in json.dumps(results["plan"]).replace("_tokens", "")


def test_json_alone_on_standard_output(url: str) -> None:
    code, out, err = bench("--url", url, "--concurrency", "2", *QUICK, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["levels"][0]["name"] == "concurrency 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "rate must be positive, not 0"),
        (["--rate", "1", "--concurrency", "1"], "exactly one of"),
        ([], "exactly one of"),
        (["--rate", "1", "--endpoint", "images"], "endpoint must be chat or completions, not 'images'"),
        (["--rate", "1", "--figure", "a.bmp"], "figure must end in .svg, .png, .pdf, not 'a.bmp'"),
        (["--rate", "1", "--json", "/no/such/folder/a"], "no folder for '/no/such/folder/a'"),
        (["--trace", "/no/such/file"], "/no/such/file"),
        (["--rate", "1", "--url", "http://127.0.0.1:9"], "ConnectError"),
    ],
)
def test_what_cannot_be_done_is_said(url: str, arguments: list[str], message: str) -> None:
    given = [] if "--url" in arguments else ["--url", url]
    code, _, err = bench(*given, *arguments)
    assert code == 1
    assert message in " ".join(err.split())
