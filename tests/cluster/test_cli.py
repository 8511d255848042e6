"""The command line as its users meet it, and what it leaves behind: nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load_config
from router.tenants import Tenants
from tests.cluster.server import LISTEN, PATIENT, Server, eventually, serving
from tests.tiny_models import save_tiny_model


def twinring(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def leftovers() -> set[str]:
    """Files that a server makes outside its own memory."""
    return {str(path) for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("*") if is_ours(path)}


def is_ours(path: Path) -> bool:
    return path.name.startswith(("twr-", "torch_", "gloo", "ray", "plasma", "twinring-shm"))


def test_version() -> None:
    assert twinring("--version").stdout.strip() == f"twinring {version('twinring')}"


@pytest.mark.ray
@pytest.mark.slow
def test_generate_status_and_stop(tmp_path: Path) -> None:
    sizes = ("engine.num_blocks=200", "prefill_engine.num_blocks=100")
    with serving(tmp_path, settings=(*PATIENT, *sizes)) as server:  # the demo model
        answer = twinring(
            "generate", "This program is free software", "--address", server.address, "--max-tokens", "30"
        )
        assert answer.returncode == 0, answer.stderr
        assert len(answer.stdout) > 10
        assert "disaggregated" in answer.stderr
        status = json.loads(twinring("status", "--json", "--address", server.address).stdout)
        assert status["ready"] is True
        num_blocks = {worker["worker_id"]: worker["num_blocks"] for worker in status["workers"]}
        assert num_blocks == {"decode-0": 200, "prefill-0": 100}
        assert "prefill-0" in twinring("status", "--address", server.address).stdout
        refused = twinring("generate", "", "--address", server.address)
        assert refused.returncode == 1
        assert "INVALID_ARGUMENT" in refused.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "when"), [("SIGTERM", "ray"), ("SIGINT", "loading"), ("SIGTERM", "ready")])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: str, when: str) -> None:
    before = leftovers()
    server = Server([], tmp_path / "serve.log")
    log = tmp_path / "serve.log"
    words = {"ray": "starting", "loading": "prefill-0", "ready": "ready on"}[when]
    assert eventually(lambda: words in log.read_text(), 60.0), log.read_text()
    time.sleep(0.3)
    family = server.family()
    sockets = {connection.laddr.port for process in family for connection in listening(process)}
    server.process.send_signal(getattr(signal, number))
    server.process.wait(40)
    assert eventually(lambda: not [process for process in family if is_running(process)], 10.0), log.read_text()
    assert leftovers() <= before
    for port in sockets:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def listening(process: psutil.Process) -> list[psutil._common.pconn]:
    try:
        return [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ray
@pytest.mark.slow
def test_every_listener_is_on_loopback_and_ray_asks_for_its_token(tmp_path: Path) -> None:
    with serving(tmp_path, settings=PATIENT) as server:
        servers = [process for process in server.family() if process.name() in ("gcs_server", "raylet")]
        assert [process.environ()["RAY_AUTH_MODE"] for process in servers] == ["token", "token"]
        hosts = {connection.laddr.ip for process in server.family() for connection in listening(process)}
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, hosts


@pytest.mark.ray
def test_too_few_ray_resources_is_an_error_within_seconds() -> None:
    started_at = time.monotonic()
    answer = twinring("serve", "--prefill", "50", "--decode", "50", *LISTEN)
    assert answer.returncode == 1
    assert "too few Ray resources: 100 workers need" in answer.stderr
    assert time.monotonic() - started_at < 30


def refused(*arguments: str) -> Result:
    """Calls that fail before anything is started need no process of their own."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500"})


def test_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        answer = refused("serve", *LISTEN, "--listen", address)
    assert answer.exit_code == 1
    assert address in answer.stderr


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not tensors"), "safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (
            lambda folder: (folder / "config.json").write_text('{"architectures": ["GPTForever"], "model_type": "x"}'),
            "GPTForever",
        ),
    ],
    ids=["no config", "no weights", "broken weights", "broken config", "unsupported"],
)
def test_an_unusable_checkpoint_is_refused_with_its_reason(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    folder = save_tiny_model(tmp_path / "model", "llama")
    damage(folder)
    answer = refused("serve", "--model", str(folder), *LISTEN)
    assert answer.exit_code == 1
    assert reason in answer.stderr
    assert str(folder).replace("\n", "") in answer.stderr.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--address", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
        (("--address", "ray://127.0.0.1:10001"), "Ray Client"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--prefill", "0"), "num_prefill"),
        (("--mode", "sideways"), "sideways"),
        (("--set", "engine.block_sise=4"), "engine.block_sise"),
        (("--set", "engine.block_size=63"), "63"),
    ],
)
def test_a_wrong_setting_is_named(arguments: tuple[str, ...], words: str) -> None:
    answer = refused("serve", *LISTEN, *arguments)
    assert answer.exit_code == 1
    assert words in answer.stderr


def test_a_new_token_and_the_entry_that_lets_it_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWINRING_TOKENS", raising=False)
    path = tmp_path / "tenants.yaml"
    answers = [CliRunner().invoke(app, ["token", name, *more]) for name, *more in (("ann",), ("ops", "--operator"))]
    entries = [answer.stderr.splitlines()[-1] for answer in answers]
    path.write_text("\n".join(["tenants:", *entries]))
    tenants = Tenants(load_config(None, {"tenants_file": str(path)}).router.tenants)
    tokens = [answer.stdout.removesuffix("\n") for answer in answers]
    found = [tenants.identify(f"Bearer {token}") for token in tokens]
    assert [(tenant.name, tenant.is_operator) for tenant in found] == [("ann", False), ("ops", True)]
    assert all(len(token) > 40 and token not in answer.stderr for token, answer in zip(tokens, answers, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--token", "to\nken"), "--token: the token has a line end"), (("--ca", "/no/ca.pem"), "--ca /no/ca.pem")],
)
def test_an_unfit_access_is_refused(arguments: tuple[str, ...], words: str) -> None:
    answer = refused("status", "--address", "127.0.0.1:1", *arguments)
    assert answer.exit_code == 1
    assert words in answer.stderr
