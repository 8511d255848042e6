"""Debian's Prometheus as a child process, and questions to it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.server import eventually

JOB = "twinring"
SCRAPE_INTERVAL_S = 1
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0

Json = dict[str, Any]


class Prometheus:
    def __init__(self, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._url = f"http://{address}"
        self._process = process
        self._log = log

    def is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=CALL_TIMEOUT_S).close()
            return True
        return False

    def ask(self, path: str, **parameters: str) -> Json:
        """The `data` of an API answer."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=CALL_TIMEOUT_S) as response:
            answer: Json = json.load(response)
        assert answer["status"] == "success", answer
        data: Json = answer["data"]
        return data

    def query(self, expression: str) -> list[Json]:
        """Series, each with `metric` and `value`; now."""
        found: list[Json] = self.ask("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float:
        """Of the only series; 0 where there is none."""
        series = self.query(expression)
        assert len(series) <= 1, series
        return float(series[0]["value"][1]) if series else 0.0


@contextlib.contextmanager
def scraping(folder: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` each second and evaluates `rules`."""
    config = {
        "global": {"scrape_interval": f"{SCRAPE_INTERVAL_S}s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address, log = f"127.0.0.1:{_free_port()}", folder / "prometheus.log"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(address, process, log)
        assert eventually(prometheus.is_ready, START_TIMEOUT_S), log.read_text()
        yield prometheus
    finally:
        process.terminate()
        process.wait(30.0)


def _free_port() -> int:
    """Prometheus does not say which port it took where it is told 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
