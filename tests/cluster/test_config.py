"""Settings: the file, then the flags, then the defaults; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import DEMO_MODEL, load_config
from cluster.supervisor import worker_slots
from protos.types import Role


def test_defaults_serve_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config()
    assert config.engine.model == DEMO_MODEL
    assert (config.num_prefill, config.num_decode, config.ray.address) == (1, 1, None)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "twinring.yaml"
    path.write_text("num_prefill: 3\nengine:\n  model: /models/a\n  block_size: 128\nlease:\n  lease_s: 4\n")
    config = load_config(str(path), {"engine.model": "/models/b", "num_decode": 2, "router.mode": None})
    assert (config.num_prefill, config.num_decode) == (3, 2)
    assert (config.engine.model, config.engine.block_size) == ("/models/b", 128)
    assert (config.router.block_size, config.router.lease_s) == (128, 4)
    assert config.router.mode == "disaggregated"


def test_ray_address_comes_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert load_config().ray.address == "10.0.0.1:6379"
    assert load_config(None, {"ray.address": "127.0.0.1:1"}).ray.address == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("num_prefill: 0", "num_prefill must be at least 1, not 0"),
        ("num_decode: many", "num_decode"),
        ("engine: {block_sise: 4}", "unknown setting engine.block_sise"),
        ("engine: {block_size: 63}", "block_size 63 is not a multiple of hash_block_size 64"),
        ("router: {block_size: 128}", "set engine.block_size only"),
        ("transfer: {checksum: md5}", "md5"),
        ("worker_port: 70000", "worker_port must be within 0 and 65535, not 70000"),
        ("worker_port: 50052", "worker_port 50052: all workers of a private Ray"),
        ("drain_timeout_s: -1", "drain_timeout_s must not be negative, not -1"),
        ("ray: {join_as_node: true}", "join_as_node needs ray.address as host:port of the cluster, not None"),
        ("ray: {join_as_node: true, address: auto}", "join_as_node needs ray.address .* not auto"),
        ("- a list", "expected a mapping"),
        ("a: [", "config"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, yaml: str, words: str) -> None:
    path = tmp_path / "twinring.yaml"
    path.write_text(yaml)
    with pytest.raises(ValueError, match=words):
        load_config(str(path))


def test_colocated_workers_are_one_pool() -> None:
    split = load_config(None, {"num_prefill": 1, "num_decode": 2})
    assert worker_slots(split) == [
        ("prefill-0", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("decode-1", Role.DECODE),
    ]
    colocated = load_config(None, {"num_prefill": 1, "num_decode": 2, "router.mode": "colocated"})
    assert worker_slots(colocated) == [(f"worker-{i}", Role.PREFILL) for i in range(3)]


def test_one_worker_may_have_a_fixed_port_anywhere() -> None:
    alone = {"num_prefill": 1, "num_decode": 0, "router.mode": "colocated", "worker_port": 50052}
    assert load_config(None, alone).worker_port == 50052
    assert load_config(None, {"worker_port": 50052, "ray.address": "10.0.0.1:6379"}).worker_port == 50052
