"""The guard itself: a test without the `ray` marker cannot start Ray."""

from __future__ import annotations

import pytest
import ray


def test_ray_does_not_start_unasked() -> None:
    with pytest.raises(AssertionError, match="mark it"):
        ray.init()


@pytest.mark.ray
def test_a_marked_test_has_the_real_init() -> None:
    assert ray.init.__module__.startswith("ray.")
