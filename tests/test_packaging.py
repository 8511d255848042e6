"""What pip installs: our top-level folders, all of them, under names that nobody else takes."""

from __future__ import annotations

import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_INSTALLED = {"tests"}


def setuptools_config() -> dict[str, Any]:
    config: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return config


def listed_packages() -> set[str]:
    return {pattern for pattern in setuptools_config()["packages"]["find"]["include"] if not pattern.endswith(".*")}


def python_folders() -> set[str]:
    return {path.parent.name for path in ROOT.glob("[a-z]*/__init__.py")} - NOT_INSTALLED


def test_every_folder_is_listed() -> None:
    assert python_folders() <= listed_packages()


def test_every_listed_package_exists() -> None:
    assert listed_packages() <= python_folders()


def test_every_listed_package_carries_its_subpackages() -> None:
    include = set(setuptools_config()["packages"]["find"]["include"])
    assert include == {pattern for name in listed_packages() for pattern in (name, f"{name}.*")}


@pytest.mark.parametrize("name", sorted(listed_packages()))
def test_no_other_distribution_owns_the_name(name: str) -> None:
    owners = set(packages_distributions().get(name, [])) - {"twinring"}
    assert not owners, f"{name} also comes with {owners}"


def test_the_demo_model_is_carried_along() -> None:
    patterns = setuptools_config()["package-data"]["cluster"]
    carried = {path for pattern in patterns for path in (ROOT / "cluster").glob(pattern)}
    assert {path for path in (ROOT / "cluster" / "demo_model").rglob("*") if path.is_file()} <= carried


def test_the_page_is_carried_along() -> None:
    patterns = setuptools_config()["package-data"]["router"]
    carried = {path for pattern in patterns for path in (ROOT / "router").glob(pattern)}
    files = {path for path in (ROOT / "router" / "ui").rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".html", ".css", ".js"}
    assert files <= carried
