"""What holds for every test: Ray starts only where a test says so, torch takes one thread, no clock ends an example,
and kernels in Triton run under its interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: it decides as its modules are read

import sys
from typing import NoReturn

import pytest
import ray
from hypothesis import settings

# Hypothesis measures its 200 ms by the clock on the wall: on a machine that stalls, any example may pass them.
settings.register_profile("twinring", deadline=None)
settings.load_profile("twinring")


def _refuse_to_start(*_: object, **__: object) -> NoReturn:
    raise AssertionError("this test starts Ray: mark it with @pytest.mark.ray")


@pytest.fixture(autouse=True)
def ray_only_where_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setattr(ray, "init", _refuse_to_start)


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Two threads on busy cores make a step several times slower. Test modules that need torch have imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
