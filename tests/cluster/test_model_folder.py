"""A model by folder or by the id of its repository, from the local cache alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.model_folder import model_folder, model_name
from cluster.serve import kv_estimate, served_model, with_folder
from engine.model_facts import ModelLoadError, read_model_facts
from engine.model_loader import load_model
from protos.types import Role
from tests.tiny_models import save_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A cache as `hf download acme/tiny-llama` leaves it: files by hash, a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--acme--tiny-llama"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.move(save_tiny_model(tmp_path / "made"), blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache_and_loads(hub_cache: Path) -> None:
    folder = model_folder("acme/tiny-llama", str(hub_cache))
    assert folder.name == COMMIT
    assert load_model(folder).facts.architecture == "LlamaForCausalLM"


def test_a_hub_id_that_is_not_cached_says_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match="acme/other") as caught:
        model_folder("acme/other", str(hub_cache))
    assert f"hf download acme/other --cache-dir {hub_cache}" in str(caught.value)
    assert "give the folder" in str(caught.value)


def test_a_snapshot_without_its_weights_is_refused(hub_cache: Path) -> None:
    folder = model_folder("acme/tiny-llama", str(hub_cache))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors"):
        read_model_facts(model_folder("acme/tiny-llama", str(hub_cache)))


def test_an_id_that_no_repository_can_have_is_refused(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"acme/\.\.x"):
        model_folder("acme/..x", str(hub_cache))


@pytest.mark.parametrize("model", ["/no/such/folder", "./acme/other", "../other", "a/b/c", "other"])
def test_a_path_stays_a_path(hub_cache: Path, model: str) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        read_model_facts(model_folder(model, str(hub_cache)))


def test_a_folder_goes_before_the_cache(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny-llama").mkdir(parents=True)
    assert model_folder("acme/tiny-llama", str(hub_cache)) == tmp_path / "acme" / "tiny-llama"
    assert model_name("acme/tiny-llama") == "tiny-llama"


def test_clients_see_the_id_and_workers_get_the_folder(hub_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "twinring.yaml"
    file.write_text(json.dumps({"hub_cache": str(hub_cache), "engine": {"model": "acme/tiny-llama"}}))
    config = load_config(str(file))
    facts = read_model_facts(model_folder(config.engine.model, config.hub_cache))
    served = served_model(config, facts, b"k" * 32)
    assert served.name == "acme/tiny-llama"
    assert served.decode(served.encode("text")) == "text"
    engine = with_folder(config, facts).engine
    assert engine == replace(config.engine, model=str(facts.path))


def test_workers_of_both_roles_get_the_folder(hub_cache: Path) -> None:
    changes = {"prefill_engine.num_blocks": 5, "decode_engine.num_blocks": 9}
    config = load_config(None, {"hub_cache": str(hub_cache), "engine.model": "acme/tiny-llama", **changes})
    facts = read_model_facts(model_folder(config.engine.model, config.hub_cache))
    made = with_folder(config, facts)
    seen = [(made.engine_of(role).model, made.engine_of(role).num_blocks) for role in Role]
    assert seen == [(str(facts.path), 5), (str(facts.path), 9)]
    assert kv_estimate(config, facts).startswith("each prefill worker fits 320 tokens of KV (5 blocks, ")
    assert "; each decode worker fits 576 tokens of KV (9 blocks, " in kv_estimate(config, facts)
    assert kv_estimate(load_config(None, {"engine.num_blocks": 5}), facts).startswith("each worker fits 320 tokens")


@pytest.mark.parametrize("model", ["/models/tiny", "/models/tiny/", "models/sub/tiny"])
def test_a_folder_is_called_by_its_last_part(model: str) -> None:
    assert model_name(model) == "tiny"
