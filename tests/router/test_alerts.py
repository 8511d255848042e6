"""The alerting rules, by Prometheus' own checker: each fires in trouble and does not beside it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "helm/alerts/twinring.yaml"
CASES = ROOT / "tests/alerts_test.yaml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)"
)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, dict[str, str]]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@needs_promtool
def test_rules_are_sound() -> None:
    promtool("check", "rules", RULES)


@needs_promtool
def test_each_alert_fires_and_does_not() -> None:
    promtool("test", "rules", CASES)


def test_every_alert_has_its_case_its_words_and_its_runbook() -> None:
    cases, runbook = CASES.read_text(), (ROOT / "docs/operations.md").read_text()
    for rule in rules():
        name = rule["alert"]
        assert f'alertname="{name}", alertstate="firing"' in cases, name
        assert {"summary", "description", "runbook"} == rule["annotations"].keys(), name
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert f"| `{name}` |" in runbook, f"docs/operations.md#alerts does not say what to do about {name}"
