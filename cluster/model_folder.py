"""Where a model lies: a folder as given, or the Hugging Face cache for the id of a repository. Downloads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(model: str, hub_cache: str | None) -> Path:
    """The folder of `model`; hub_cache None: the usual one of this machine. ValueError says what to do where the model
    is in neither place."""
    folder = Path(model).expanduser()
    # A path stays one where it is missing: the refusal then names the folder.
    if folder.exists() or not is_hub_id(model):
        return folder.absolute()
    try:
        return Path(snapshot_download(model, cache_dir=hub_cache, local_files_only=True)).absolute()
    except (LocalEntryNotFoundError, HFValidationError) as error:
        into = "" if hub_cache is None else f" --cache-dir {hub_cache}"
        raise ValueError(
            f"model {model!r} is no folder, and not whole in the local Hugging Face cache; nothing is downloaded while "
            f"serving. Run `hf download {model}{into}` first, or give the folder of a checkpoint"
        ) from error


def model_name(model: str) -> str:
    """How clients call it: a Hub id as it is, of a path the last part."""
    return model if is_hub_id(model) and not Path(model).exists() else Path(model).expanduser().absolute().name


def is_hub_id(model: str) -> bool:
    return HUB_ID.fullmatch(model) is not None and not model.startswith(".")
