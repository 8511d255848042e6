"""The workers as Ray actors. max_restarts stays 0: a worker that died comes back as another incarnation, made by
cluster/supervisor.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from cluster.config import RayConfig
from cluster.logs import configure_logging
from cluster.ray_call import answer
from cluster.sigterm import on_sigterm
from decode_worker.actor import DecodeWorker
from engine.worker import WorkerReady
from engine.worker_config import WorkerSpec
from kvtransfer.config import TransferConfig
from prefill_worker.actor import PrefillWorker
from protos.types import PeerRef, Role

PROGRESS_INTERVAL_S = 0.3
KILL_GRACE_S = 1.0
AUTO = "auto"


class PrefillActor(PrefillWorker):
    def __init__(self, spec: WorkerSpec, transfer: TransferConfig, log_level: str) -> None:
        configure_logging(log_level)
        super().__init__(*bound_to_this_node(spec, transfer))
        on_sigterm(self.leave)


class DecodeActor(DecodeWorker):
    def __init__(self, spec: WorkerSpec, transfer: TransferConfig, log_level: str) -> None:
        configure_logging(log_level)
        super().__init__(*bound_to_this_node(spec, transfer))
        on_sigterm(self.leave)


def bound_to_this_node(spec: WorkerSpec, transfer: TransferConfig) -> tuple[WorkerSpec, TransferConfig]:
    """With the node's own IP in place of `auto`: it is known only where the actor runs."""
    import ray

    if spec.bind_host == AUTO:
        spec = replace(spec, bind_host=ray.util.get_node_ip_address())
    if transfer.bind_host == AUTO:
        transfer = replace(transfer, bind_host=ray.util.get_node_ip_address())
    return spec, transfer


class ActorHandle:
    """One actor, with a deadline on every call: Ray's own may wait for minutes."""

    def __init__(self, spec: WorkerSpec, transfer: TransferConfig, config: RayConfig, log_level: str) -> None:
        import ray

        self.spec = spec
        self.ref: PeerRef | None = None  # once it serves
        self._config = config
        resource = config.resource_of(spec.role)
        actor = PrefillActor if spec.role is Role.PREFILL else DecodeActor
        self._actor: Any = (
            ray.remote(actor)
            .options(
                name=f"twinring-{spec.worker_id}-{spec.incarnation}",
                num_cpus=config.num_cpus_per_worker,
                num_gpus=config.num_gpus_per_worker,
                resources={resource: 1} if resource else None,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(spec, transfer, log_level)
        )

    async def progress(self) -> str:
        """TimeoutError where the actor is not placed, or not importing, within start_timeout_s."""
        return str(await asyncio.wait_for(self._actor.progress.remote(), self._config.start_timeout_s))

    async def load(self) -> None:
        await answer(self._actor.load.remote(), self._config.load_timeout_s)

    async def serve(self) -> WorkerReady:
        ready = await answer(self._actor.serve.remote(), self._config.start_timeout_s)
        assert isinstance(ready, WorkerReady)
        self.ref = ready.ref
        return ready

    async def become(self, spec: WorkerSpec) -> WorkerReady:
        """Another worker, of the other role perhaps, with the model that it has; it serves none of its requests any
        more."""
        await answer(self._actor.become.remote(spec), self._config.start_timeout_s)
        self.spec = spec
        return await self.serve()

    async def stop(self, grace_s: float) -> None:
        await asyncio.wait_for(self._actor.stop.remote(grace_s), grace_s + KILL_GRACE_S)

    def kill(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=True)
