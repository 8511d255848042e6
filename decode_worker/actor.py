"""The decode actor: a worker that takes over requests whose KV arrives from prefill workers. It grants room only once a
prefill has started, and refuses where its running requests would starve (engine/worker_core.py)."""

from __future__ import annotations

from engine.worker import Worker
from engine.worker_config import WorkerSpec
from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.handshake import peer_secret
from protos.types import Role


class DecodeWorker(Worker):
    """Made a Ray actor by cluster/actors.py; usable without Ray."""

    def __init__(self, spec: WorkerSpec, transfer: TransferConfig) -> None:
        assert spec.role is Role.DECODE
        secret = peer_secret(spec.hash_key)
        super().__init__(spec, lambda me, store, host: TransferAgent(me, store, host, transfer, secret))
