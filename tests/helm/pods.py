"""Runs the containers of a rendered chart on this machine, each in namespaces of its own: network, mounts, processes,
host name. A small kubelet: it starts, probes, restarts and ends; it knows nothing of what runs inside.

What differs from a cluster: no images (commands come from this Python environment), everything is root, a Service is
a line in /etc/hosts, and limits and NetworkPolicies are not applied."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helm.chart import ROOT

PREFIX = "10.77.{net}.{host}"
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
IP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 10.0


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=IP_TIMEOUT_S)


def why_not() -> str | None:
    """What this machine lacks for pods, if anything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: iproute2, util-linux)"
    if subprocess.run(["ip", "netns", "list"], capture_output=True, timeout=IP_TIMEOUT_S, check=False).returncode:
        return "network namespaces cannot be made here"
    return None


@dataclass
class Pod:
    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    folder: Path
    address: str = ""
    namespace: str = ""
    num_starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def signal(self, number: int) -> None:
        """To the container's first process."""
        assert self.process is not None
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(number)

    def kill(self) -> None:
        """At once: the first process goes, and the kernel takes all others of its namespace along."""
        if self.process is None or self.process.poll() is not None:
            return
        inside = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(inside, timeout=KILL_TIMEOUT_S)


class PodNetwork:
    """One bridge, on which this machine is the node; one namespace and one address per pod."""

    def __init__(self) -> None:
        self.tag = f"twr{os.getpid() % 100000}"
        self.net = os.getpid() % 200 + 20
        self._num_pods = 0

    def __enter__(self) -> PodNetwork:
        ip("link", "add", self.tag, "type", "bridge")
        ip("addr", "add", f"{self._address(1)}/24", "dev", self.tag)
        ip("link", "set", self.tag, "up")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self.tag)

    def _address(self, host: int) -> str:
        return PREFIX.format(net=self.net, host=host)

    def join(self, pod: Pod) -> None:
        self._num_pods += 1
        pod.namespace, pod.address = f"{self.tag}-{self._num_pods}", self._address(self._num_pods + 1)
        outside, inside = f"{self.tag}v{self._num_pods}", "eth0"
        ip("netns", "add", pod.namespace)
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", pod.namespace)
        ip("link", "set", outside, "master", self.tag, "up")
        ip("-n", pod.namespace, "link", "set", "lo", "up")
        ip("-n", pod.namespace, "addr", "add", f"{pod.address}/24", "dev", inside)
        ip("-n", pod.namespace, "link", "set", inside, "up")

    def leave(self, pod: Pod) -> None:
        if pod.namespace:
            for command in (("link", "del", pod.namespace.replace("-", "v")), ("netns", "del", pod.namespace)):
                with contextlib.suppress(subprocess.CalledProcessError):
                    ip(*command)


class Node:
    """All pods of one release. Use as a context: whatever it made is gone afterwards."""

    def __init__(self, objects: list[dict[str, Any]], folder: Path) -> None:
        self._objects = objects
        self._folder = folder
        self.pods = [pod for it in objects for pod in self._pods_of(it)]
        self._network = PodNetwork()

    def __enter__(self) -> Node:
        self._network.__enter__()
        try:
            for pod in self.pods:
                self._network.join(pod)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            pod.kill()
        for pod in self.pods:
            self._network.leave(pod)
        self._network.__exit__()
        for pod in self.pods:
            shutil.rmtree(pod.folder, ignore_errors=True)

    def pod(self, name: str) -> Pod:
        (found,) = [pod for pod in self.pods if pod.name == name]
        return found

    def _pods_of(self, it: dict[str, Any]) -> Iterator[Pod]:
        if it["kind"] == "Pod":
            yield self._new_pod(it["metadata"]["name"], it)
        elif it["kind"] in ("StatefulSet", "Deployment"):
            for i in range(it["spec"]["replicas"]):
                yield self._new_pod(f"{it['metadata']['name']}-{i}", it["spec"]["template"])

    def _new_pod(self, name: str, template: dict[str, Any]) -> Pod:
        return Pod(name, template["metadata"]["labels"], template["spec"], self._folder / name)

    def start(self, pod: Pod) -> None:
        pod.num_starts += 1
        shutil.rmtree(pod.folder / "root", ignore_errors=True)
        script = self._enter_script(pod, pod.folder / "root")
        inside = ["ip", "netns", "exec", pod.namespace, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
        command = ["setpriv", "--pdeathsig", "KILL", *inside, "--kill-child", "--mount-proc", "bash", "-c", script]
        with (pod.folder / "log").open("ab") as log:
            pod.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")

    def _enter_script(self, pod: Pod, root: Path) -> str:
        """Mounts what the pod mounts, over a root file system that cannot be written, and becomes the container."""
        shutil.copytree("/etc", root / "etc", symlinks=True, ignore=shutil.ignore_patterns("shadow*", "gshadow*"))
        (root / "etc" / "hosts").write_text(self._hosts(pod))
        lines = ["set -e", f"hostname {shlex.quote(pod.name)}", "mount --make-rprivate /"]
        last = []
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        for mount in pod.container.get("volumeMounts", ()):
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if path == "/dev/shm":
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
                lines.append(f"mount -t tmpfs -o size={size} tmpfs /dev/shm")
            elif path == "/tmp":
                last = self._tmp_lines(root / "tmp")
            else:
                assert path.startswith("/etc/"), f"no place for a volume at {path}"
                self._write_files(volume, root / path.lstrip("/"))
        lines += [f"mount --bind {root}/etc /etc", "mount -o remount,bind,ro /etc", *last, "mount -o remount,bind,ro /"]
        env = self._env(pod)
        words = [expand(word, env) for word in (*pod.container["command"], *pod.container.get("args", ()))]
        lines.append(shlex.join(["exec", "env", "-i", *(f"{k}={v}" for k, v in env.items()), *words]))
        return "\n".join(lines)

    @staticmethod
    def _tmp_lines(tmp: Path) -> list[str]:
        tmp.mkdir(parents=True)
        lines = []
        for needed in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
            if needed.is_relative_to("/tmp"):  # else the pod would not see its own program
                inside = tmp / needed.relative_to("/tmp")
                inside.mkdir(parents=True, exist_ok=True)
                lines.append(f"mount --rbind {needed} {inside}")
        return [*lines, f"mount --rbind {tmp} /tmp"]

    def _hosts(self, pod: Pod) -> str:
        lines = ["127.0.0.1 localhost", f"{pod.address} {pod.name}"]
        for it in self._objects:
            if it["kind"] == "Service":
                behind = [that for that in self.pods if it["spec"]["selector"].items() <= that.labels.items()]
                self._check_ports(it, behind)
                lines += [f"{that.address} {it['metadata']['name']}" for that in behind[:1]]
        return "\n".join(lines) + "\n"

    @staticmethod
    def _check_ports(service: dict[str, Any], behind: list[Pod]) -> None:
        """A line in /etc/hosts moves no ports: the Service's must be those that the container names so."""
        for pod in behind:
            named = {port["name"]: port["containerPort"] for port in pod.container.get("ports", ())}
            for port in service["spec"]["ports"]:
                assert named[port["targetPort"]] == port["port"], f"{service['metadata']['name']}: {port}"

    def _find(self, kind: str, name: str) -> dict[str, str]:
        (found,) = [it for it in self._objects if it["kind"] == kind and it["metadata"]["name"] == name]
        return dict(found["stringData" if kind == "Secret" else "data"])

    def _write_files(self, volume: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True)
        if "configMap" in volume:
            files, items = self._find("ConfigMap", volume["configMap"]["name"]), volume["configMap"].get("items")
        else:
            files, items = self._find("Secret", volume["secret"]["secretName"]), volume["secret"].get("items")
        for item in items or [{"key": key, "path": key} for key in files]:
            (folder / item["path"]).write_text(files[item["key"]])

    def _env(self, pod: Pod) -> dict[str, str]:
        env = {"PATH": PATH, "LANG": "C.UTF-8", "HOSTNAME": pod.name}
        for entry in pod.container.get("env", ()):
            source = entry.get("valueFrom", {})
            if "secretKeyRef" in source:
                value = self._find("Secret", source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]]
            elif "fieldRef" in source:
                assert source["fieldRef"]["fieldPath"] == "status.podIP"
                value = pod.address
            else:
                value = expand(entry["value"], env)
            env[entry["name"]] = value
        return env

    def wait_ready(self, pods: list[Pod], timeout_s: float) -> None:
        """Until every readiness probe succeeds. A container that ends is started again, as a kubelet would."""
        give_up_at = time.monotonic() + timeout_s
        waiting = list(pods)
        while waiting:
            for pod in pods:
                if pod.has_ended():
                    self.start(pod)
            waiting = [pod for pod in waiting if not probe(pod, "readinessProbe")]
            if time.monotonic() > give_up_at:
                logs = "\n".join(f"--- {pod.name} ({pod.num_starts} starts)\n{pod.log}" for pod in pods)
                raise TimeoutError(f"not ready after {timeout_s:g} s: {[pod.name for pod in waiting]}\n{logs}")
            time.sleep(1.0)


def expand(text: str, env: dict[str, str]) -> str:
    """$(NAME), as Kubernetes does it in commands and later variables."""
    return re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), text)


def probe(pod: Pod, which: str) -> bool:
    """One try of a rendered probe, from the node."""
    wanted = pod.container[which]
    timeout_s = wanted.get("timeoutSeconds", 1)
    if "grpc" in wanted:
        return grpc_probe(f"{pod.address}:{wanted['grpc']['port']}", wanted["grpc"].get("service", ""), timeout_s)
    get = wanted["httpGet"]
    named = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
    url = f"{get['scheme'].lower()}://{pod.address}:{named[get['port']]}{get['path']}"
    try:
        with urllib.request.urlopen(url, timeout=timeout_s, context=ssl._create_unverified_context()) as answer:
            return 200 <= answer.status < 400
    except (urllib.error.URLError, OSError):
        return False


def grpc_probe(target: str, service: str, timeout_s: float) -> bool:
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
