"""Serves the page at /ui with a made-up cluster behind it: the shipped files and the shipped state, and a canned answer
to every prompt. `python -m tests.cluster.ui_stand_in 50 50` to look at it."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from router.ui_page import HEADERS, page_files
from tests.router.busy_cluster import NOW, BusyCluster, account

PIECE_S = 0.02


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, cluster: BusyCluster, token: str = "", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.files = page_files()
        self.cluster = cluster
        self.token = token
        self.prompts: list[dict[str, object]] = []  # bodies of the requests for an answer
        self.lock = threading.Lock()
        self.started_at = time.monotonic()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/ui/state":
            self._state(parse_qs(parts.query).get("rings", [""])[0])
        elif (file := self.server.files.get(parts.path)) is not None:
            self._answer(200, file.media_type, file.body)
        else:
            self._answer(404, "text/plain", b"no such page")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.prompts.append(body)
        if body.get("max_tokens", 0) > 1000:
            message = {"error": {"message": "max_tokens must be at most 1000, got " + str(body["max_tokens"])}}
            return self._answer(400, "application/json", json.dumps(message).encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self._stream(int(body["max_tokens"]), is_chat="messages" in body)
        return None

    def _stream(self, num_tokens: int, is_chat: bool) -> None:
        time.sleep(0.1)
        for index in range(num_tokens):
            piece = f"word{index} "
            self._event({"choices": [{"delta": {"content": piece}} if is_chat else {"text": piece}]})
            time.sleep(PIECE_S)
        self._event({"choices": [{"finish_reason": "length"}]})
        usage = {"prompt_tokens": 200, "completion_tokens": num_tokens}
        ran = account("prefill-0", "decode-0", tpot_s=PIECE_S)
        told = {name: getattr(ran, name) for name in ran.__dataclass_fields__}
        self._event({"choices": [], "usage": usage, "account": told})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _state(self, known_rings: str) -> None:
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self._answer(401, "application/json", b'{"error": {"message": "no token"}}')
        with self.server.lock:
            now = NOW + time.monotonic() - self.server.started_at
            self.server.cluster.pass_time(now)
            state = self.server.cluster.state(now, known_rings)
        return self._answer(200, "application/json", json.dumps(state).encode())

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def stand_in(num_prefill: int, num_decode: int, token: str = "") -> Iterator[StandIn]:
    server = StandIn(BusyCluster(num_prefill, num_decode), token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


if __name__ == "__main__":
    served = StandIn(BusyCluster(int(sys.argv[1]), int(sys.argv[2])), port=8099)
    print(f"{served.url}/ui")
    served.serve_forever()
