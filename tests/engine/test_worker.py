"""A whole worker without Ray: its address, what it answers, and that stopping it leaves nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.worker_config import EngineConfig, WorkerSpec
from kvtransfer.config import TransferConfig
from prefill_worker.actor import PrefillWorker
from protos.types import Role
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


async def test_a_port_that_is_taken_is_known_before_the_weights_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = PrefillWorker(spec(Path("/no/such/model"), port), TransferConfig())
        with pytest.raises(
            ValueError, match=f"prefill-0 cannot listen on 127.0.0.1:{port}.*cannot share a worker_port"
        ):
            await worker.load()
