"""The HTTP application: OpenAI's API, health, metrics and the page. Decides which routes there are, who may read them,
and that every error has the one shape."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from router.calls import Calls
from router.config import RouterConfig
from router.http_requests import authenticate
from router.metrics import CONTENT_TYPE, RouterMetrics
from router.openai.api import OpenAIApi
from router.openai.errors import ApiError
from router.router import Router
from router.served_model import ServedModel
from router.status import ClusterStatus
from router.ui_page import HEADERS, PageFile, page_files
from router.ui_state import Serving, ui_state


class HttpApp:
    def __init__(
        self,
        config: RouterConfig,
        served: ServedModel,
        calls: Calls,
        router: Router,
        status: ClusterStatus,
        metrics: RouterMetrics,
        cannot_serve: Callable[[], str],
        version: str,
    ) -> None:
        """`cannot_serve` says why a request would not be served now; empty: it would be."""
        self._config = config
        self._calls = calls
        self._router = router
        self._status = status
        self._metrics = metrics
        self._cannot_serve = cannot_serve
        self._version = version
        self._serving = Serving(served.name, version, time.time())
        self.asgi = Starlette(
            routes=[
                *OpenAIApi(config, served, calls).routes(),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/version", self._get_version),
                Route("/metrics", self._get_metrics),
                Route("/ui/state", self._ui_state),
                *(Route(path, _file(file)) for path, file in page_files().items()),
                Route("/", _to_the_page),
            ],
            exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
        )

    async def _health(self, request: Request) -> Response:
        """That this answers shows that the event loop turns, on which everything here runs."""
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        reason = self._cannot_serve()
        if reason:
            return JSONResponse({"status": "unavailable", "message": reason}, 503, headers={"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    async def _get_version(self, request: Request) -> Response:
        return JSONResponse({"version": self._version})

    async def _get_metrics(self, request: Request) -> Response:
        authenticate(self._calls, request, operators_only=True)
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)

    async def _ui_state(self, request: Request) -> Response:
        authenticate(self._calls, request, operators_only=True)
        known_rings = request.query_params.get("rings", "")
        state = ui_state(
            self._config, self._router, self._status, self._calls.recent, self._serving, time.time(), known_rings
        )
        return JSONResponse(state, headers={"Cache-Control": "no-store"})


def _file(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(file.body, media_type=file.media_type, headers=HEADERS)

    return answer


async def _to_the_page(request: Request) -> Response:
    return RedirectResponse("/ui")


# --- errors -------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    message = {
        404: f"there is nothing at {path}",
        405: f"{path} does not take {method}",
    }.get(error.status_code, str(error.detail))
    shaped = ApiError(error.status_code, "invalid_request_error", error.detail.lower().replace(" ", "_"), message)
    return JSONResponse(shaped.body, error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette raises it again behind this answer, so that the server logs it."""
    shaped = ApiError(500, "server_error", "internal_error", "the server failed; its log says how")
    return JSONResponse(shaped.body, 500)
