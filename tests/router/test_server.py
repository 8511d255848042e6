"""Workers that fail, as the server sees them, over real gRPC."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from protos import inference_pb2 as pb
from router.server import RouterServer
from tests.router.answers import ids, sampling, text_of, tokens_of
from tests.router.conftest import CONFIG, SERVED, eventually, with_fields
from tests.router.fake_worker import Fabric, FakeWorker


async def start_stream(service: Any, prompt: str, max_tokens: int) -> tuple[Any, list[pb.GenerateResponse]]:
    """A call's answers: the first three, and an iterator over the rest."""
    request = pb.GenerateRequest(text=prompt, stream=True, sampling_params=sampling(max_tokens=max_tokens))
    rest = aiter(service.inference.Generate(request, timeout=30))
    return rest, [await anext(rest) for _ in range(3)]


def decoding(service: Any) -> FakeWorker:
    return next(w for w in service.workers.values() if w.worker_id.startswith("d") and w.generating)


async def test_a_killed_decode_worker_loses_no_token(launch: Any) -> None:
    service = await launch("p-0", "d-0", "d-1", token_s=0.02)
    prompt = "abcdefghijklmnopqrstuvwxyz" * 2
    rest, responses = await start_stream(service, prompt, max_tokens=52)
    victim = decoding(service)
    await victim.kill()
    responses += [response async for response in rest]
    assert tokens_of(responses) == ids(prompt)
    assert text_of(responses) == prompt
    placement = responses[-1].complete.placement
    assert placement.attempts == 2
    assert placement.decode_worker != victim.worker_id
    assert [ref.worker_id for ref, _ in service.lost] == [victim.worker_id]
    status = await service.cluster.GetStatus(pb.GetStatusRequest())
    assert not status.ready
    assert status.message == "not ready: 2 of 3 workers loaded"
    assert {w.worker_id: w.state for w in status.workers}[victim.worker_id] == "down"
    assert any(f"lost {victim.worker_id}" in event.message for event in status.events)
    assert status.num_failovers == 1


async def test_a_killed_prefill_worker_in_mid_prefill(launch: Any) -> None:
    service = await launch("p-0", "p-1", "d-0", token_s=0.3)
    call = asyncio.create_task(service.generate(text="abcdef", sampling_params=sampling(max_tokens=3)))
    await eventually(lambda: any(service.workers[name].generating for name in ("p-0", "p-1")))
    await next(service.workers[name] for name in ("p-0", "p-1") if service.workers[name].generating).kill()
    assert text_of(await call) == "abc"


async def test_a_worker_without_heartbeat_is_lost(launch: Any) -> None:
    service = await launch("p-0", "d-0", "d-1", config=with_fields(lease_s=0.5), token_s=0.1)
    rest, responses = await start_stream(service, "abcdefgh", max_tokens=16)
    victim = decoding(service)
    victim.is_silent = True  # frames come on, the engine does not
    responses += [response async for response in rest]
    assert tokens_of(responses) == ids("abcdefgh" * 2)
    assert [(ref.worker_id, reason) for ref, reason in service.lost] == [
        (victim.worker_id, "no heartbeat within 0.5 s")
    ]


async def test_all_workers_gone_then_one_comes_back(launch: Any) -> None:
    service = await launch("p-0", token_s=0.02)
    rest, responses = await start_stream(service, "abcdefgh", max_tokens=16)
    await service.workers["p-0"].kill()
    await eventually(lambda: len(service.lost) == 1)
    waiting = asyncio.create_task(service.generate(text="xyz", sampling_params=sampling(max_tokens=3)))
    await eventually(lambda: service.server._driver.router.num_in_flight == 2)
    await service.add(FakeWorker("p-0", service.fabric, incarnation="2"))
    responses += [response async for response in rest]
    assert tokens_of(responses) == ids("abcdefgh" * 2)
    assert text_of(await waiting) == "xyz"
    assert len((await service.inference.GetLoads(pb.GetLoadsRequest())).workers) == 1


async def test_a_removed_worker_takes_no_more_work(launch: Any) -> None:
    service = await launch("p-0", "d-0", "d-1")
    await service.remove("d-0", "another life")
    assert len((await service.inference.GetLoads(pb.GetLoadsRequest())).workers) == 3
    await service.remove("d-0")
    for index in range(5):
        await service.generate(text=f"prompt {index}", sampling_params=sampling())
    assert not service.workers["d-0"].submits
    assert service.lost == []
    assert len((await service.inference.GetLoads(pb.GetLoadsRequest())).workers) == 2


async def test_membership_goes_to_all(launch: Any) -> None:
    service = await launch("p-0", "d-0", "d-1")

    def last_members(worker_id: str) -> tuple[int, list[str]]:
        commands = [c for c in service.workers[worker_id].commands if c.members is not None]
        return commands[-1].membership_version, sorted(ref.worker_id for ref in commands[-1].members or ())

    await eventually(lambda: all(last_members(w) == (4, ["d-0", "d-1", "p-0"]) for w in service.workers))
    await service.remove("d-1")
    await eventually(lambda: last_members("p-0") == last_members("d-0") == (5, ["d-0", "p-0"]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fingerprint", "other", "model_fingerprint 'other', expected 'echo-model'"),
        ("incarnation", "9", "incarnation '9', expected '1'"),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused(launch: Any, field: str, value: str, message: str) -> None:
    service = await launch()
    worker = FakeWorker("p-0", service.fabric)
    ref = await worker.start()
    setattr(worker, field, value)
    (reason,) = await service.join(ref)
    assert message in reason
    await worker.kill()
    assert not service.server._driver.channels


async def test_a_worker_that_is_not_there(launch: Any) -> None:
    service = await launch(config=with_fields(connect_timeout_s=0.3))
    ref = replace(FakeWorker("p-0", Fabric()).ref, address="127.0.0.1:1")
    (reason,) = await service.join(ref)
    assert reason.startswith("worker p-0 at 127.0.0.1:1")


async def test_a_port_in_use(launch: Any) -> None:
    service = await launch()
    address = f"127.0.0.1:{service.port}"
    other = RouterServer(replace(CONFIG, listen=address), SERVED)
    with pytest.raises(OSError, match=address):
        await other.start()
    await other.stop(0)


def test_block_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="block_size of the router is 8, of the model 4"):
        RouterServer(replace(CONFIG, block_size=8), SERVED)


async def test_every_request_leaves_one_log_line(launch: Any, caplog: pytest.LogCaptureFixture) -> None:
    service = await launch("p-0", "d-0")
    with caplog.at_level(logging.INFO, logger="twinring.router"):
        await service.generate(request_id="logged", text="abc", sampling_params=sampling())
        service.fabric.token_s = 0.05
        call = service.inference.Generate(pb.GenerateRequest(text="abc", sampling_params=sampling(max_tokens=100)))
        await eventually(lambda: service.server._driver.router.num_in_flight == 1)
        call.cancel()
        await eventually(lambda: not service.server._driver._calls)
    records = [record for record in caplog.records if "request ended" in record.message]
    fields, cancelled = (record.fields for record in records)  # type: ignore[attr-defined]
    assert cancelled["outcome"] == "CANCELLED"
    assert (fields["client_request_id"], fields["outcome"], fields["num_output_tokens"]) == ("logged", "length", 8)
    assert fields["prefill_reason"].startswith("no home")


async def test_stop_lets_requests_end(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.02)
    rest, responses = await start_stream(service, "abcdefgh", max_tokens=16)
    stopping = asyncio.create_task(service.server.stop(10))
    responses += [response async for response in rest]
    assert tokens_of(responses) == ids("abcdefgh" * 2)
    await stopping
    assert service.lost == []
