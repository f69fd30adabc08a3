"""Tokenizers in and out, and the ids a model stops at.

A tokenizer without a padding token is left without one. Rows are filled with `pad_id`, which the masks take
out again; had it been set, it would be saved, and whoever trains on from the folder would mask the end of
every answer out of the loss, because there it equals padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax.errors import BadData, ConfigError, InputMissing, Refused
from ntjax.hf.files import read_json, replacing, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; never its own code, never from the network.

    Raises:
        InputMissing: there is none. BadData: it can't be read. Refused: it is code that comes with the model.
        ConfigError: it has no token that ends a sequence.
    """
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    if not settings.exists() and not (folder / "tokenizer.json").exists():
        raise InputMissing(
            "no tokenizer.json", where=str(folder), fix="copy the tokenizer files beside the weights"
        )
    if settings.exists() and "auto_map" in read_json(settings) and not (folder / "tokenizer.json").exists():
        raise Refused(
            "the tokenizer is code that comes with the model (auto_map); ntjax never runs it",
            where=str(settings),
            fix="use a tokenizer.json: transformers' AutoTokenizer saves one where you trust that code",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself for a bad file
        raise BadData(f"the tokenizer can't be read: {error}", where=str(folder)) from None
    pad_id(tokenizer)  # raises where nothing could end a sequence
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up: the tokenizer's own, else that of its end token. It is always masked.

    Raises ConfigError: the tokenizer has no end token, so no answer could end.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos_token, so nothing could end a sequence",
            where=tokenizer.name_or_path,
            fix="set eos_token in tokenizer_config.json",
        )
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises BadData if a token has no row in an embedding of `vocab_size`: a look-up clamps its id."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise BadData(
            f"max id {largest} ({token!r}) >= embedding rows {vocab_size}",
            where=tokenizer.name_or_path,
            fix="use the tokenizer that came with the weights",
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template."""
    tokenizer.save_pretrained(folder)


def generation_config(source: Path | None, tokenizer: Any, stops: Sequence[int] = ()) -> dict[str, Any]:
    """generation_config.json for a model trained to stop at the tokenizer's end token and at `stops`.

    The source folder's settings are kept and its stop ids added to: a model that was trained to end with one
    token and told to wait for another never stops. A pad id is written only if the source or the tokenizer
    has one.
    """
    path = source / "generation_config.json" if source else None
    config = read_json(path) if path and path.exists() else {}
    known = config.get("eos_token_id")
    known = [] if known is None else known if isinstance(known, list) else [known]
    ids = list(dict.fromkeys([tokenizer.eos_token_id, *stops, *known]))
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    for name in ("bos_token_id", "pad_token_id"):
        if config.get(name) is None and getattr(tokenizer, name) is not None:
            config[name] = getattr(tokenizer, name)
    return config


def save_generation_config(
    folder: Path, source: Path | None, tokenizer: Any, stops: Sequence[int] = ()
) -> None:
    """Writes `generation_config` into a folder."""
    with replacing(folder, "generation_config.json") as create:
        create("generation_config.json").write(to_json(generation_config(source, tokenizer, stops)))


def stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's and generation_config.json's ends of sequence."""
    path = folder / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = named if isinstance(named, list) else [named]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})
