"""What holds for every test: Ray starts only where a test says so, and torch takes one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NoReturn

import pytest


def _refuse_to_start(*_: object, **__: object) -> NoReturn:
    raise AssertionError("this test starts Ray: mark it with @pytest.mark.ray")


@pytest.fixture(autouse=True)
def ray_only_where_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks at Ray only where something imported it already: importing it here would slow down every run."""
    if request.node.get_closest_marker("ray"):
        yield
        return
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", _refuse_to_start)
    yield
    ray = sys.modules.get("ray")  # perhaps imported by the test itself
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        _refuse_to_start()


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Two threads on busy cores make a step several times slower. Test modules that need torch have imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
