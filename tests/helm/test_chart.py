"""Every variant of the chart lints, is valid Kubernetes, keeps its house rules and looks as it did.

TWINRING_UPDATE_GOLDENS=1 writes the golden files anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.config import load_config
from tests.helm.chart import CHART, FIXED_TOKENS, HERE, VARIANTS, Helm, one, pod_templates

# Kinds without a published schema: what their controllers cannot do without.
CUSTOM_KINDS: dict[str, tuple[str, ...]] = {
    "RayCluster": ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    "ServiceMonitor": ("selector", "endpoints"),
    "PrometheusRule": ("groups",),
}
QUIET = ("--set", "dashboards.enabled=false", "--set", "prometheusRule.enabled=false")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return (*VARIANTS[request.param], *FIXED_TOKENS)


@pytest.fixture
def objects(helm: Helm, variant: tuple[str, ...]) -> list[dict[str, Any]]:
    return helm.objects(*variant)


def test_lints(helm: Helm, variant: tuple[str, ...]) -> None:
    done = helm.lint(*variant)
    assert done.returncode == 0, done.stdout


def test_is_valid_kubernetes(objects: list[dict[str, Any]]) -> None:
    for it in objects:
        if it["kind"] in CUSTOM_KINDS:
            assert set(CUSTOM_KINDS[it["kind"]]) <= set(it["spec"])
        else:
            kubernetes_validate.validate(it, "1.33", strict=True)
    for template in pod_templates(objects).values():  # those in a RayCluster have been seen by nobody yet
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_names_are_used_once(objects: list[dict[str, Any]]) -> None:
    names = [(it["kind"], it["metadata"]["name"]) for it in objects]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", VARIANTS)
def test_looks_as_it_did(helm: Helm, name: str) -> None:
    rendered = helm.template(*VARIANTS[name], *FIXED_TOKENS, *QUIET)
    golden = HERE / "golden" / f"{name}.yaml"
    if os.environ.get("TWINRING_UPDATE_GOLDENS") == "1":
        golden.write_text(rendered)
    assert rendered == golden.read_text(), "if this was meant: TWINRING_UPDATE_GOLDENS=1, and read the difference"


def test_every_pod_is_confined(objects: list[dict[str, Any]]) -> None:
    specs = [template["spec"] for template in pod_templates(objects).values()]
    specs += [it["spec"] for it in objects if it["kind"] == "Pod"]
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}


def test_no_token_stands_in_a_pod_or_config_map(objects: list[dict[str, Any]]) -> None:
    shown = yaml.safe_dump([it for it in objects if it["kind"] != "Secret"])
    assert "operator-token" not in shown and "ray-token" not in shown


def test_every_selector_finds_pods(objects: list[dict[str, Any]]) -> None:
    labels = [template["metadata"]["labels"] for template in pod_templates(objects).values()]
    selectors = [it["spec"]["selector"] for it in objects if it["kind"] == "Service"]
    selectors += [
        it["spec"]["selector"]["matchLabels"]
        for it in objects
        if it["kind"] in ("PodDisruptionBudget", "StatefulSet", "Deployment")
    ]
    for selector in selectors:
        assert sum(selector.items() <= of_pod.items() for of_pod in labels) == 1


def test_every_volume_is_there_and_every_mount_has_one(objects: list[dict[str, Any]]) -> None:
    made = {(it["kind"], it["metadata"]["name"]) for it in objects}
    given = {("Secret", "ray-secret"), ("Secret", "certificate"), ("Secret", "hub")}
    for template in pod_templates(objects).values():
        spec = template["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        containers = (*spec["containers"], *spec.get("initContainers", ()))
        assert {mount["name"] for it in containers for mount in it["volumeMounts"]} <= volumes
        needed = {("ConfigMap", it["configMap"]["name"]) for it in spec["volumes"] if "configMap" in it}
        needed |= {("Secret", it["secret"]["secretName"]) for it in spec["volumes"] if "secret" in it}
        for env in (env for it in containers for env in it["env"]):
            if "secretKeyRef" in env.get("valueFrom", {}):
                needed.add(("Secret", env["valueFrom"]["secretKeyRef"]["name"]))
        assert needed <= made | given


def test_the_rendered_settings_are_settings(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    name = one(objects, "Deployment")["metadata"]["name"].removesuffix("-router")
    (container,) = pod_templates(objects)["router"]["spec"]["containers"]
    (address,) = [it.removeprefix("--address=") for it in container["args"] if it.startswith("--address=")]
    rendered, tenants = tmp_path / "config.yaml", tmp_path / "tenants.yaml"
    rendered.write_text(one(objects, "ConfigMap", name)["data"]["config.yaml"])
    tenants.write_text(one(objects, "Secret", f"{name}-tenants")["stringData"]["tenants.yaml"])
    folder = Path(yaml.safe_load(rendered.read_text())["tenants_file"]).parent
    assert str(folder) in {mount["mountPath"] for mount in container["volumeMounts"]}
    config = load_config(str(rendered), {"ray.address": address, "tenants_file": str(tenants)})
    assert (config.num_prefill, config.num_decode) == replicas(objects)
    operator = config.router.tenants[0]
    assert operator.is_operator and operator.token_sha256 == hashlib.sha256(b"operator-token").hexdigest()


def replicas(objects: list[dict[str, Any]]) -> tuple[int, int]:
    """Pods of the two roles as they are rendered; an HPA counts by its minimum."""
    found = {}
    for it in objects:
        if it["kind"] == "RayCluster":
            found.update({group["groupName"]: group["replicas"] for group in it["spec"]["workerGroupSpecs"]})
        elif it["kind"] in ("StatefulSet", "HorizontalPodAutoscaler"):
            number = it["spec"].get("replicas", it["spec"].get("minReplicas"))
            if number is not None:
                found[it["metadata"]["labels"]["app.kubernetes.io/component"]] = number
    return found["prefill"], found["decode"]


def test_kuberay_starts_ray_as_the_plain_pods_do(helm: Helm) -> None:
    plain = pod_templates(helm.objects(*VARIANTS["plain"], *FIXED_TOKENS))
    cluster = one(helm.objects(*FIXED_TOKENS), "RayCluster")["spec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for role, group in {"head": cluster["headGroupSpec"], **groups}.items():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        # KubeRay gives these to a shell.
        params = {f"--{name}={value.strip(chr(39))}" for name, value in group["rayStartParams"].items()}
        args = {it.replace("$(POD_IP)", "$POD_IP") for it in plain[role]["spec"]["containers"][0]["args"]}
        assert params <= args
        assert args - params <= {"start", "--head", "--port=6379", "--address=demo-twinring-head:6379", "--block"}
        assert "command" not in group["template"]["spec"]["containers"][0]


def test_ray_and_the_data_plane_are_closed_to_others(helm: Helm) -> None:
    policies = [it for it in helm.objects(*FIXED_TOKENS) if it["kind"] == "NetworkPolicy"]
    inside = one(policies, "NetworkPolicy", "demo-twinring-inside")["spec"]
    clients = one(policies, "NetworkPolicy", "demo-twinring-clients")["spec"]
    (expression,) = inside["podSelector"]["matchExpressions"]
    assert set(expression["values"]) == {"head", "prefill", "decode", "router"}
    assert inside["ingress"] == [{"from": [{"podSelector": inside["podSelector"]}]}]
    assert clients["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert clients["ingress"] == [{"ports": [{"port": "http"}, {"port": "grpc"}]}]


def test_random_tokens_differ_and_match_their_hash(helm: Helm) -> None:
    first, second = (one(helm.objects(), "Secret", "demo-twinring-tenants")["stringData"] for _ in range(2))
    assert len(first["token"]) >= 32 and first["token"] != second["token"]
    (operator,) = yaml.safe_load(first["tenants.yaml"])["tenants"]
    assert operator["token_sha256"] == hashlib.sha256(first["token"].encode()).hexdigest()


def test_dashboards_and_alerts_are_carried_whole(helm: Helm, tmp_path: Path) -> None:
    """Their own {{ }} is not helm's."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    dashboard = {"title": "a", "panels": [{"legendFormat": "{{worker}}"}]}
    groups = [
        {"name": "g", "rules": [{"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }}"}}]}
    ]
    for folder, name, content in (("dashboards", "one.json", dashboard), ("alerts", "two.yaml", {"groups": groups})):
        (chart / folder).mkdir(exist_ok=True)
        (chart / folder / name).write_text(json.dumps(content))
    done = helm.try_template("--set", "prometheusRule.enabled=true", chart=chart)
    assert done.returncode == 0, done.stderr
    objects = [it for it in yaml.safe_load_all(done.stdout) if it]
    shown = one(objects, "ConfigMap", "demo-twinring-dashboard-one")
    assert json.loads(shown["data"]["one.json"]) == dashboard
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert one(objects, "PrometheusRule", "demo-twinring-two")["spec"]["groups"] == groups


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prefil.replicas=2", "Additional property prefil is not allowed"),
        ("prefill.replicas=0", "prefill.replicas: Must be greater than or equal to 1"),
        ("router.replicas=2", "router.replicas: Must be less than or equal to 1"),
        ("prefill.shmSize=big", "prefill.shmSize: Does not match pattern"),
        ("decode.extraArgs={verbose}", "decode.extraArgs.0: Does not match pattern"),
        ("auth.tenants[0].name=a", "auth.tenants.0: token_sha256 is required"),
        ("model.download.repo=noslash", "model.download.repo: Does not match pattern"),
        ("prefill.gpus=1", "prefill.gpus is 1 and decode.gpus is 0"),
        ("prefill.autoscaling.enabled=true", "prefill.autoscaling.enabled needs kuberay.enabled=false"),
        ("ingress.http.enabled=true", "ingress.http.host is needed"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Helm, setting: str, message: str) -> None:
    done = helm.try_template("--set", setting)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(("args", "model"), [((), "demo_model"), (("--set", "model.path=/m/Qwen3-0.6B"), "Qwen3-0.6B")])
def test_notes_name_the_next_commands(helm: Helm, tmp_path: Path, args: tuple[str, ...], model: str) -> None:
    notes = rendered_notes(helm, tmp_path, *args)
    assert "kubectl -n serving rollout status deployment/demo-twinring-router" in notes
    assert "helm -n serving test demo" in notes
    assert f'"model": "{model}"' in notes
    assert "kuberay.enabled=false" not in notes  # the operator is there


def rendered_notes(helm: Helm, folder: Path, *args: str) -> str:
    """`helm template` leaves the notes out, so a copy of the chart shows them as an object."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    notes = (chart / "templates" / "NOTES.txt").read_text()
    (chart / "templates" / "_notes.tpl").write_text('{{ define "notes" }}' + notes + "{{ end }}")
    (chart / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | quote }}\n')
    done = helm.try_template("--show-only", "templates/notes.yaml", *args, chart=chart)
    assert done.returncode == 0, done.stderr
    return str(yaml.safe_load(done.stdout)["notes"])
