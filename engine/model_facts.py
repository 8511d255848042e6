"""What a checkpoint folder says about its model without loading it: sizes, limits, fingerprint, whether we serve it.

Opens the weight files only to hash them and to see that they are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from engine.modelled_runner import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS
from engine.worker_config import EngineConfig
from protos.types import KVLayout

# Each has golden tests against transformers: tests/engine/test_model_families.py.
SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
)
# Of these, the rotation of a token depends on its position alone; dynamic and longrope also ask for the batch's length.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
MAX_HASHED_BYTES = 1 << 30  # of weights; beyond, samples are hashed
SAMPLE_BYTES = 1 << 20


class ModelLoadError(ValueError):
    """Names the folder and why its model is not served."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot load the model in {path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ModelFacts:
    path: Path
    fingerprint: str  # hex; equal for equal config and weights, wherever they lie
    architecture: str
    dtype: str  # of the checkpoint; a worker may load it in another
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None  # tokens; of those layers that have one

    def kv_layout(self, dtype: str, block_size: int, hash_block_size: int, numerics: str = "") -> KVLayout:
        """The layout of this model's KV cache on a worker that is not tensor-parallel."""
        if dtype not in ITEMSIZES:
            raise ValueError(f"unsupported dtype {dtype!r}: choose one of {', '.join(ITEMSIZES)}")
        if block_size < 1 or hash_block_size < 1 or block_size % hash_block_size:
            raise ValueError(f"block_size {block_size} is not a multiple of hash_block_size {hash_block_size}")
        return KVLayout(
            model_fingerprint=self.fingerprint,
            dtype=dtype,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            hash_block_size=hash_block_size,
            itemsize=ITEMSIZES[dtype],
            numerics=numerics,
        )

    def as_run_by(self, engine: EngineConfig) -> ModelFacts:
        """Of the model itself or, where steps are modelled, of what stands in for it: the same tokens, contexts as long
        as the hardware holds, and KV that is there only to be moved."""
        hardware = engine.modelled_hardware
        if hardware is None:
            return self
        return replace(
            self,
            architecture="modelled",
            max_model_len=hardware.num_kv_tokens,
            num_layers=NUM_LAYERS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            sliding_window=None,
        )


def read_model_facts(path: str | Path) -> ModelFacts:
    """Facts of the checkpoint in folder `path`; ModelLoadError where there is none or we do not serve it."""
    folder = Path(path)
    raw = _read_config(folder)
    _refuse_unsupported(folder, raw)
    config = _parse_config(folder)
    for rope_type in _rope_types(config.rope_parameters or {}):
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ModelLoadError(folder, f"rope type {rope_type!r} is not supported")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelFacts(
        path=folder,
        fingerprint=_fingerprint(folder),
        architecture=raw["architectures"][0],
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        max_model_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(folder, config),
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        sliding_window=getattr(config, "sliding_window", None),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelLoadError(folder, "no such folder")
    if (folder / "adapter_config.json").exists():
        raise ModelLoadError(folder, "it is an adapter (adapter_config.json): merge it into its base model first")
    config = _read_json(folder, "config.json")
    if config is None:
        raise ModelLoadError(folder, "no config.json")
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    try:
        content = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelLoadError(folder, f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(folder, f"{name} holds no JSON object")
    return content


def _refuse_unsupported(folder: Path, raw: dict[str, Any]) -> None:
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ModelLoadError(folder, f"config.json must name one architecture, it has {architectures!r}")
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise ModelLoadError(folder, f"architecture {architectures[0]!r} is not supported (supported: {supported})")
    if "auto_map" in raw:
        raise ModelLoadError(folder, "it brings code of its own (auto_map), which is never run")
    if "quantization_config" in raw:
        raise ModelLoadError(folder, "quantized checkpoints are not supported")
    if raw.get("use_bidirectional_attention"):
        raise ModelLoadError(folder, "use_bidirectional_attention: such a model does not generate text")


def _parse_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # What a config with a wrong value raises depends on the value.
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ModelLoadError(folder, f"config.json is not usable: {error}") from error
    return config


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Gemma 3 has parameters for every type of layer, the others one set for all."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {each.get("rope_type", "default") for each in nested or [parameters]}


def _eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """generation_config.json goes first: chat models add their end-of-turn token only there."""
    generation = _read_json(folder, "generation_config.json") or {}
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


# --- weights, as files ----------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each there and whole, in the order of their names."""
    index = _read_json(folder, "model.safetensors.index.json")
    if index is None:
        names = ["model.safetensors"]
    else:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(folder, "model.safetensors.index.json has no weight_map")
        names = sorted(set(weight_map.values()))
    for name in names:
        _check_weight_file(folder, name)
    return [folder / name for name in names]


def _check_weight_file(folder: Path, name: str) -> None:
    """A safetensors file is 8 bytes of header length, a JSON header, and exactly the bytes its header promises."""
    if Path(name).name != name:
        raise ModelLoadError(folder, f"weights outside of the folder: {name!r}")
    try:
        size = (folder / name).stat().st_size
        header = _read_header(folder / name)
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
    except FileNotFoundError as error:
        raise ModelLoadError(folder, f"no {name} (only safetensors weights are loaded)") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelLoadError(folder, f"{name} is not a safetensors file: {error!r}") from error
    expected = 8 + len(header) + max(ends, default=0)
    if size != expected:
        raise ModelLoadError(folder, f"{name} has {size} bytes where its header promises {expected}")


def _read_header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"header length {length} is longer than the file")
        return stream.read(length)


def _fingerprint(folder: Path) -> str:
    """Hash of the config and the weights; of large weights, of their headers and evenly spaced samples."""
    files = weight_files(folder)
    whole = sum(file.stat().st_size for file in files) <= MAX_HASHED_BYTES
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        for piece in _pieces(file) if whole else _samples(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(SAMPLE_BYTES):
            yield piece


def _samples(file: Path, num_samples: int = 16) -> Iterator[bytes]:
    yield _read_header(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        for sample in range(num_samples):
            stream.seek(max(0, size - SAMPLE_BYTES) * sample // (num_samples - 1))
            yield stream.read(SAMPLE_BYTES)
