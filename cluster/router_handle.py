"""One router as cluster/routers.py sees it: in the serving process where it is the only one, else a process of its own
that Ray starts on this machine and that ends with the serving one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.logs import configure_logging
from cluster.ray_call import answer
from cluster.sigterm import on_sigterm
from router.config import RouterConfig
from router.published_view import Lacking, PublishedView, RouterNews
from router.served_model import ServedModel
from router.server import RouterServer

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0  # for what a router answers at once; one that does not is stuck
GRACE_S = 2.0


class RouterLost(ConnectionError):
    """The router's process is gone, or stuck."""


@dataclass(frozen=True, slots=True)
class RouterAddress:
    grpc: str  # host:port
    http: str  # empty: off


class RouterHandle(Protocol):
    router_id: str

    async def start(self) -> RouterAddress:
        """Listens; it is ready once it has as many workers as the view expects. OSError where an address cannot be
        had."""

    async def take(self, view: PublishedView) -> tuple[Lacking, ...]: ...

    async def news(self) -> RouterNews: ...

    async def answer(self, order_id: int, refusal: str) -> None: ...

    async def note_event(self, message: str) -> None: ...

    async def wait_ready(self, timeout_s: float) -> None: ...

    async def stop(self, grace_s: float) -> None:
        """May be called again, with less grace."""

    async def kill(self) -> None: ...


MakeRouter = Callable[[str, RouterConfig], RouterHandle]  # of its id; what it raises is OSError or Ray's


class LocalRouter:
    """Has the shape of RouterHandle."""

    @classmethod
    def made_for(cls, served: ServedModel) -> MakeRouter:
        return lambda router_id, config: cls(router_id, config, served)

    def __init__(self, router_id: str, config: RouterConfig, served: ServedModel) -> None:
        self.router_id = router_id
        self._config = config
        self._server = RouterServer(config, served, router_id)

    async def start(self) -> RouterAddress:
        port = await self._server.start()
        http_port = self._server.http_port
        http = "" if http_port is None else with_port(self._config.http_listen, http_port)
        return RouterAddress(with_port(self._config.listen, port), http)

    async def take(self, view: PublishedView) -> tuple[Lacking, ...]:
        return await self._server.take(view)

    async def news(self) -> RouterNews:
        return await self._server.news()

    async def answer(self, order_id: int, refusal: str) -> None:
        self._server.answer(order_id, refusal)

    async def note_event(self, message: str) -> None:
        self._server.note_event(message)

    async def wait_ready(self, timeout_s: float) -> None:
        await self._server.wait_ready(timeout_s)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    async def kill(self) -> None:
        """It ends with the serving process."""


class RouterActor(LocalRouter):
    def __init__(self, router_id: str, config: RouterConfig, served: ServedModel, log_level: str) -> None:
        configure_logging(log_level)
        super().__init__(router_id, config, served)

    async def start(self) -> RouterAddress:
        address = await super().start()
        on_sigterm(self._server.leave)
        return address


class RayRouter:
    """Has the shape of RouterHandle. Whatever it is asked, RouterLost is the answer of one that is gone."""

    @classmethod
    def made_for(cls, served: ServedModel, log_level: str) -> MakeRouter:
        return lambda router_id, config: cls(router_id, config, served, log_level)

    def __init__(self, router_id: str, config: RouterConfig, served: ServedModel, log_level: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.router_id = router_id
        self._connect_timeout_s = config.connect_timeout_s
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # its ports are here
        options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": here}
        self._actor: Any = ray.remote(RouterActor).options(**options).remote(router_id, config, served, log_level)

    async def start(self) -> RouterAddress:
        address = await self._ask("start", START_TIMEOUT_S)
        assert isinstance(address, RouterAddress)
        return address

    async def take(self, view: PublishedView) -> tuple[Lacking, ...]:
        lacking: tuple[Lacking, ...] = await self._ask("take", self._connect_timeout_s + ANSWER_TIMEOUT_S, view)
        return lacking

    async def news(self) -> RouterNews:
        news = await self._ask("news", ANSWER_TIMEOUT_S)
        assert isinstance(news, RouterNews)
        return news

    async def answer(self, order_id: int, refusal: str) -> None:
        await self._ask("answer", ANSWER_TIMEOUT_S, order_id, refusal)

    async def note_event(self, message: str) -> None:
        await self._ask("note_event", ANSWER_TIMEOUT_S, message)

    async def wait_ready(self, timeout_s: float) -> None:
        await self._ask("wait_ready", timeout_s + ANSWER_TIMEOUT_S, timeout_s)

    async def stop(self, grace_s: float) -> None:
        with contextlib.suppress(RouterLost):
            await self._ask("stop", grace_s + GRACE_S, grace_s)

    async def kill(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # Ray may be gone, and the router with it
            await asyncio.wait_for(asyncio.to_thread(ray.kill, self._actor, no_restart=True), GRACE_S)

    async def _ask(self, method: str, timeout_s: float, *arguments: object) -> Any:
        from ray.exceptions import RayError

        asked_at = asyncio.get_running_loop().time()
        try:
            return await answer(getattr(self._actor, method).remote(*arguments), timeout_s)
        except RayError as error:
            raise RouterLost(f"{self.router_id} has ended") from error
        except TimeoutError as error:
            if asyncio.get_running_loop().time() < asked_at + timeout_s:
                raise  # its own
            raise RouterLost(f"{self.router_id} did not answer within {timeout_s:g} s") from error


def with_port(listen: str, port: int) -> str:
    return f"{listen.rpartition(':')[0]}:{port}"
