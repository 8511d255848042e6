"""Loading: facts without weights, and a reason for every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import engine.model_facts
from engine.model_facts import ModelLoadError, read_model_facts
from engine.model_loader import load_model
from tests.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_facts(pristine: Path) -> None:
    facts = read_model_facts(pristine)
    assert (facts.architecture, facts.dtype) == ("LlamaForCausalLM", "float32")
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids) == (VOCAB_SIZE, 2048, (EOS_TOKEN_ID,))
    assert (facts.num_layers, facts.num_attention_heads, facts.num_kv_heads, facts.head_dim) == (3, 4, 2, 16)
    assert facts.sliding_window is None
    layout = facts.kv_layout("bfloat16", block_size=64, hash_block_size=32)
    assert layout.block_nbytes == 3 * 2 * 64 * 2 * 16 * 2
    assert layout.model_fingerprint == facts.fingerprint


def test_sliding_window_and_head_dim_are_read(tmp_path: Path) -> None:
    facts = read_model_facts(save_tiny_model(tmp_path, "qwen3", sliding_window=9))
    assert (facts.sliding_window, facts.head_dim) == (9, 32)


def test_end_of_turn_tokens_of_the_generation_config_count(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))
    assert read_model_facts(folder).eos_token_ids == (257, 259)


def test_block_sizes_must_fit(pristine: Path) -> None:
    with pytest.raises(ValueError, match="48"):
        read_model_facts(pristine).kv_layout("float32", block_size=48, hash_block_size=32)


def test_the_fingerprint_is_of_the_content_not_of_the_place(pristine: Path, folder: Path) -> None:
    before = read_model_facts(pristine).fingerprint
    assert read_model_facts(folder).fingerprint == before
    edit_weights(folder, lambda weights: weights["model.norm.weight"].add_(0.5))
    assert read_model_facts(folder).fingerprint != before


def test_the_fingerprint_sees_the_config(pristine: Path, folder: Path) -> None:
    edit_config(folder, rms_norm_eps=1e-4)
    assert read_model_facts(folder).fingerprint != read_model_facts(pristine).fingerprint


def test_large_weights_are_sampled_from_end_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.model_facts, "MAX_HASHED_BYTES", 1)
    monkeypatch.setattr(engine.model_facts, "SAMPLE_BYTES", 64)
    fingerprints = [read_model_facts(folder).fingerprint]
    file = folder / "model.safetensors"
    for place in (-1, file.stat().st_size // 7):  # the last byte of the last sample, and one between samples
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        fingerprints.append(read_model_facts(folder).fingerprint)
    assert fingerprints[0] != fingerprints[1]
    assert fingerprints[1:] == [fingerprints[1]] * 2, "between the samples nothing is read"


def test_sharded_weights_load(pristine: Path, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for shard in set(weight_map.values()):
        part = {name: weight for name, weight in weights.items() if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded, whole = load_model(folder).model.state_dict(), load_model(pristine).model.state_dict()
    assert sharded.keys() == whole.keys()
    assert all(sharded[name].equal(whole[name]) for name in whole)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no model-1\.safetensors"):
        read_model_facts(folder)


def test_the_loaded_model_is_in_eval_mode_and_of_the_asked_dtype(pristine: Path) -> None:
    loaded = load_model(pristine, dtype="bfloat16")
    assert not loaded.model.training
    assert {weight.dtype for weight in loaded.model.parameters() if weight.dim() == 2} == {torch.bfloat16}
    assert loaded.dtype == "bfloat16"


def test_loading_prints_nothing(pristine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.enable_progress_bar()
    load_model(pristine)
    assert capfd.readouterr() == ("", "")


def test_an_adapter_without_a_config_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="merge it into its base model"):
        read_model_facts(tmp_path)


def test_buffers_that_old_checkpoints_saved_are_no_strangers(folder: Path) -> None:
    """Llama 2 has the frequencies of its rotation among its weights."""
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights.update({buffer: torch.zeros(8)}))
    load_model(folder)


def test_weights_in_pickles_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="only safetensors"):
        load_model(folder)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def rope(**parameters: Any) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_theta": 10000.0, "factor": 2.0, **parameters})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "no such folder"),
        (remove("config.json"), "no config.json"),
        (write("config.json", b"{"), "config.json cannot be read"),
        (write("config.json", b"[]"), "no JSON object"),
        (config(architectures=None), "must name one architecture"),
        (config(architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not supported"),
        (config(architectures=["MixtralForCausalLM"]), "'MixtralForCausalLM' is not supported"),
        (config(architectures=["GptOssForCausalLM"]), "'GptOssForCausalLM' is not supported"),
        (config(architectures=["Gemma3ForConditionalGeneration"]), "ConditionalGeneration' is not supported"),
        (config(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (write("adapter_config.json", b"{}"), "it is an adapter"),
        (config(num_hidden_layers="three"), "config.json is not usable"),
        (config(auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (config(quantization_config={"quant_method": "gptq"}), "quantized"),
        (rope(rope_type="dynamic"), "rope type 'dynamic'"),
        (rope(rope_type="longrope", long_factor=[1.0] * 8, short_factor=[1.0] * 8), "rope type 'longrope'"),
        (remove("model.safetensors"), r"no model\.safetensors \(only safetensors"),
        (write("model.safetensors", b"not at all a safetensors file"), "not a safetensors file"),
        (write("model.safetensors", b""), "not a safetensors file"),
        (truncate, "its header promises"),
        (write("model.safetensors.index.json", b"{}"), "no weight_map"),
        (write("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'), "outside"),
    ],
)
def test_facts_of_a_damaged_checkpoint_are_refused(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        read_model_facts(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(ModelLoadError, match=reason):
        load_model(folder)


def drop_norm(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def add_stranger(weights: dict[str, torch.Tensor]) -> None:
    weights["model.stranger.weight"] = torch.zeros(2)


def shrink_norm(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize("change", [drop_norm, add_stranger, shrink_norm])
def test_weights_that_do_not_fit_the_config_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    """transformers alone would go on, with random numbers in the gaps."""
    edit_weights(folder, change)
    with pytest.raises(ModelLoadError, match=r"model\.(norm|stranger)"):
        load_model(folder)


def test_an_unknown_dtype_is_refused(pristine: Path) -> None:
    with pytest.raises(ValueError, match="float8"):
        load_model(pristine, dtype="float8")


def test_tiny_models_are_deterministic(pristine: Path, tmp_path: Path) -> None:
    assert read_model_facts(save_tiny_model(tmp_path / "again")).fingerprint == read_model_facts(pristine).fingerprint
    other = read_model_facts(save_tiny_model(tmp_path / "other", seed=1))
    assert other.fingerprint != read_model_facts(pristine).fingerprint


def test_the_tiny_tokenizer_round_trips() -> None:
    tokenizer = tiny_tokenizer()
    text = "Zwölf Boxkämpfer, 北京 \n\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("<|user|>a<|eos|>")) < VOCAB_SIZE
