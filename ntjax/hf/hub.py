"""A model's name or path -> the folder it is in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntjax.errors import InputMissing, Refused, UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# What is read beside the weights; nothing that is code.
SIDE_FILES = ("*.json", "tokenizer*.model", "*.jinja", "vocab*.txt", "merges.txt")
ANSWER_S = 10  # seconds the hub has to answer: huggingface_hub itself sets no limit on this request
WAYS_OUT = (
    "give a local folder (`hf download NAME --local-dir DIR` where there is a network); "
    "or set HTTPS_PROXY, HF_ENDPOINT (a mirror), HF_TOKEN (a gated or private model)"
)


def locate(
    name_or_path: str,
    *,
    cache_dir: str | Path | None = None,
    folders: Sequence[Path] = (),
    weights: bool = True,
) -> Path:
    """The folder (or GGUF file) that `name_or_path` means: a path seen from one of `folders` or from here,
    else a model of the Hugging Face hub, downloaded into its cache without code and without pickles; without
    `weights`, its config.json alone.

    huggingface_hub's settings hold: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HTTPS_PROXY. A model in
    the cache is found without a network.

    Raises:
        InputMissing: it is neither, or the hub can't be reached (after at most `ANSWER_S` seconds).
        Refused: the hub has its weights only as pickles.
    """
    path = Path(name_or_path).expanduser()
    for candidate in (*(folder / path for folder in folders), path):
        if candidate.exists():
            return candidate
    places = " or ".join(str(folder.absolute()) for folder in (*folders, Path.cwd()))
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_path) or name_or_path.endswith(".gguf"):
        raise InputMissing(f"{name_or_path} isn't there, seen from {places}", fix="correct the path")
    return _download(name_or_path, cache_dir, f"there is no folder {name_or_path} in {places}", weights)


def _download(name: str, cache_dir: str | Path | None, nowhere: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, timeout=ANSWER_S)
        patterns = _patterns(info) if weights else ["config.json"]
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:  # whatever the HTTP library beneath raises, the hub couldn't give the model
        if cached := _cached(name, cache_dir, weights):
            return cached
        reason = str(error).strip().partition("\n")[0]
        raise InputMissing(
            f"{nowhere}, and the hub gives no such model ({type(error).__name__}: {reason})", fix=WAYS_OUT
        ) from None


def _cached(name: str, cache_dir: str | Path | None, weights: bool) -> Path | None:
    """The snapshot that an earlier download left, if what is wanted of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["config.json", "*.safetensors"] if weights else ["config.json"]
    try:
        folder = snapshot_download(name, cache_dir=cache_dir, local_files_only=True, allow_patterns=wanted)
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _patterns(info: ModelInfo) -> list[str]:
    """What to download: safetensors, or Flax weights where there are none."""
    names = [file.rfilename for file in info.siblings or []]
    # Some have all weights a second time, as consolidated.safetensors.
    for weights in ("*model*.safetensors", "*.safetensors", "flax_model*.msgpack"):
        if any(Path(name).match(weights) and "/" not in name for name in names):
            return [*SIDE_FILES, weights]
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise Refused(
            f"the hub has the weights of {info.id} only as pickles, which can run code when opened",
            fix="use a revision with safetensors, or convert it where you trust it: transformers' "
            "AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER), then give that folder",
        )
    raise InputMissing(
        f"{info.id} on the hub holds no safetensors and no flax_model.msgpack", fix="name another model"
    )
