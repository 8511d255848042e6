"""The pinned helm, fetched once; without it these tests are skipped, and say so."""

from __future__ import annotations

import pytest

from tests.helm.chart import Helm, HelmMissing, helm_binary


@pytest.fixture(scope="session")
def helm() -> Helm:
    try:
        return Helm(helm_binary())
    except HelmMissing as error:
        pytest.skip(str(error))
