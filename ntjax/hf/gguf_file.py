"""A GGUF file of llama.cpp's `llama` architecture as a Hugging Face model: tensors, config.json, tokenizer.

Three things differ from the model the file was made from. The rows of q and k are in another order, because
llama.cpp rotates neighbouring pairs where transformers rotates halves. The embedding stands for the output
projection where there is none. The tokenizer is a list of tokens and merges and the name of a splitting rule.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, convert_hf_to_gguf.py, `permute`)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ntjax.errors import BadData, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class GGUF:
    """The tensors of a GGUF file under their Hugging Face names; quantised ones are float32 when read."""

    def __init__(self, path: Path):
        self.path = path
        reader = _reader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        if (architecture := self.fields["general.architecture"]) != "llama":
            raise ConfigError(
                f"architecture {architecture!r}: of GGUF files, only those of 'llama' (SmolLM2 too) are read",
                where=str(path),
                fix="import the safetensors model that the file was made from",
            )
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in reader.tensors}
        self.config = self._config()
        self._check()

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        return {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}.get(
            self._tensors[name].tensor_type.name, np.dtype(np.float32)
        )

    def quantised(self) -> bool:
        """Whether any tensor is held in fewer bits than a float."""
        return any(tensor.tensor_type.name not in ("F32", "F16", "BF16") for tensor in self._tensors.values())

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(self.dtype(name), copy=False)
        if name.endswith("q_proj.weight"):
            return in_halves(array, self._get("attention.head_count"))
        if name.endswith("k_proj.weight"):
            return in_halves(array, self._get("attention.head_count_kv"))
        return array

    def file(self, name: str) -> Path:
        return self.path

    def generation_config(self) -> dict[str, int]:
        """generation_config.json: the token ids that the file names."""
        keys = {
            "bos_token_id": "bos_token_id",
            "eos_token_id": "eos_token_id",
            "pad_token_id": "padding_token_id",
        }
        fields = {name: self.fields.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
        return {name: value for name, value in fields.items() if value is not None}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer in the file, with its chat template."""
        from transformers import PreTrainedTokenizerFast

        fields = {key.removeprefix("tokenizer.ggml."): value for key, value in self.fields.items()}
        named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: fields.get(f"{key}_token_id") for name, key in named.items()}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(fields, str(self.path)),
            model_max_length=self._get("context_length"),
            clean_up_tokenization_spaces=False,
            **{name: fields["tokens"][i] for name, i in ids.items() if i is not None},
        )
        tokenizer.chat_template = self.fields.get("tokenizer.chat_template")
        return tokenizer

    def _get(self, key: str) -> Any:
        if f"llama.{key}" not in self.fields:
            raise BadData(f"no llama.{key}", where=str(self.path), fix="convert the model again")
        return self.fields[f"llama.{key}"]

    def _hf_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        match stem.split("."):
            case [part] if kind == "weight" and part in TOP:
                return f"{TOP[part]}.weight"
            case ["blk", layer, part] if kind == "weight" and part in LAYER:
                return f"model.layers.{layer}.{LAYER[part]}.weight"
        raise BadData(
            f"tensor {name}: of a Llama's GGUF, scaled positions, biases and experts aren't read",
            where=str(self.path),
            fix="import the safetensors model that the file was made from",
        )

    def _config(self) -> dict[str, Any]:
        """config.json, as transformers writes it for a Llama."""
        heads, embed = self._get("attention.head_count"), self._get("embedding_length")
        head_dim = self.fields.get("llama.attention.key_length", embed // heads)
        scaling = self.fields.get("llama.rope.scaling.type", "none")
        if scaling != "none" or self.fields.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise ConfigError(
                f"positions scaled by {scaling!r}, or rotating only part of a head, aren't read from GGUF",
                where=str(self.path),
                fix="import the safetensors model that the file was made from",
            )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(self.fields["tokenizer.ggml.tokens"]),
            "hidden_size": embed,
            "intermediate_size": self._get("feed_forward_length"),
            "num_hidden_layers": self._get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv"),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._get("context_length"),
            "rms_norm_eps": _short(self._get("attention.layer_norm_rms_epsilon")),
            "rope_parameters": {
                "rope_theta": _short(self.fields.get("llama.rope.freq_base", 10000.0)),
                "rope_type": "default",
            },
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        } | self.generation_config()

    def _check(self) -> None:
        """Every tensor of every layer is there."""
        layers = range(self.config["num_hidden_layers"])
        wanted = {f"model.layers.{i}.{part}.weight" for i in layers for part in LAYER.values()}
        wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
        if missing := sorted(wanted - self.names()):
            raise BadData(
                f"{len(missing)} tensors are missing, among them {missing[0]}", where=str(self.path)
            )
        if extra := sorted(self.names() - wanted - {"lm_head.weight"}):
            raise BadData(f"{len(extra)} tensors too many, such as {extra[0]}", where=str(self.path))


def in_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows (heads * head_dim, in) from pairs (0, 1), (2, 3), ... of each head to its halves.

    Row 2i + j of a head becomes row j * head_dim / 2 + i.
    """
    rows, inputs = array.shape
    return array.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ConfigError(
            "reading a GGUF file needs the package gguf", where=str(path), fix="pip install 'ntjax[gguf]'"
        ) from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        from ntjax.hf.files import content_hint

        hint = content_hint(path) or f"cut short, or not GGUF ({type(error).__name__}: {error})"
        raise BadData(hint, where=str(path), fix="download the file again") from None


def _byte_level(fields: dict[str, Any], where: str) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` from the fields of tokenizer.ggml."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitters = {
        "gpt-2": byte_level,
        # llama.cpp cuts digits off first for this one; without it "\n\n1" gets other ids
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if fields["model"] != "gpt2" or fields.get("pre") not in splitters:
        raise ConfigError(
            f"the tokenizer is {fields['model']!r} splitting by {fields.get('pre')!r}; "
            f"read are 'gpt2' splitting by one of {sorted(splitters)}",
            where=where,
            fix="import the safetensors model that the file was made from",
        )
    tokens = fields["tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = splitters[fields["pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, fields["token_type"], strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in kinds if k == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == USER_DEFINED])
    if fields.get("add_bos_token", False):
        bos = fields["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer
