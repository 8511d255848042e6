"""The generator against a real server with known delays and known failures."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.load.arrivals import Arrivals
from bench.load.client import connected
from bench.load.outcome import Outcome
from bench.load.plan import Plan, Target
from bench.load.probe import find_manner
from bench.load.report import LevelReport
from bench.load.runner import run_plan
from bench.load.wire import Dialect
from tests.bench.openai_server import FIRST_S, NEXT_S, OpenAIServer, serving, tokens_of

EVERYTHING = OpenAIServer().takes
NUM_PROBES = 2  # of a chat server: what fields it takes, and what it puts around a prompt


class Recorder:
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.outcomes: list[Outcome] = []
        self.reports: list[LevelReport] = []

    def level_began(self, name: str, num_requests: int | None, duration_s: float | None) -> None:
        self.began.append(name)

    def request_ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def level_ended(self, report: LevelReport) -> None:
        self.reports.append(report)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(OpenAIServer()) as running:
        yield running


def run(target: Target, **settings: Any) -> tuple[Recorder, list[str]]:
    recorder = Recorder()
    plan = Plan(**{"num_prompt_tokens": 20, "num_output_tokens": 4, "num_warmup": 0, **settings})
    return recorder, asyncio.run(run_plan(target, plan, recorder))


def ask(url: str, timeout_s: float = 20.0, num_tokens: int = 4) -> Outcome:
    async def one() -> Outcome:
        async with connected(Target(url, timeout_s=timeout_s)) as client:
            return await client.ask(Dialect("good", "chat").body("Hello you", num_tokens))

    return asyncio.run(one())


# --- one request ----------------------------------------------------------------------------------------------------


def test_delays_come_out_as_latencies(server: OpenAIServer) -> None:
    outcome = ask(server.url, num_tokens=6)
    assert outcome.error is None, outcome.error_detail
    assert FIRST_S <= outcome.ttft_s < 10  # the empty chunk of the role does not count
    assert outcome.tpot_s is not None and NEXT_S * 0.8 <= outcome.tpot_s < 1
    assert len(outcome.text_at) == 6 and outcome.num_output_tokens == 6 and outcome.num_cached_tokens == 0
    assert outcome.e2e_s > outcome.ttft_s


@pytest.mark.parametrize(
    ("failure", "kind", "detail"),
    [
        ("http_429", "http_429", "on purpose"),
        ("http_503", "http_503", "on purpose"),
        ("http_500", "http_500", "on purpose"),
        ("malformed", "malformed", "not JSON"),
        ("in_stream", "in_stream", "on purpose"),
        ("cut", "cut", ""),
        ("half", "cut", "without a finish_reason"),
        ("hang", "timeout", "within 1 s"),
    ],
)
def test_failures_are_told_apart(server: OpenAIServer, failure: str, kind: str, detail: str) -> None:
    server.failure = failure
    outcome = ask(server.url, timeout_s=1.0 if failure == "hang" else 20.0)
    assert outcome.error == kind
    assert detail in outcome.error_detail


def test_nobody_there() -> None:
    outcome = ask("http://127.0.0.1:9")
    assert outcome.error == "connection" and "Connect" in outcome.error_detail


# --- what the server takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("takes", [EVERYTHING, EVERYTHING - {"ids"}, EVERYTHING - {"ignore_eos"}])
def test_prompts_are_exact_where_the_server_tokenizes(endpoint: Any, takes: frozenset[str]) -> None:
    with serving(OpenAIServer(takes=takes)) as server:
        recorder, _ = run(Target(server.url, endpoint=endpoint), rates=(100.0,), num_requests=5)
    assert recorder.reports[0].num_prompt_tokens_mean == 20
    assert {outcome.num_prompt_tokens for outcome in recorder.outcomes} == {20}
    sends_ids = isinstance(server.bodies[-1].get("prompt"), list)
    assert sends_ids == (endpoint == "completions" and "ids" in takes)
    assert ("ignore_eos" in server.bodies[-1]) == ("ignore_eos" in takes)


def test_a_server_that_offers_nothing_is_measured_with_notes() -> None:
    with serving(OpenAIServer(takes=frozenset())) as server:
        recorder, notes = run(Target(server.url), rates=(100.0,), num_requests=3)
    assert recorder.reports[0].num_ok == 3
    assert recorder.reports[0].num_output_tokens_mean == 4
    assert any("refuses stream_options" in note for note in notes)
    assert any("refuses ignore_eos" in note for note in notes)
    assert any("prompt lengths are approximate" in note for note in notes)
    assert any("counted as chunks" in note for note in recorder.reports[0].notes)


def test_words_are_counted_by_usage_where_nothing_tokenizes() -> None:
    with serving(OpenAIServer(takes=EVERYTHING - {"tokenize"})) as server:
        recorder, notes = run(Target(server.url), rates=(100.0,), num_requests=3)
    assert recorder.reports[0].num_prompt_tokens_mean == 20  # this server's words are a token each
    assert any("approximate" in note for note in notes)


def test_a_token_is_sent_and_a_wrong_one_told() -> None:
    with serving(OpenAIServer(token="secret")) as server:
        assert run(Target(server.url, token="secret"), rates=(100.0,), num_requests=2)[0].reports[0].num_ok == 2
        with pytest.raises(ValueError, match=r"http_401: .*who are you"):
            run(Target(server.url), rates=(100.0,))


def test_no_server_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="ConnectError"):
        run(Target("http://127.0.0.1:9"), rates=(1.0,))


async def test_manner_knows_the_model_and_what_surrounds_a_prompt(server: OpenAIServer) -> None:
    target = Target(server.url)
    async with connected(target) as client:
        manner = await find_manner(client, target)
    assert manner.dialect.model == "good" and manner.notes == ()
    assert manner.lexicon.num_extra_tokens == 4  # the template and the first token


# --- load -----------------------------------------------------------------------------------------------------------


def test_an_open_loop_does_not_wait_for_answers(server: OpenAIServer) -> None:
    """Against a server that hangs all are sent all the same, each at its instant or a little later."""
    server.failure, server.num_good = "hang", NUM_PROBES
    target = Target(server.url, timeout_s=3.0)
    recorder, _ = run(target, rates=(40.0,), arrivals=Arrivals.CONSTANT, num_requests=20)
    due = sorted(outcome.due_at for outcome in recorder.outcomes)
    assert due == pytest.approx([index / 40 for index in range(20)])
    assert all(outcome.sent_at >= outcome.due_at for outcome in recorder.outcomes)
    assert server.most_running == 20
    assert recorder.reports[0].errors == {"timeout": 20} and recorder.reports[0].goodput_requests_per_s == 0


def test_a_closed_loop_never_has_more_than_its_clients(server: OpenAIServer) -> None:
    recorder, _ = run(Target(server.url), concurrencies=(1, 3), num_requests=9)
    assert recorder.began == ["concurrency 1", "concurrency 3"]
    assert [report.num_ok for report in recorder.reports] == [9, 9]
    assert server.most_running == 3
    one, three = recorder.reports
    assert one.requests_per_s <= 1 / FIRST_S and three.requests_per_s <= 3 / FIRST_S


def test_a_closed_loop_ends_with_its_duration(server: OpenAIServer) -> None:
    recorder, _ = run(Target(server.url), concurrencies=(2,), duration_s=0.5)
    assert all(outcome.sent_at < 0.5 for outcome in recorder.outcomes)
    assert recorder.reports[0].elapsed_s >= 0.5


def test_levels_and_requests_have_prompts_of_their_own(server: OpenAIServer) -> None:
    run(Target(server.url), rates=(50.0, 100.0), num_requests=4, num_shared_tokens=10, num_warmup=2)
    contents = [body["messages"][0]["content"].split() for body in server.bodies[-8:]]
    for one, other in itertools.combinations(contents, 2):
        assert one[:10] == other[:10] and one[10:] != other[10:]


def test_a_trace_is_replayed(server: OpenAIServer, tmp_path: Path) -> None:
    records = [
        {"timestamp": 1000 * index, "input_length": 1024, "output_length": 64, "hash_ids": [7, index]}
        for index in range(3)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"timestamp": 30')
    recorder, notes = run(Target(server.url, endpoint="completions"), trace=str(path), speed=20.0, trace_scale=1 / 16)
    assert any(note.startswith("1 lines of the trace left out (line 4: not JSON") for note in notes)
    sent = server.bodies[-3:]
    assert [len(body["prompt"]) for body in sent] == [64, 64, 64]
    assert [body["max_tokens"] for body in sent] == [4, 4, 4]
    assert sent[0]["prompt"][:32] == sent[1]["prompt"][:32] and sent[0]["prompt"][32:] != sent[1]["prompt"][32:]
    assert [outcome.due_at for outcome in recorder.outcomes] == pytest.approx([0, 0.05, 0.1])


def test_the_servers_tokens_are_not_special(server: OpenAIServer) -> None:
    run(Target(server.url, endpoint="completions"), rates=(100.0,), num_requests=2)
    assert tokens_of("")[0] not in server.bodies[-1]["prompt"]


@pytest.mark.parametrize("load", [{"rates": (100.0,)}, {"concurrencies": (2,)}])
def test_failures_under_load_are_counted_by_kind(server: OpenAIServer, load: dict[str, Any]) -> None:
    server.failure, server.num_good = "http_503", NUM_PROBES + 3
    recorder, _ = run(Target(server.url), **load, num_requests=6)
    report = recorder.reports[0]
    assert (report.num_sent, report.num_ok, report.errors) == (6, 3, {"http_503": 3})
    assert "on purpose" in report.error_example


def test_a_server_that_refuses_the_first_request_is_not_measured(server: OpenAIServer) -> None:
    server.failure = "http_429"
    with pytest.raises(ValueError, match=r"http_429: .*on purpose"):
        run(Target(server.url), rates=(100.0,), num_requests=2)
