"""Who may call what, and how much, over real gRPC and HTTP: every rpc and every route there is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from protos import inference_pb2 as pb
from router.config import RouterConfig
from router.openai.api import NOT_SERVED
from tests.router.answers import sampling
from tests.router.conftest import eventually, with_fields
from tests.router.http_client import TIMEOUT_S, get, post
from tests.router.test_tenants import tenant_config

TOKENS = {name: f"token-of-{name}" for name in ("ops", "ann", "bob")}
WRONG_TOKEN = "token-of-nobody"
PROMPT = "a prompt of some blocks"
SLOW = 0.05

OPERATORS_RPCS = {"Cluster.GetStatus", "Cluster.Drain", "Cluster.Scale", "Inference.GetLoads"}
OPERATORS_ROUTES = {"/metrics", "/ui/state"}
# The page asks for the state with the token that its user has typed in.
OPEN_ROUTES = {"/", "/health", "/ready", "/version", *NOT_SERVED}


def with_tenants(**limits_of_ann: float) -> RouterConfig:
    ops = tenant_config("ops", is_operator=True, max_priority=5)
    return with_fields(tenants=(ops, tenant_config("ann", **limits_of_ann), tenant_config("bob")))


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def generate(service: Any, who: str, text: str = PROMPT, max_tokens: int = 4, **fields: Any) -> Any:
    request = pb.GenerateRequest(text=text, sampling_params=sampling(max_tokens=max_tokens), **fields)
    return service.inference.Generate(request, metadata=metadata(TOKENS[who]), timeout=20)


async def last_of(call: Any) -> pb.GenerateResponse:
    return [response async for response in call][-1]


async def refusal_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await last_of(call)
    return caught.value


def pushback_ms(error: grpc.aio.AioRpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])


# --- every rpc and every route ------------------------------------------------------------------------------------


def rpcs() -> Iterator[Any]:
    for service in pb.DESCRIPTOR.services_by_name.values():
        yield from service.methods


async def status_of(service: Any, rpc: Any, token: str | None) -> grpc.StatusCode:
    request = getattr(pb, rpc.input_type.name)()
    if isinstance(request, pb.GenerateRequest):
        request.text = PROMPT
    make = service.channel.unary_stream if rpc.server_streaming else service.channel.unary_unary
    method = make(
        f"/{rpc.containing_service.full_name}/{rpc.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=getattr(pb, rpc.output_type.name).FromString,
    )
    call = method(request, metadata=metadata(token), timeout=20)
    try:
        await (last_of(call) if rpc.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_rpc_asks_for_a_token(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants())
    names = {f"{rpc.containing_service.name}.{rpc.name}" for rpc in rpcs()}
    assert names > OPERATORS_RPCS
    for rpc in rpcs():
        for token in (None, "", WRONG_TOKEN):
            assert await status_of(service, rpc, token) is grpc.StatusCode.UNAUTHENTICATED, rpc.full_name
        is_operators = f"{rpc.containing_service.name}.{rpc.name}" in OPERATORS_RPCS
        anns = grpc.StatusCode.PERMISSION_DENIED if is_operators else grpc.StatusCode.OK
        assert await status_of(service, rpc, TOKENS["ann"]) is anns, rpc.full_name
        assert await status_of(service, rpc, TOKENS["ops"]) is grpc.StatusCode.OK, rpc.full_name


def routes(service: Any) -> Iterator[tuple[str, str]]:
    app = service.server._http._server.config.app
    assert isinstance(app, Starlette)
    for route in app.routes:
        assert isinstance(route, Route)  # a mounted application would need tests of its own
        for method in sorted(route.methods or ()):
            yield route.path.replace("{model:path}", "echo"), method


def is_open(path: str) -> bool:
    is_the_page = path.split("/")[1] == "ui" and path not in OPERATORS_ROUTES
    return path in OPEN_ROUTES or is_the_page


async def test_every_route_asks_for_a_token(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants())
    assert {path for path, _ in routes(service)} > OPERATORS_ROUTES | OPEN_ROUTES
    async with httpx.AsyncClient(base_url=service.http_url, timeout=TIMEOUT_S) as client:
        for path, method in routes(service):
            for token in (None, WRONG_TOKEN):
                answer = await client.request(method, path, headers=headers(token))
                assert (answer.status_code == 401) is not is_open(path), (method, path)
                assert (answer.headers.get("www-authenticate") == "Bearer") is not is_open(path), (method, path)
            answer = await client.request(method, path, headers=headers(TOKENS["ann"]))
            assert (answer.status_code == 403) is (path in OPERATORS_ROUTES), (method, path)
            assert answer.status_code != 401, (method, path)
            answer = await client.request(method, path, headers=headers(TOKENS["ops"]))
            assert answer.status_code not in (401, 403), (method, path)


async def test_the_error_has_the_one_shape(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants())
    answer = await post(service, "/v1/completions", {"prompt": "a"}, headers=headers(WRONG_TOKEN))
    assert answer.json()["error"] == {
        "message": "the bearer token is not known",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    answer = await get(service, "/metrics", headers=headers(TOKENS["ann"]))
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == ("permission_error", "not_an_operator")


async def test_nothing_shows_a_token(
    launch: Any, caplog: pytest.LogCaptureFixture, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "twinring")
    monkeypatch.setattr(logging.getLogger("twinring"), "propagate", True)  # as it is until logging is configured
    service = await launch("p-0", "d-0", config=with_tenants(max_concurrent_requests=1, max_requests_per_minute=1))
    texts: list[object] = [service.server._config]
    await last_of(generate(service, "ann"))
    refused = await refusal_of(generate(service, "ann"))
    wrong = await refusal_of(service.inference.Generate(pb.GenerateRequest(), metadata=metadata(WRONG_TOKEN)))
    texts += [refused.details(), refused.trailing_metadata(), wrong.details(), wrong.trailing_metadata()]
    for token in (*TOKENS.values(), WRONG_TOKEN):
        for path in ("/v1/completions", "/nowhere"):
            answer = await post(service, path, {"prompt": "a", "max_tokens": 1}, headers=headers(token))
            texts += [answer.text, answer.headers]
    texts += [(await get(service, path, headers=headers(TOKENS["ops"]))).text for path in ("/metrics", "/ui/state")]
    assert "request ended" in caplog.text
    assert "token-of-" not in f"{texts}{caplog.text}{capfd.readouterr()}"


# --- tenants apart ------------------------------------------------------------------------------------------------


async def test_a_tenant_cannot_end_anothers_request(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants(), token_s=SLOW)
    running = {who: generate(service, who, request_id="same", max_tokens=100) for who in ("ann", "bob")}
    router = service.server._driver.router
    answers = {who: asyncio.create_task(last_of(call)) for who, call in running.items()}
    await eventually(lambda: router.num_in_flight == 2)  # the same id, and no conflict
    assert (await refusal_of(generate(service, "ann", request_id="same"))).code() is grpc.StatusCode.ALREADY_EXISTS

    async def abort(who: str) -> bool:
        request = pb.AbortRequest(request_id="same")
        return (await service.inference.Abort(request, metadata=metadata(TOKENS[who]), timeout=20)).found  # type: ignore[no-any-return]

    assert not await abort("ops")  # an operator looks on, and no more
    assert await abort("bob")
    assert (await answers["bob"]).complete.finish_reason == pb.FINISH_REASON_ABORT
    assert not await abort("bob")
    assert router.num_in_flight == 1
    assert await abort("ann")
    assert (await answers["ann"]).complete.finish_reason == pb.FINISH_REASON_ABORT


async def test_a_tenant_does_not_find_anothers_prompt(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants())

    async def num_cached_tokens(who: str) -> int:
        request = pb.GenerateRequest(text=PROMPT, sampling_params=sampling(max_tokens=4))
        answer = await service.inference.ExplainRoute(request, metadata=metadata(TOKENS[who]), timeout=20)
        return sum(candidate.num_cached_tokens for candidate in answer.prefill_candidates)

    assert await num_cached_tokens("ann") == 0
    await last_of(generate(service, "ann"))
    assert await num_cached_tokens("ann") > 0
    assert await num_cached_tokens("bob") == await num_cached_tokens("ops") == 0
    assert (await last_of(generate(service, "bob"))).complete.placement.predicted_cached_tokens == 0
    assert (await last_of(generate(service, "ann"))).complete.placement.predicted_cached_tokens > 0
    salts = {submit.tenant: submit.cache_salt for submit in service.workers["p-0"].submits}
    assert salts == {"ann": b"ann", "bob": b"bob"}  # which the workers' own hashes begin with


@pytest.mark.parametrize(("who", "most"), [("ann", 0), ("ops", 5)])
async def test_priority_has_a_limit(launch: Any, who: str, most: int) -> None:
    service = await launch("p-0", "d-0", config=with_tenants())
    await last_of(generate(service, who, priority=most))
    await last_of(generate(service, who, priority=-7))
    error = await refusal_of(generate(service, who, priority=most + 1))
    message = f"priority: tenant {who} may have at most {most}, got {most + 1}"
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    body = {"prompt": "a", "priority": most + 1}
    answer = await post(service, "/v1/completions", body, headers=headers(TOKENS[who]))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


# --- limits -------------------------------------------------------------------------------------------------------


async def test_no_more_requests_at_a_time_than_the_limit(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants(max_concurrent_requests=1), token_s=SLOW)
    running = asyncio.create_task(last_of(generate(service, "ann", max_tokens=100)))
    await eventually(lambda: service.server._driver.router.num_in_flight == 1)
    error = await refusal_of(generate(service, "ann"))
    message = "tenant ann has 1 requests running, the most that it may have"
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, message)
    assert pushback_ms(error) == 1000
    answer = await post(service, "/v1/completions", {"prompt": "a"}, headers=headers(TOKENS["ann"]))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert (answer.json()["error"]["message"], answer.json()["error"]["type"]) == (message, "rate_limit_error")
    assert (await last_of(generate(service, "bob"))).complete.completion_tokens == 4
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await eventually_taken(service, "ann")).complete.completion_tokens == 4


async def eventually_taken(service: Any, who: str) -> pb.GenerateResponse:
    """Of a call that has just ended at the client the server may not know yet."""
    await eventually(lambda: service.server._driver.router.num_in_flight == 0)
    await asyncio.sleep(0)
    return await last_of(generate(service, who))


async def test_several_prompts_are_several_requests(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants(max_concurrent_requests=1))
    for stream in (False, True):
        body = {"prompt": ["one", "two", "three"], "max_tokens": 2, "stream": stream}
        answer = await post(service, "/v1/completions", body, headers=headers(TOKENS["ann"]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (await eventually_taken(service, "ann")).complete.completion_tokens == 4


async def ends_itself(service: Any) -> None:
    await last_of(generate(service, "ann"))


async def is_cancelled(service: Any) -> None:
    call = generate(service, "ann", max_tokens=100, stream=True)
    await anext(aiter(call))
    call.cancel()


async def is_aborted(service: Any) -> None:
    call = generate(service, "ann", max_tokens=100, stream=True, request_id="mine")
    await anext(aiter(call))
    await service.inference.Abort(pb.AbortRequest(request_id="mine"), metadata=metadata(TOKENS["ann"]), timeout=20)
    await last_of(call)


async def runs_out_of_time(service: Any) -> None:
    request = pb.GenerateRequest(text=PROMPT, sampling_params=sampling(max_tokens=100))
    error = await refusal_of(service.inference.Generate(request, metadata=metadata(TOKENS["ann"]), timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def is_left_over_http(service: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 100}
    asking = asyncio.create_task(post(service, "/v1/completions", body, headers=headers(TOKENS["ann"])))
    await eventually(lambda: service.server._driver.router.num_in_flight == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def loses_its_worker(service: Any) -> None:
    call = generate(service, "ann", max_tokens=100, stream=True)
    await anext(aiter(call))
    await service.workers["d-0"].kill()
    assert (await refusal_of(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_gives_its_place_back_whatever_ends_it(launch: Any) -> None:
    config = with_tenants(max_concurrent_requests=1)
    service = await launch("p-0", "d-0", config=config, token_s=0.02)
    for end in (ends_itself, is_cancelled, is_aborted, runs_out_of_time, is_left_over_http):
        await end(service)
        assert (await eventually_taken(service, "ann")).complete.completion_tokens == 4, end.__name__


async def test_a_failed_call_gives_its_place_back(launch: Any) -> None:
    tenants = with_tenants(max_concurrent_requests=1).tenants
    service = await launch("p-0", "d-0", config=with_fields(tenants=tenants, max_attempts=1), token_s=0.02)
    await loses_its_worker(service)
    assert (await eventually_taken(service, "ann")).complete.completion_tokens == 4


@pytest.mark.parametrize(
    ("limits", "num_taken", "words", "longest_s"),
    [
        ({"max_requests_per_minute": 2}, 2, "its limit of 2 requests a minute", 30),
        ({"max_tokens_per_minute": 20}, 1, "its limit of 20 tokens a minute", 24),  # 27 tokens each
    ],
)
async def test_no_more_a_minute_than_the_limit(
    launch: Any, limits: dict[str, float], num_taken: int, words: str, longest_s: int
) -> None:
    service = await launch("p-0", "d-0", config=with_tenants(**limits))
    for _ in range(num_taken):
        await last_of(generate(service, "ann"))
    error = await refusal_of(generate(service, "ann"))
    assert (error.code(), words in error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert 1000 < pushback_ms(error) <= 1000 * longest_s
    answer = await post(service, "/v1/completions", {"prompt": "a"}, headers=headers(TOKENS["ann"]))
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (429, True)
    assert 1 <= int(answer.headers["retry-after"]) <= longest_s
    assert (await last_of(generate(service, "bob"))).complete.completion_tokens == 4


async def test_a_refused_request_uses_no_quota(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_tenants(max_requests_per_minute=1))
    assert (await refusal_of(generate(service, "ann", priority=1))).code() is grpc.StatusCode.INVALID_ARGUMENT
    await last_of(generate(service, "ann"))
    metrics = (await get(service, "/metrics", headers=headers(TOKENS["ops"]))).text
    assert 'reason="tenant_limit"} 0.0' in metrics or 'reason="tenant_limit"}' not in metrics
    await refusal_of(generate(service, "ann"))
    await refusal_of(service.inference.Generate(pb.GenerateRequest(), timeout=20))
    metrics = (await get(service, "/metrics", headers=headers(TOKENS["ops"]))).text
    for reason in ("tenant_limit", "unauthenticated"):
        assert any(f'reason="{reason}"' in line and line.endswith(" 1.0") for line in metrics.splitlines()), reason
