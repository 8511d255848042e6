"""The clients of a real cluster: ours, sync and async, through lost connections and a restarted server; and Node's,
which has no stubs and learns the service by reflection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster.aio_client import AsyncClient
from cluster.cli import app
from cluster.client import Client
from cluster.client_types import CallFailed, Completion, Message, RetryPolicy, Sampling
from protos.types import FinishReason, ServingMode
from tests.cluster.cutting_proxy import cutting
from tests.cluster.server import PATIENT, START_TIMEOUT_S, Server, eventually, serving
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = "Ein Löwe saß auf dem Dach – 獅子. " * 6  # bytes are tokens: output is full of cut characters, too
GREEDY = Sampling(max_tokens=500, temperature=0.0, ignore_eos=True)
SEEDED = Sampling(max_tokens=500, temperature=1.2, top_p=0.95, seed=11, ignore_eos=True)
CUTS = (1500, 900, 2000, 1200, 2500)  # bytes of the server's until the connection is reset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("log"), "--model", str(model)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as one:
        yield one


def idle(client: Client) -> bool:
    return client.status().num_requests_in_flight == 0


# --- answers ------------------------------------------------------------------------------------------------------


def test_chunks_concatenate_to_the_completion(client: Client) -> None:
    chunks = list(client.stream(PROMPT, GREEDY, request_id="mine"))
    last = chunks[-1].completion
    assert last is not None and [chunk.completion for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == last.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == last.token_ids
    assert (last.request_id, last.finish_reason, last.completion_tokens) == ("mine", FinishReason.LENGTH, 500)
    assert last.placement.mode is ServingMode.DISAGGREGATED
    assert last.num_resumes == 0
    assert client.generate(list(PROMPT.encode()), Sampling(max_tokens=5)).prompt_tokens == len(PROMPT.encode())


def test_the_client_draws_the_seed_and_it_reproduces(client: Client) -> None:
    sampling = Sampling(max_tokens=20, temperature=2.0)
    first, second = client.generate("seedless", sampling), client.generate("seedless", sampling)
    assert first.token_ids != second.token_ids
    again = client.generate("seedless", Sampling(max_tokens=20, temperature=2.0, seed=first.seed))
    assert again.token_ids == first.token_ids


def test_a_chat(client: Client) -> None:
    chat = client.generate([Message("system", "Be terse."), Message("user", "hi")], GREEDY)
    rendered = client.generate("<|system|>Be terse.<|user|>hi<|assistant|>", GREEDY)
    assert chat.token_ids == rendered.token_ids
    with pytest.raises(CallFailed) as caught:
        client.generate([Message("user", "hi"), Message("robot", "ho")])
    assert caught.value.code == "INVALID_ARGUMENT"
    assert "chat.messages[1].role" in caught.value.message


def test_what_operators_ask(client: Client, server: Server) -> None:
    status = client.status()
    assert status.ready and status.mode == "disaggregated"
    assert [load.worker_id for load in client.loads()] == [load.worker_id for load in status.workers]
    links = {load.worker_id: {one.worker_id: one.transport for one in load.links} for load in status.workers}
    assert links["prefill-0"]["decode-0"] == "shared_memory", links
    assert client.model_info().vocab_size == 300
    info = client.server_info()
    assert (info.mode, info.max_model_len, info.version) == ("disaggregated", 2048, status.version)
    route = client.explain_route(PROMPT, GREEDY)
    placed = client.generate(PROMPT, GREEDY).placement
    assert (route.prefill_worker, route.decode_worker) == (placed.prefill_worker, placed.decode_worker)
    assert (route.prefill_reason[:5], route.decode_reason[:9]) == ("home:", "most room")  # the rest moves with load
    assert not client.abort("nobody")


def test_the_command_line(server: Server) -> None:
    def twinring(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--address", server.address], env={"COLUMNS": "300"})

    options = ("--max-tokens", "20", "--temperature", "0")
    as_chat = twinring("generate", "hi", "--chat", *options)
    as_text = twinring("generate", "<|user|>hi<|assistant|>", *options)
    assert as_chat.exit_code == as_text.exit_code == 0, as_chat.stderr
    assert as_chat.stdout == as_text.stdout
    route = json.loads(twinring("explain", "hi", "--json").stdout)
    assert (route["prefill_worker"], route["decode_worker"], route["prompt_tokens"]) == ("prefill-0", "decode-0", 2)
    shown = twinring("explain", "hi", "--chat").stdout
    assert f"prefill on prefill-0: {route['prefill_reason'][:8]}" in shown
    assert "prefill-0 shared_memory decode-0" in " ".join(twinring("status").stdout.split())
    refused = twinring("explain", "")
    assert (refused.exit_code, "INVALID_ARGUMENT: text" in refused.stderr) == (1, True)


# --- lost connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_stream_goes_on_behind_its_last_token(server: Server, client: Client, sampling: Sampling) -> None:
    unfaulted = client.generate(PROMPT, sampling)
    with cutting(server.address, *CUTS) as proxy, Client(proxy.address) as other:
        chunks = list(other.stream(PROMPT, sampling, request_id="again"))
        resumed = chunks[-1].completion
        assert resumed is not None
        assert 2 <= resumed.num_resumes <= proxy.num_cuts
    assert resumed.token_ids == unfaulted.token_ids
    assert resumed.text == unfaulted.text == "".join(chunk.text for chunk in chunks)
    assert resumed.finish_reason is FinishReason.LENGTH
    assert eventually(lambda: idle(client), 10.0)


async def test_the_async_client_too(server: Server, client: Client) -> None:
    prompts = [f"{number} {PROMPT}" for number in range(3)]
    with cutting(server.address, *CUTS) as proxy:
        async with AsyncClient(proxy.address) as other:
            resumed = await asyncio.gather(*(other.generate(prompt, SEEDED) for prompt in prompts))
    assert max(one.num_resumes for one in resumed) >= 1
    for prompt, one in zip(prompts, resumed, strict=True):
        unfaulted = await asyncio.to_thread(client.generate, prompt, SEEDED)
        assert (one.token_ids, one.text) == (unfaulted.token_ids, unfaulted.text)


def test_without_retries_the_first_loss_is_raised(server: Server) -> None:
    once = RetryPolicy(give_up_after_s=0)
    with (
        cutting(server.address, 1500) as proxy,
        Client(proxy.address, once) as other,
        pytest.raises(CallFailed) as caught,
    ):
        other.generate(PROMPT, GREEDY)
    assert caught.value.code == "UNAVAILABLE"


def test_a_server_that_is_not_there_yet_is_waited_for(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    started_at = time.monotonic()
    with Client(address, RetryPolicy(give_up_after_s=1.0)) as other, pytest.raises(CallFailed) as caught:
        other.generate("hi")
    assert caught.value.code == "UNAVAILABLE"
    assert time.monotonic() - started_at > 0.4  # it tried again


def test_a_stream_outlives_its_server(model: Path, tmp_path: Path, client: Client) -> None:
    """The whole server stops in mid-stream; a new one, at the same address, goes on with the client's stream."""
    sampling = Sampling(max_tokens=1700, temperature=1.0, seed=5, ignore_eos=True)
    unfaulted = client.generate(PROMPT, sampling)
    has_begun = threading.Event()

    def read(address: str) -> Completion | None:
        completion = None
        with Client(address, RetryPolicy(give_up_after_s=START_TIMEOUT_S)) as other:
            for chunk in other.stream(PROMPT, sampling, timeout_s=2 * START_TIMEOUT_S):
                has_begun.set()
                completion = chunk.completion
        return completion

    options = ["--model", str(model), *(option for setting in PATIENT for option in ("--set", setting))]
    first = Server(options, tmp_path / "first.log")
    with ThreadPoolExecutor(1) as threads:
        try:
            first.wait_ready()
            reading = threads.submit(read, first.address)
            assert has_begun.wait(30)
        finally:
            first.stop()
        assert not reading.done()
        with serving(tmp_path, "--model", str(model), "--listen", first.address):
            resumed = reading.result(60)
    assert resumed is not None
    assert resumed.num_resumes >= 1
    assert (resumed.token_ids, resumed.text) == (unfaulted.token_ids, unfaulted.text)


# --- ends before the end ------------------------------------------------------------------------------------------

ENDLESS = Sampling(max_tokens=1800, temperature=0.0, ignore_eos=True)


def test_closing_the_iterator_ends_the_request(client: Client) -> None:
    stream = client.stream(PROMPT, ENDLESS)
    next(stream)
    stream.close()
    assert eventually(lambda: idle(client), 5.0)


async def test_cancelling_the_task_ends_the_request(server: Server, client: Client) -> None:
    async with AsyncClient(server.address) as other:
        async with contextlib.aclosing(other.stream(PROMPT, ENDLESS)) as stream:
            await anext(stream)
        assert await asyncio.to_thread(eventually, lambda: idle(client), 5.0)
        task = asyncio.create_task(other.generate(PROMPT, ENDLESS))
        assert await asyncio.to_thread(eventually, lambda: not idle(client), 5.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(eventually, lambda: idle(client), 5.0)


def test_a_deadline_is_of_the_whole_call(client: Client) -> None:
    with pytest.raises(CallFailed) as caught:
        client.generate(PROMPT, ENDLESS, timeout_s=0.3)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert eventually(lambda: idle(client), 5.0)


def test_abort_by_id(client: Client) -> None:
    stream = client.stream(PROMPT, ENDLESS, request_id="stop me")
    chunks = [next(stream)]
    assert client.abort("stop me")
    chunks += stream
    last = chunks[-1].completion
    assert last is not None
    assert last.finish_reason is FinishReason.ABORT
    assert 0 < last.completion_tokens < 1800


# --- a second client ----------------------------------------------------------------------------------------------

NODE_SOURCE = Path(__file__).parent / "node_client"
NODE_PROMPT = "héllo from Node"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script beside its packages; skipped where Node or the registry is not to be had."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for path in NODE_SOURCE.iterdir():
        shutil.copy(path, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
    try:
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install took more than 120 s")
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr.strip()[-300:]}")
    return folder


def run_node(folder: Path, address: str) -> dict[str, Any]:
    command = ["node", "client.js", address, NODE_PROMPT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_node_learns_the_service_by_reflection_and_uses_it(server: Server, client: Client, node_client: Path) -> None:
    answer = run_node(node_client, server.address)
    assert {"twinring.v1.Inference", "twinring.v1.Cluster", "grpc.health.v1.Health"} <= set(answer["services"])
    methods = {"Generate", "Abort", "GetModelInfo", "GetLoads", "GetServerInfo", "ExplainRoute"}
    assert set(answer["methods"]) == methods
    assert answer["info"]["model_fingerprint"] == client.model_info().model_fingerprint
    ours = client.generate(NODE_PROMPT, Sampling(max_tokens=12, temperature=0.0))
    assert answer["answer"] == {
        "text": ours.text,
        "tokenIds": list(ours.token_ids),
        "finishReason": f"FINISH_REASON_{ours.finish_reason.value.upper()}",
    }
    assert answer["route"]["prefill_worker"] == ours.placement.prefill_worker
    assert "chat.messages" in answer["refusal"]
