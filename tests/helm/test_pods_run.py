"""The chart's containers, run as rendered: they find each other, their probes succeed, and text comes out of the
Service, under TLS. No KubeRay and no kubelet: tests/helm/pods.py stands in for one, and says what it leaves out."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.chart import FIXED_TOKENS, VARIANTS, Helm
from tests.helm.pods import Node, probe, why_not

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

START_TIMEOUT_S = 240.0
ENDS_WITHIN_S = 60.0
SMALL = ("--set", "router.drainTimeoutSeconds=5", "--set", "config.engine.kv_cache_bytes=16777216")


@pytest.fixture
def node(helm: Helm, tmp_path: Path) -> Iterator[Node]:
    reason = why_not() or (None if shutil.which("openssl") else "openssl is not installed")
    if reason is not None:
        pytest.skip(reason)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "certificate"},
        "stringData": new_pair(tmp_path),
    }
    values = tmp_path / "values.json"
    values.write_text(json.dumps({"tls": {"existingSecret": "certificate"}, "extraObjects": [secret]}))
    objects = helm.objects(*VARIANTS["plain"], *FIXED_TOKENS, *SMALL, "-f", str(values))
    with Node(objects, tmp_path) as running:
        yield running


def new_pair(folder: Path) -> dict[str, str]:
    """A certificate that signs itself, and its key."""
    key, certificate = folder / "tls.key", folder / "tls.crt"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=demo-twinring", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *names], check=True, capture_output=True, timeout=20)
    return {path.name: path.read_text() for path in (key, certificate)}


def test_the_release_serves_and_ends(node: Node) -> None:
    names = ("head-0", "prefill-0", "decode-0", "router-0")
    head, prefill, decode, router = servers = [node.pod(f"demo-twinring-{name}") for name in names]
    for pod in servers:
        node.start(pod)
    node.wait_ready(servers, START_TIMEOUT_S)
    for pod in servers:
        assert probe(pod, "startupProbe") and probe(pod, "livenessProbe"), pod.name

    test = node.pod("demo-twinring-test")
    node.start(test)
    assert test.process is not None
    assert test.process.wait(timeout=90) == 0, test.log
    assert "demo_model: " in test.log

    router.signal(signal.SIGTERM)
    assert router.process is not None
    assert router.process.wait(timeout=ENDS_WITHIN_S) == 0, router.log
    assert not probe(router, "readinessProbe")
    assert not probe(prefill, "readinessProbe")  # nobody holds it any more
    assert not any(pod.has_ended() for pod in (head, prefill, decode))
