"""A whole worker without Ray: its address, what it answers, and that stopping it leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.worker_config import EngineConfig, WorkerSpec
from kvtransfer.config import TransferConfig
from prefill_worker.actor import PrefillWorker
from protos import worker_pb2 as pb
from protos.types import PROTOCOL_VERSION, PeerRef, Role
from protos.worker_pb2_grpc import WorkerStub
from tests.tiny_models import save_tiny_model


def spec(model: Path, port: int) -> WorkerSpec:
    engine = EngineConfig(model=str(model), num_blocks=8)
    return WorkerSpec("prefill-0", "life-1", Role.PREFILL, engine, b"k" * 32, bind_port=port)


async def test_a_worker_serves_on_its_port_and_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # serve() sets its own
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    worker = PrefillWorker(spec(save_tiny_model(tmp_path / "model", "llama"), port), TransferConfig())
    await worker.load()
    ready = await worker.serve()
    try:
        assert ready.ref.address == f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(ready.ref.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            live = await stub.Check(health_pb2.HealthCheckRequest(service="live"), timeout=5.0)
            assert live.status == health_pb2.HealthCheckResponse.SERVING
            no_router = await stub.Check(health_pb2.HealthCheckRequest(service="ready"), timeout=5.0)
            assert no_router.status == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        await worker.stop(1.0)
    with contextlib.closing(socket.create_server(("127.0.0.1", port))):
        pass  # free again


async def test_a_worker_becomes_another_one_with_the_model_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    first = spec(save_tiny_model(tmp_path / "model", "llama"), port)
    worker = PrefillWorker(first, TransferConfig())
    await worker.load()
    former = (await worker.serve()).ref
    execute, kv_cache = worker._execute, worker._kv_cache
    await worker.become(replace(first, worker_id="decode-3", incarnation="life-2", role=Role.DECODE))
    ref = (await worker.serve()).ref
    try:
        assert ref == PeerRef("decode-3", "life-2", former.address, Role.DECODE)
        assert worker._execute is execute
        assert worker._kv_cache is kv_cache
        async with grpc.aio.insecure_channel(ref.address) as channel:
            stub = WorkerStub(channel)
            assert await greeted(stub, ref) == (ref.worker_id, "life-2", "decode")
            with pytest.raises(grpc.aio.AioRpcError, match="worker decode-3 is incarnation life-2, not 'life-1'"):
                await greeted(stub, former)
            worker.leave()
            stream = stub.Connect()
            await stream.write(hello_to(ref))
            async with asyncio.timeout(10):
                while not (await stream.read()).is_leaving:
                    pass
    finally:
        await worker.stop(1.0)
    assert [each.name for each in threading.enumerate() if each.name.startswith("twinring-")] == []


def hello_to(ref: PeerRef) -> pb.RouterFrame:
    hello = pb.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="r", worker_incarnation=ref.incarnation)
    return pb.RouterFrame(hello=hello)


async def greeted(stub: WorkerStub, ref: PeerRef) -> tuple[str, str, str]:
    stream = stub.Connect()
    await stream.write(hello_to(ref))
    frame = await stream.read()
    if not isinstance(frame, pb.WorkerFrame):
        raise grpc.aio.AioRpcError(await stream.code(), None, None, await stream.details())
    stream.cancel()
    return frame.hello.worker_id, frame.hello.incarnation, frame.hello.role


async def test_a_port_that_is_taken_is_known_before_the_weights_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = PrefillWorker(spec(Path("/no/such/model"), port), TransferConfig())
        with pytest.raises(
            ValueError, match=f"prefill-0 cannot listen on 127.0.0.1:{port}.*cannot share a worker_port"
        ):
            await worker.load()
