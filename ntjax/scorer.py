"""A reward model as a reward: its score of a prompt with its completion.

Texts are those of TRL 1.16 (`GRPOTrainer._calculate_rewards`), scores those of transformers' sequence classifiers.

Axes: N completions, R rows of a forward pass, T time, D embed, L labels (one).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ntjax.data.chat import Message
from ntjax.data.placeholders import worded
from ntjax.data.sizes import rounded
from ntjax.data.spans import rendered
from ntjax.errors import ConfigError
from ntjax.hf.files import Source, read_config
from ntjax.hf.folder import check, load_params, open_weights
from ntjax.hf.tokenizer import check_vocab, load_tokenizer, pad_id
from ntjax.layout import Layout, placing
from ntjax.mesh import ROWS, replicated
from ntjax.models import Model, build, is_scoring
from ntjax.ops.attention import Tokens
from ntjax.params import Params
from ntjax.weights import einsum

Said = str | list[Message]  # text or a conversation
HEAD = "score.weight"


class Scorer:
    """(prompts, completions) -> scores, by the scoring model of one label in `folder`, `rows` at a time.

    It is named `label` in logs, as in TRL: the folder's last part. Of texts longer than `max_length` tokens the last
    are kept, since the end is what is scored. `template` is passed to the chat template. Config, tokenizer and the
    names and shapes of weights are checked here; the weights are read at the first call.

    Raises ConfigError where the folder holds no reward model, and what reading a model's folder raises.
    """

    def __init__(
        self,
        folder: Path,
        *,
        layout: Layout,
        dtype: str,
        attention: str,
        rows: int,
        max_length: int | None = None,
        template: Mapping[str, Any] | None = None,
    ):
        assert rows % layout.rows == 0, (rows, layout.rows)
        self.folder, self.label = folder, folder.name
        self.layout, self.dtype, self.rows, self.max_length = layout, dtype, rows, max_length
        self.template = dict(template or {})
        hf, weights = read_config(folder), open_weights(folder)
        _check_reward_model(hf, weights, folder)
        self.model = build(hf, dtype=dtype, labels=1, attention=attention, layout=layout)
        check(weights, self.model.specs)
        self.tokenizer = load_tokenizer(folder)
        check_vocab(self.tokenizer, self.model.config.vocab)
        self.pad_id = pad_id(self.tokenizer)
        self._scores = jax.jit(scores(self.model, self.pad_id), out_shardings=replicated(layout.mesh))

    def __call__(self, prompts: Sequence[Said], completions: Sequence[Said]) -> np.ndarray:
        """The scores [N] float32, on every host; all hosts call this with the same completions.

        Texts of like length are scored together, in rows of 64, 128, 256... tokens: few programs, little padding.
        """
        documents = self.tokens(prompts, completions)
        order = sorted(range(len(documents)), key=lambda number: len(documents[number]))
        chunks = [order[first : first + self.rows] for first in range(0, len(order), self.rows)]
        scored = [self._forward([documents[number] for number in chunk]) for chunk in chunks]
        found = np.zeros(len(documents), np.float32)
        for chunk, each in zip(chunks, scored, strict=True):
            found[chunk] = np.asarray(each)[: len(chunk)]
        return found

    def tokens(self, prompts: Sequence[Said], completions: Sequence[Said]) -> list[list[int]]:
        """What is scored: text after text, or a conversation in the reward model's own chat template, without the
        images that it shows.

        Raises ConfigError for conversations where the reward model has no chat template.
        """
        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [ids[-self.max_length :] for ids in found] if self.max_length else found

    def load(self) -> None:
        """Reads the weights, which are otherwise read when something is scored: what room they leave can be asked."""
        jax.block_until_ready(self._params)

    def _text(self, prompt: Said, completion: Said) -> str:
        if isinstance(prompt, str):
            assert isinstance(completion, str)
            return prompt + completion
        turns = [
            {name: worded(value) if name == "content" else value for name, value in turn.items()}
            for turn in (*prompt, *completion)
        ]
        return rendered(self.tokenizer, turns, self.template, str(self.folder))

    def _forward(self, documents: Sequence[Sequence[int]]) -> jax.Array:
        """Scores [R] of at most R documents, those of empty rows after them."""
        time = rounded(max(map(len, documents)), self.max_length or sys.maxsize)
        tokens = np.full((self.rows, time), self.pad_id, np.int32)
        lengths = np.zeros(self.rows, np.int32)
        for row, document in enumerate(documents):
            tokens[row, : len(document)], lengths[row] = document, len(document)
        return self._scores(self._params, self._placed(tokens), self._placed(lengths))

    def _placed(self, array: np.ndarray) -> jax.Array:
        """An array that every host has, its rows split over all devices."""
        sharding = NamedSharding(self.layout.mesh, PartitionSpec(ROWS))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    @cached_property
    def _params(self) -> Params:
        lie = placing(self.layout, self.model.specs)
        return load_params(self.folder, self.model.specs, dtype=self.dtype, **lie)


def _check_reward_model(hf: dict[str, Any], weights: Source, folder: Path) -> None:
    """Raises ConfigError unless a folder's model gives one score."""
    if not is_scoring(hf):
        raise ConfigError(
            f"{' '.join(hf.get('architectures') or ['the model'])} gives no score",
            where=str(folder / "config.json"),
            fix='name a reward model: the folder of a reward stage, or "stage:NAME" for one of this run',
        )
    if HEAD in weights.names() and (labels := weights.shape(HEAD)[0]) != 1:
        raise ConfigError(
            f"the model tells {labels} labels apart, and a reward is one score",
            where=str(folder / "config.json"),
            fix="name a model with one label, or call this one in a reward function",
        )


def scores(model: Model, pad_id: int) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """(weights, tokens [R, T], lengths [R]) -> scores [R] fp32, at the last token that isn't the padding token.

    transformers scores that one, also where a text itself ends with the padding token.
    """

    def scored(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        time = jnp.arange(tokens.shape[1])
        segments = (time < lengths[:, None]).astype(jnp.int32)
        hidden = model.hidden(params, tokens, Tokens(jnp.broadcast_to(time, tokens.shape), segments))
        end = jnp.where(tokens == pad_id, 0, time).max(axis=1)
        last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0].astype(jnp.float32)
        return einsum("RD,LD->RL", last, model.head(params))[:, 0]

    return scored
