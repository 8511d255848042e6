"""Settings: the file, then the flags, then the defaults; what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.config import DEMO_MODEL, load_config
from cluster.pools import worker_slots
from cluster.tenants import FILE_VARIABLE, TOKENS_VARIABLE, hash_of
from engine.config import PullConfig
from protos.cost_model import HARDWARE
from protos.types import Role
from router.config import RouterConfig


def test_defaults_serve_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config()
    assert config.engine.model == DEMO_MODEL
    assert (config.num_prefill, config.num_decode, config.ray.address) == (1, 1, None)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "twinring.yaml"
    path.write_text("num_prefill: 3\nengine:\n  model: /models/a\n  block_size: 128\nlease:\n  lease_s: 4\n")
    config = load_config(str(path), {"engine.model": "/models/b", "num_decode": 2})
    assert (config.num_prefill, config.num_decode) == (3, 2)
    assert (config.engine.model, config.engine.block_size) == ("/models/b", 128)
    assert (config.router.block_size, config.router.lease_s) == (128, 4)
    assert config.router.mode == "disaggregated"


def test_modelled_hardware_may_be_written_out(tmp_path: Path) -> None:
    """As a fit of a cluster's own costs gives it."""
    path = tmp_path / "twinring.json"  # JSON is YAML
    path.write_text(json.dumps({"engine": {"modelled": asdict(HARDWARE["8b-h100"])}}))
    assert load_config(str(path)).engine.modelled_hardware == HARDWARE["8b-h100"]
    assert load_config(None, {"engine.modelled": "8b-h100"}).engine.modelled_hardware == HARDWARE["8b-h100"]


def test_workers_pull_by_what_they_measure_unless_told_otherwise() -> None:
    config = load_config()
    assert config.engine.pulls == PullConfig() and config.engine.pulls.s_per_token is None
    assert config.router.pull_s_per_token is None
    config = load_config(None, {"engine.pulls.s_per_token": "2.5e-6", "engine.pulls.base_s": 0.01})
    assert config.engine.pulls == PullConfig(s_per_token=2.5e-6, base_s=0.01)
    assert load_config(None, {"engine.pulls": None, "router.pull_s_per_token": 0}).router.pull_s_per_token == 0


def test_pulls_and_returns_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "twinring.yaml"
    path.write_text("{engine: {pulls: null}, router: {dispatch_tokens: null}}")
    config = load_config(str(path))
    assert config.engine.pulls is None and config.router.dispatch_tokens == load_config().router.dispatch_tokens
    returns = load_config(None, {"engine.pulls.max_returns": 0, "router.returns": False}).engine.pulls
    assert returns is not None and returns.max_returns == 0


def test_a_worker_is_sent_what_two_of_its_steps_compute_unless_told_otherwise() -> None:
    assert load_config(None, {"engine.max_num_batched_tokens": "300"}).router.dispatch_tokens == 600
    assert load_config().router.dispatch_tokens == RouterConfig().dispatch_tokens
    changes = {"engine.max_num_batched_tokens": 300, "router.dispatch_tokens": "0"}
    assert load_config(None, changes).router.dispatch_tokens == 0


def test_pools_may_be_sized_apart(tmp_path: Path) -> None:
    path = tmp_path / "twinring.yaml"
    path.write_text(
        "engine: {num_blocks: 300, max_num_seqs: 8, pulls: {max_served: 2, base_s: 0.5}}\n"
        "prefill_engine: {num_blocks: 90, max_num_batched_tokens: 1000}\n"
        "decode_engine: {pulls: {max_served: 0}}\n"
    )
    config = load_config(str(path), {"decode_engine.num_blocks": 400})
    prefill, decode = config.engine_of(Role.PREFILL), config.engine_of(Role.DECODE)
    assert (prefill.num_blocks, prefill.max_num_batched_tokens, prefill.max_num_seqs) == (90, 1000, 8)
    assert (decode.num_blocks, decode.max_num_batched_tokens, decode.max_num_seqs) == (400, 512, 8)
    assert prefill.pulls == PullConfig(max_served=2, base_s=0.5)
    assert decode.pulls == PullConfig(max_served=0, base_s=0.5)
    assert config.router.dispatch_tokens == 2000, "two steps of those that prefill"


def test_pools_are_alike_unless_told_otherwise() -> None:
    config = load_config(None, {"prefill_engine": {}, "decode_engine": None, "engine.num_blocks": 7})
    assert config.engine_of(Role.PREFILL) == config.engine_of(Role.DECODE) == config.engine


def test_decode_workers_have_host_memory_only_where_it_is_asked_for_there() -> None:
    config = load_config(None, {"engine.host_cache_bytes": 1000, "decode_engine.num_blocks": 9})
    alone = load_config(None, {"engine.host_cache_bytes": 1000})
    for each in (config, alone):
        assert each.engine_of(Role.PREFILL).host_cache_bytes == 1000
        assert each.engine_of(Role.DECODE).host_cache_bytes == 0
    asked = load_config(None, {"decode_engine.host_cache_bytes": 2000})
    assert [asked.engine_of(role).host_cache_bytes for role in Role] == [0, 2000]


def test_colocated_workers_have_the_host_memory_of_the_engine() -> None:
    config = load_config(None, {"engine.host_cache_bytes": 1000, "router.mode": "colocated"})
    assert {config.engine_of(role).host_cache_bytes for _, role in worker_slots(config)} == {1000}


def test_ray_address_comes_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert load_config().ray.address == "10.0.0.1:6379"
    assert load_config(None, {"ray.address": "127.0.0.1:1"}).ray.address == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("num_prefill: 0", "num_prefill must be at least 1, not 0"),
        ("num_routers: 0", "num_routers must be at least 1, not 0"),
        ("num_decode: many", "num_decode"),
        ("engine: {block_sise: 4}", "unknown setting engine.block_sise"),
        ("engine: {block_size: 63}", "block_size 63 is not a multiple of hash_block_size 64"),
        ("engine: {modelled: abacus}", "modelled must be one of 8b-a100, .* not 'abacus'"),
        ("engine: {modelled: {num_kv_tokens: 640}}", "engine.modelled.Hardware.cost: Field required"),
        ("router: {block_size: 128}", "set engine.block_size only"),
        (
            "{engine: {pulls: null}, router: {pull_s_per_token: 1.0e-6}}",
            "s_per_token is 1e-06, but engine.pulls is null",
        ),
        ("{engine: {pulls: {max_returns: 0}}, router: {returns: true}}", "set engine.pulls.max_returns above 0"),
        ("{engine: {pulls: null}, router: {returns: true}}", "router.returns is on, but no worker takes any"),
        ("router: {dispatch_tokens: -1}", "dispatch_tokens must not be negative, got -1"),
        ("engine: {pulls: {s_per_token: -1}}", "s_per_token must not be negative"),
        ("engine: {pulls: {s_per_tokens: 1}}", "unknown setting engine.pulls.s_per_tokens"),
        ("engine: {pulls: [1]}", r"engine.pulls must be a mapping, got \[1\]"),
        ("transfer: {checksum: md5}", "md5"),
        ("worker_port: 70000", "worker_port must be within 0 and 65535, not 70000"),
        ("worker_port: 50052", "worker_port 50052: all workers of a private Ray"),
        ("drain_timeout_s: -1", "drain_timeout_s must not be negative, not -1"),
        ("ray: {join_as_node: true}", "join_as_node needs ray.address as host:port of the cluster, not None"),
        ("ray: {join_as_node: true, address: auto}", "join_as_node needs ray.address .* not auto"),
        ("router: {listen: '0.0.0.0:1'}", "listen 0.0.0.0:1 can be reached from other machines: set tenants_file"),
        ("router: {http_listen: ':8000'}", "http_listen :8000 can be reached from other machines"),
        ("router: {http_listen: 'myself:8000'}", "http_listen myself:8000 can be reached"),
        ("router: {tls_key: key.pem}", "tls_cert and tls_key go together: tls_cert is not set"),
        ("router: {tenants: []}", "router.tenants cannot be set here: tenants_file names the file"),
        ("engine: 5", "engine must be a mapping, got 5"),
        ("decode_engine: 5", "decode_engine must be a mapping, got 5"),
        ("decode_engine: {num_block: 5}", "unknown setting decode_engine.num_block; known: .*num_blocks"),
        ("decode_engine: {num_blocks: few}", "decode_engine.num_blocks: .*got 'few'"),
        ("decode_engine: {num_blocks: 0}", "decode_engine: .*num_blocks, or num_kv_tokens"),
        (
            "prefill_engine: {block_size: 128}",
            "prefill_engine.block_size is 128, engine.block_size is 64: set engine.block_size only",
        ),
        ("decode_engine: {dtype: bfloat16}", "decode_engine.dtype is bfloat16, engine.dtype is float32"),
        ("decode_engine: {model: /b}", "decode_engine.model is /b, engine.model is .*: set engine.model only"),
        ("engine: {deterministic: true, device: cuda}", "deterministic needs device cpu, not 'cuda'"),
        ("decode_engine: {deterministic: true}", "decode_engine.deterministic is True, engine.deterministic is False"),
        (
            "{engine: {deterministic: true}, decode_engine: {num_threads: 2}}",
            "decode_engine.num_threads is 2, engine.num_threads is 1: set engine.num_threads only",
        ),
        ("decode_engine: {modelled: 8b-h100}", "decode_engine.modelled is 8b-h100, engine.modelled is None"),
        (
            "{router: {mode: colocated}, decode_engine: {num_blocks: 9}}",
            "decode_engine is set, but in mode colocated every worker does both",
        ),
        ("{prefill_engine: {pulls: null}, router: {returns: true}}", "router.returns is on, but no worker takes any"),
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


# --- tenants ------------------------------------------------------------------------------------------------------

SECRET = "a-plain-token-of-ann"
HASH = hash_of(SECRET)
ENTRY = f"{{name: ann, token_sha256: {HASH}}}"


@pytest.fixture
def tenants_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.delenv(TOKENS_VARIABLE, raising=False)
    return tmp_path / "tenants.yaml"


def test_tenants_come_from_a_file(tenants_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants_file.write_text(
        f"tenants:\n- {{name: ann, token_sha256: {HASH}, is_operator: true}}\n"
        f"- {{name: bob, token_sha256: {'b' * 64}, max_priority: 2, max_concurrent_requests: 3,\n"
        "   max_requests_per_minute: 0.5, max_tokens_per_minute: 1000}\n"
    )
    config = load_config(None, {"tenants_file": str(tenants_file), "router.listen": "0.0.0.0:50051"})
    ann, bob = config.router.tenants
    assert (ann.name, ann.token_sha256, ann.is_operator, ann.max_tokens_per_minute) == ("ann", HASH, True, None)
    assert (bob.is_operator, bob.max_priority, bob.max_concurrent_requests) == (False, 2, 3)
    assert (bob.max_requests_per_minute, bob.max_tokens_per_minute) == (0.5, 1000)
    monkeypatch.setenv(FILE_VARIABLE, str(tenants_file))
    assert load_config().router.tenants == (ann, bob)


def test_tenants_come_from_tokens(tenants_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config().router.tenants == ()
    monkeypatch.setenv(TOKENS_VARIABLE, f"ann={SECRET}, bob = another=token-0123456789")
    ann, bob = load_config().router.tenants
    assert (ann.name, ann.token_sha256, ann.is_operator) == ("ann", HASH, True)
    assert (bob.name, bob.token_sha256, bob.is_operator) == ("bob", hash_of("another=token-0123456789"), False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file or directory"),
        ("", "expected a list of at least one tenant"),
        ("tenants:", "expected a list of at least one tenant"),
        ("tenants: []", "expected a list of at least one tenant"),
        ("tenants: [ann]", "expected a list of at least one tenant"),
        (f"tenants: {ENTRY}", "expected a list of at least one tenant"),
        (f"[{ENTRY}]", "expected a list of at least one tenant"),
        (f"tenants: [{ENTRY}]\nusers: []", "expected a list of at least one tenant"),
        (f"tenants:\n - name: ann\n  token: {SECRET}", "not YAML, at line 3"),
        (f"tenants: [{ENTRY}, {{name: bob, token: {SECRET}}}]", "tenant 2: unknown field token; known: name, token_"),
        (f"tenants: [{{name: ann, token_sha256: {HASH}, max_request_per_minute: 3}}]", "unknown field max_request_per"),
        (f"tenants: [{{name: ann, token_sha256: {SECRET}}}]", "tenant 1: token_sha256 of tenant ann must be 64"),
        ("tenants: [{name: ann}]", "tenant 1: token_sha256 Field required"),
        (f"tenants: [{{token_sha256: {HASH}}}]", "tenant 1: name Field required"),
        (f"tenants: [{{name: '', token_sha256: {HASH}}}]", "a tenant's name must not be empty"),
        (f"tenants: [{{name: ann, token_sha256: {HASH}, is_operator: {SECRET}}}]", "tenant 1: is_operator Input"),
        (f"tenants: [{{name: ann, token_sha256: {HASH}, max_concurrent_requests: 0}}]", "must be above 0"),
        (f"tenants: [{ENTRY}, {{name: ann, token_sha256: {'b' * 64}}}]", "two tenants have the name of ann"),
        (f"tenants: [{ENTRY}, {{name: bob, token_sha256: {HASH}}}]", "two tenants have the token of ann"),
    ],
)
def test_an_unfit_tenants_file_is_refused_and_not_quoted(tenants_file: Path, text: str | None, words: str) -> None:
    if text is not None:
        tenants_file.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_config(None, {"tenants_file": str(tenants_file)})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "tokens", ["", "ann", f"={SECRET}", "ann=short", f"ann={SECRET},", f"ann={SECRET},b=\u00f6" * 9]
)
def test_unfit_tokens_are_refused_and_not_quoted(
    tenants_file: Path, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    monkeypatch.setenv(TOKENS_VARIABLE, tokens)
    with pytest.raises(ValueError, match=r"TWINRING_TOKENS: entry \d is not name=token") as caught:
        load_config()
    assert SECRET not in str(caught.value)


def test_repeated_tokens_are_refused(tenants_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKENS_VARIABLE, f"ann={SECRET},bob={SECRET}")
    with pytest.raises(ValueError, match="two tenants have the token of ann"):
        load_config()


@pytest.mark.parametrize("from_variable", [True, False])
def test_two_sources_of_tenants_are_refused(
    tenants_file: Path, monkeypatch: pytest.MonkeyPatch, from_variable: bool
) -> None:
    tenants_file.write_text(f"tenants: [{ENTRY}]")
    monkeypatch.setenv(TOKENS_VARIABLE, f"ann={SECRET}")
    if from_variable:
        monkeypatch.setenv(FILE_VARIABLE, str(tenants_file))
    with pytest.raises(ValueError, match="from tenants_file or from TWINRING_TOKENS, not from both"):
        load_config(None, {} if from_variable else {"tenants_file": str(tenants_file)})


def test_an_empty_name_of_a_file_is_no_open_server(tenants_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "")
    with pytest.raises(ValueError, match="tenants_file ''"):
        load_config()


def test_an_empty_section_is_none(tmp_path: Path) -> None:
    path = tmp_path / "twinring.yaml"
    path.write_text("router:\nengine:\n")
    assert load_config(str(path)) == load_config()
