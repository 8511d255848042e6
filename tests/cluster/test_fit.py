"""`twinring fit` as a user types it, over what a router's /metrics answer, and `twinring simulate` with its file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from protos.cost_model import HARDWARE, Hardware
from protos.hardware_file import hardware_from_json, hardware_to_json
from protos.step_moments import StepMoments
from protos.types import TransferStats
from tests.protos.test_cost_fit import moments_of, workload
from tests.router.test_metrics import Cluster
from tests.router.values import CONFIG, stats

NUM_BLOCKS = 1000
ROW = replace(HARDWARE["8b-h100"], num_kv_tokens=NUM_BLOCKS * CONFIG.block_size, kv_nbytes_per_token=512)
BEFORE = moments_of(workload(HARDWARE["70b-a100x4"].cost, 1, 0.0))
DURING = moments_of(workload(ROW.cost, 2, 0.0))


def exposition(*moments: tuple[StepMoments, ...]) -> str:
    """A worker for each, and an idle one with more memory."""
    cluster = Cluster(*(f"p-{number}" for number in range(len(moments))), "d-0")
    cluster.report(0.0, "d-0", stats=stats(num_blocks=9, num_free_blocks=NUM_BLOCKS + 1))
    transfers = TransferStats(block_nbytes=CONFIG.block_size * ROW.kv_nbytes_per_token)
    for number, each in enumerate(moments):
        report = stats(num_free_blocks=400, num_held_blocks=600, transfers=transfers, step_moments=each)
        cluster.report(1.0, f"p-{number}", stats=report)
    return cluster.metrics.exposition().decode()


def fit(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["fit", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def saved(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return saved(tmp_path / "before.txt", exposition(BEFORE, ()))


@pytest.fixture
def after(tmp_path: Path) -> Path:
    return saved(tmp_path / "after.txt", exposition(BEFORE, DURING))


def assert_row(found: Hardware) -> None:
    for name in ROW.cost.__dataclass_fields__:
        assert getattr(found.cost, name) == pytest.approx(getattr(ROW.cost, name), rel=1e-3), name
    assert replace(found, cost=ROW.cost) == ROW


def test_the_time_between_two_scrapes_is_fitted(before: Path, after: Path) -> None:
    code, out, err = fit(after, "--since", before, "--json", "-")
    assert code == 0, err
    assert_row(hardware_from_json(out))
    assert json.loads(out)["fit"]["prefill"]["is_floor_known"] is True
    assert "floor" in err and "4.46" in err and f"{ROW.num_kv_tokens} KV tokens" in err


@pytest.fixture
def url(after: Path) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_let_in = self.headers["Authorization"] == "Bearer secret"
            self.send_response(200 if is_let_in else 401)
            self.end_headers()
            self.wfile.write(after.read_bytes() if is_let_in else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()


def test_a_router_is_asked_with_a_token(url: str, before: Path) -> None:
    code, out, err = fit(url, "--since", before, "--token", "secret", "--json", "-")
    assert code == 0, err
    assert_row(hardware_from_json(out))
    code, _, err = fit(url)
    assert code == 1 and url in err and "401" in err


def test_the_simulator_takes_the_file(before: Path, after: Path, tmp_path: Path) -> None:
    path, results = tmp_path / "mine.json", tmp_path / "results.json"
    assert fit(after, "--since", before, "--json", path)[0] == 0
    options = ["--generate", "tool_agent", "--requests", "20", "--workers", "2p", "--seeds", "1", "--rate", "1"]
    options += ["--no-search", "--kv-tokens", "400000", "--json", str(results)]
    result = CliRunner().invoke(app, ["simulate", "--hardware", str(path), *options])
    assert result.exit_code == 0, result.stderr
    setup = json.loads(results.read_text())["setup"]
    cost, floor_s = setup["hardware"]["cost"], ROW.cost.prefill_floor_s
    assert cost["prefill_floor_s"] == pytest.approx(floor_s, rel=1e-3)
    assert setup["hardware_name"] == str(path)


def test_what_cannot_be_fitted_is_told(before: Path, after: Path, tmp_path: Path) -> None:
    def complaint(*arguments: object) -> str:
        code, out, err = fit(*arguments, "--json", tmp_path / "never.json")
        assert code == 1 and out == "" and not (tmp_path / "never.json").exists()
        return " ".join(err.split())

    assert "have fallen" in complaint(before, "--since", after)
    assert "0 steps that only decode were measured" in complaint(after, "--since", after)
    assert "no worker has run a step" in complaint(saved(tmp_path / "idle.txt", exposition(())))
    assert "no metrics of Twinring" in complaint(saved(tmp_path / "other.txt", "up 1\n"))
    other = saved(tmp_path / f"{'other' * 30}.txt", "{}{}{")
    assert f"{other}: not in Prometheus" in complaint(after, "--since", other)  # whole, however long
    assert "No such file" in complaint(tmp_path / "missing.txt")
    assert "refused" in complaint("http://127.0.0.1:1/metrics")


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARDWARE)
def test_a_file_gives_back_what_was_written(name: str) -> None:
    assert hardware_from_json(hardware_to_json(HARDWARE[name], {})) == HARDWARE[name]


def test_bad_files_are_told(tmp_path: Path) -> None:
    def complaint(text: str) -> str:
        path = saved(tmp_path / "mine.json", text)
        result = CliRunner().invoke(app, ["simulate", "--generate", "tool_agent", "--hardware", str(path)])
        assert result.exit_code == 1
        return " ".join(result.stderr.split())

    good = hardware_to_json(ROW, {})
    assert "not JSON" in complaint("cost: 3")
    assert "not a twinring-hardware file of version 1" in complaint("[]")
    assert "not a twinring-hardware file of version 1" in complaint(good.replace('"version": 1', '"version": 2'))
    assert "hardware.cost.decode_base_s" in complaint(good.replace('"decode_base_s"', '"decode_bas_s"'))
    assert "must not be negative" in complaint(good.replace('"decode_base_s": ', '"decode_base_s": -'))
    assert "hardware.num_kv_tokens must be positive, not 0" in complaint(good.replace(f": {ROW.num_kv_tokens}", ": 0"))
