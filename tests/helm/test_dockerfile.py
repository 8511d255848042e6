"""The Dockerfile, read but not built (that needs a container engine): its stages, rights and commands; and what the
build context holds is enough for a wheel."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.helm.chart import CHART, ROOT

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, value) in order."""
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes()))
    return [(it["instruction"], it["value"]) for it in parser.structure if it["instruction"] != "COMMENT"]


def last_stage(steps: list[tuple[str, str]]) -> list[tuple[str, str]]:
    begin = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    return steps[begin:]


def only(steps: list[tuple[str, str]], name: str) -> str:
    (value,) = [value for instruction, value in steps if instruction == name]
    return value


def test_has_two_stages_of_a_pinned_base(steps: list[tuple[str, str]]) -> None:
    bases = [value for name, value in steps if name == "FROM"]
    assert bases == ["python:${PYTHON_VERSION}-slim-bookworm AS build", "python:${PYTHON_VERSION}-slim-bookworm"]
    assert ("ARG", "PYTHON_VERSION=3.11") in steps
    assert any(name == "COPY" and value.startswith("--from=build ") for name, value in last_stage(steps))


def test_runs_as_the_user_that_the_chart_names(steps: list[tuple[str, str]]) -> None:
    chart = yaml.safe_load((CHART / "values.yaml").read_text())["podSecurityContext"]
    user = only(last_stage(steps), "USER")
    assert user == f"{chart['runAsUser']}:{chart['runAsGroup']}" == "10001:10001"


def test_every_run_is_a_sound_shell_command(steps: list[tuple[str, str]]) -> None:
    commands = [value for name, value in steps if name == "RUN"]
    assert len(commands) == 5
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True, timeout=10)


@pytest.mark.parametrize(("variant", "index"), [("cpu", "download.pytorch.org/whl/cpu"), ("cuda", "pypi.org")])
def test_the_variant_chooses_the_torch(steps: list[tuple[str, str]], tmp_path: Path, variant: str, index: str) -> None:
    done = run_install(steps, tmp_path, variant)
    first, second = done.stdout.splitlines()
    assert index in first and "torch==" in first
    assert second == "install -r requirements.txt"
    assert "ray>=" in (tmp_path / "requirements.txt").read_text()


def test_another_variant_is_refused(steps: list[tuple[str, str]], tmp_path: Path) -> None:
    done = run_install(steps, tmp_path, "rocm")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "not rocm" in done.stderr


def run_install(steps: list[tuple[str, str]], folder: Path, variant: str) -> subprocess.CompletedProcess[str]:
    """The installing step, with a pip that only says what it was asked for."""
    (command,) = [value for name, value in steps if name == "RUN" and "VARIANT" in value]
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "pip").write_text('#!/bin/sh\necho "$*"\n')
    (folder / "pip").chmod(0o755)
    env = {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "VARIANT": variant}
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=20, check=False
    )


def test_its_programs_are_those_of_the_environment(steps: list[tuple[str, str]]) -> None:
    started = json.loads(only(last_stage(steps), "CMD"))
    assert started[:2] == ["twinring", "serve"]
    (links,) = [value for name, value in steps if name == "RUN" and value.startswith("ln -s")]
    for name in ("twinring", "ray", "hf"):
        assert f"/opt/twinring/bin/{name} " in links
        assert (BIN / name).exists()


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_the_health_check_believes_the_status(steps: list[tuple[str, str]], status: int, is_healthy: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    _, _, command = only(last_stage(steps), "HEALTHCHECK").partition("CMD ")
    program, *args = json.loads(command)
    assert program == "python"
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        env = {"HEALTH_URL": f"http://127.0.0.1:{server.server_port}/health"}
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, timeout=20, check=False)
        thread.join()
    assert (done.returncode == 0) is is_healthy


def test_the_context_holds_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name in setuptools["packages"]["find"]["include"] if not name.endswith(".*")}
    assert packages <= {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()}


def test_the_context_makes_a_whole_wheel(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source = ROOT / line[1:]
            if source.is_dir():
                shutil.copytree(source, context / line[1:], ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, context)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run(
        [*command, str(tmp_path), str(context)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("twinring-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"cluster/cli.py", "router/server.py", "cluster/demo_model/config.json"} <= names
