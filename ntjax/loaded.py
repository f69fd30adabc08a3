"""A model that is loaded: its weights, words and pictures, what it says of rows and what it answers.

Axes: R rows, T time, S pairs of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.config import Config, DatasetConfig
from ntjax.data.files import Table
from ntjax.data.loader import Plan
from ntjax.data.prompts import Prompt, PromptEncoder
from ntjax.errors import BadData, ConfigError
from ntjax.feed import Planned
from ntjax.hf.files import read_config
from ntjax.hf.folder import check, load_params, open_weights, save_params
from ntjax.hf.peft import load_adapter
from ntjax.hf.processor import load_words, save_words
from ntjax.hf.tokenizer import check_vocab, pad_id, save_generation_config, stop_ids
from ntjax.layout import Layout, placing
from ntjax.mesh import place_batch
from ntjax.models import Model, build, is_scoring, sees
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Tokens
from ntjax.params import Params, Specs
from ntjax.runner import configured
from ntjax.sampler import Completion, Sampler, Sampling
from ntjax.step import Batch

SLOTS = 8  # completions that are decoded together on a device
Said = str | Sequence[Mapping[str, Any]]  # text or messages


class LoadedModel:
    """A model with its weights, its tokenizer and, where it sees, its processor (`vision`).

    `params` are a flat dict, path -> array or a quantised or adapted weight. They are read when they are first asked
    for, all else is checked before; put others of the same shapes there to use them.
    """

    def __init__(self, folder: Path, *, layout: Layout, dtype: str = "float32", adapter: Path | None = None):
        hf = read_config(folder)
        self.folder, self.dtype, self.layout = folder, dtype, layout
        self.tokenizer: Any
        self.tokenizer, self.vision = load_words(folder, hf)
        self.model = build(hf, dtype=dtype, labels=int(is_scoring(hf)), attention="auto", layout=layout)
        layout.check(self.specs, lambda axis: "mesh")
        check_vocab(self.tokenizer, self.model.config.vocab)
        check(open_weights(folder), self.specs)
        self._adapter = None if adapter is None else load_adapter(adapter, self.specs)

    def __repr__(self) -> str:
        count = sum(len(list(spec.tensors())) for spec in self.specs.values())
        return f"<{self.model.hf['model_type']} of {count} tensors from {self.folder}, {self.dtype}, {self.layout}>"

    @cached_property
    def params(self) -> Params:
        """The weights."""
        lie = placing(self.layout, self.specs)
        params = load_params(self.folder, self.specs, dtype=self.dtype, **lie)
        if self._adapter is None:
            return params
        plan, adapter = self._adapter
        return plan.join(params, self.layout.put(adapter, plan.specs(self.specs)))

    @property
    def specs(self) -> Specs:
        """Path of a weight -> its declaration: axes, shape, Hugging Face name."""
        return self.model.specs

    def axes(self, path: str) -> dict[str, int]:
        """The axes of a weight, in stored order: {"layers": 30, "heads": 9, "head_dim": 64, "embed": 576}."""
        return dict(self.specs[path].sizes)

    def batch(self, rows: Sequence[Mapping[str, Any]], stage: str = "sft", **settings: Any) -> Batch:
        """Rows of data as the loss of a stage sees them, on the devices.

        `tokens`, `segments`, `positions` [R, T] int32 and `mask` [R, T] bool, which tokens are learned; pairs of
        preferences have [R, 2, T] each, and `pairs` [R, S]. Where the stage holds the policy against a reference, this
        model as it is now is the reference. `settings` are the stage's: max_length=512.

        Raises BadData where a row can't be read, or has nothing to learn in it.
        """
        config = self.settled(stage, settings)
        options = config.stages[0]
        if options.rolls_out:
            raise ConfigError(f"a {stage} stage draws what it learns from", fix="use ntjax.run")
        data = DatasetConfig(dataset_path="rows")
        vocab, given = self.model.config.vocab, Table("rows", [dict(row) for row in rows])
        examples = options.encode(given, self.tokenizer, data, None, vocab, self.vision)
        told: Any = getattr(examples, "documents", examples)
        if dropped := told.nothing_to_learn:
            raise BadData(
                f"{dropped} of {len(rows)} rows have nothing to learn",
                fix="raise max_length, or leave them out",
            )
        packs: dict[str, Any] = {"packing": options.packs, "in_order": options.packs_in_order}
        plan = Plan(examples.lengths, options.row_length, 1, shuffle=False, **packs)
        groups = self.layout.rows
        plan = replace(plan, rows_per_microbatch=-(-len(plan.packs) // groups) * groups)
        feed = Planned(plan, examples, pad_id(self.tokenizer), vision=self.vision, groups=groups)
        with feed.open() as steps:
            batch = self.placed({name: array[0] for name, array in next(steps).batch.items()})
        score = options.reference_scores(self.as_in(config))
        return batch if score is None else batch | jax.jit(score)(self.params, batch)

    def placed(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Arrays [R, ...] of the host on the devices, the rows split over those that split them."""
        given = {name: array[None] for name, array in batch.items()}
        return {name: array[0] for name, array in place_batch(given, self.layout.mesh).items()}

    def logprobs(self, batch: Batch, *, learned: bool = False) -> jax.Array:
        """The log-probability of each token of a batch given those before it in its document, in nats: float32, shaped
        as `batch["tokens"]`; 0 for a document's first token, for padding and, if only those that are `learned` are
        wanted, for others."""
        return self.scores(batch, learned=learned)[0]

    def scores(self, batch: Batch, *, learned: bool = False) -> tuple[jax.Array, jax.Array]:
        """`logprobs`, and whether each of these tokens was the likeliest (bool)."""
        return _scores(self.model, self.params, batch, learned)

    def prompt(
        self, said: Said, images: Any = (), *, raw: bool = False, where: str = "prompt", **template: Any
    ) -> Prompt:
        """A prompt as the sampler takes it: messages, or text, which is a user's turn if the model has a chat template,
        unless it is to be completed as it is (`raw`).

        `images` (paths, PIL images) are those that it shows. `template` goes to the chat template.
        """
        if isinstance(said, str) and not raw and self.tokenizer.chat_template is not None:
            said = [{"role": "user", "content": said}]
        images = list(images) if isinstance(images, list | tuple) else [images]
        row = {"prompt": said, **({"images": images} if images else {})}
        encode = PromptEncoder(self.tokenizer, DatasetConfig(), sys.maxsize, None, template, self.vision)
        return encode(row, where)[0]

    def sampling(self, **drawn: Any) -> Sampling:
        """How completions are drawn: `Sampling`'s fields, those that aren't given by default: 128 tokens, the likeliest
        ones (temperature 0), until the model's own end."""
        default = Sampling(
            temperature=0.0,
            stop_ids=tuple(stop_ids(self.folder, self.tokenizer)),
            never=(self.vision.image_id,) if self.vision else (),
        )
        return replace(default, **drawn)

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        num_completions: int = 1,
        seed: int = 42,
        first_row: int = 0,
        slots: int = SLOTS,
        progress: Callable[[int], None] | None = None,
        **drawn: Any,
    ) -> list[Completion]:
        """Tokens and their log-probs, `num_completions` of each prompt, prompt by prompt; `drawn` is `sampling`'s.

        What is drawn depends on the seed and the number of a completion, counted from `first_row`. `slots` are decoded
        together on a device; `progress` is told how many are complete.
        """
        together = slots * self.layout.rows * self.layout.sequence
        words = {"tokenizer": self.tokenizer, "vision": self.vision}
        sampler = Sampler(self.model, self.sampling(**drawn), slots=together, **words)
        params = self.model.gathered(self.params)
        numbered = {"group": num_completions, "seed": seed, "first_row": first_row}
        return sampler(params, prompts, **numbered, progress=progress)

    def generate(
        self,
        prompts: Said | Sequence[Said],
        *,
        images: Sequence[Any] = (),
        raw: bool = False,
        num_completions: int = 1,
        seed: int = 42,
        **drawn: Any,
    ) -> list[str]:
        """What the model answers: the texts of `complete`, for one prompt or several (see `prompt`).

        `images` has for each prompt the image or the list of images that it shows. `drawn` is `sampling`'s:
        max_new_tokens=20, temperature=0.7.
        """
        asked: Any = [prompts] if isinstance(prompts, str) or isinstance(prompts[0], Mapping) else prompts
        shown = images or [()] * len(asked)
        each = [self.prompt(*pair, raw=raw) for pair in zip(asked, shown, strict=True)]
        drawn |= {"num_completions": num_completions, "seed": seed}
        return [self.text(completion) for completion in self.complete(each, **drawn)]

    def text(self, completion: Completion) -> str:
        """A completion's words, without special tokens."""
        return str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True))

    def save(self, folder: str | Path, *, dtype: str | None = None) -> Path:
        """Writes a Hugging Face folder with the weights as they are, in `dtype` (by default the model's): adapters are
        merged, quantised weights dequantised."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        hf = self.model.exported(pad_id(self.tokenizer))
        save_params(out, self.params, self.specs, dtype=dtype or self.dtype, config=hf)
        save_words(self.tokenizer, self.vision, out)
        if not self.model.config.labels:
            save_generation_config(out, self.folder, self.tokenizer)
        return out

    def settled(
        self, stage: str, settings: Mapping[str, Any], lora: Mapping[str, Any] | None = None
    ) -> Config:
        """A config of one stage, its settings checked."""
        model: dict[str, Any] = {"model_name_or_path": str(self.folder), "dtype": self.dtype}
        model |= {"model_type": "vlm"} if sees(self.model.hf) else {}
        model |= {"use_lora": True, "lora_config": dict(lora)} if lora is not None else {}
        stages = [{"stage_type": stage, **settings}]
        return configured({"model": model, "datasets": {"rows": {"dataset_path": "rows"}}, "stages": stages})

    def as_in(self, config: Config) -> Model:
        """The model as the config's stage computes with it: its dtype, what it keeps for the backward pass."""
        stage = config.stages[0]
        if stage.scores != bool(self.model.config.labels):
            raise ConfigError(
                f"{self.folder} {'has no head of scores' if stage.scores else 'is a reward model'}",
                fix=f"load a {'reward' if stage.scores else 'language'} model for a {stage.stage_type} stage",
            )
        return build(
            self.model.hf,
            dtype=config.compute_dtype(stage),
            remat=stage.remat or "none",
            labels=int(stage.scores),
            attention="auto",
            layout=self.layout,
        )


@partial(jax.jit, static_argnums=(0, 3))
def _scores(model: Model, params: Params, batch: Batch, learned: bool) -> tuple[jax.Array, jax.Array]:
    shape = batch["tokens"].shape
    names = "tokens", "segments", "positions", "mask"
    tokens, segments, positions, mask = (batch[name].reshape(-1, shape[-1]) for name in names)
    hidden = model.hidden(params, tokens, Tokens(positions, segments), Pictures.of(batch))
    wanted = (segments > 0) & (positions > 0) & (mask | (not learned))
    # Position t predicts token t + 1; no row's first token is wanted, so nothing comes round its end.
    targets, following = (jnp.roll(each, -1, axis=1) for each in (tokens, wanted))
    found = model.logprobs(params, hidden, targets, following)
    logp, correct = (jnp.roll(each, 1, axis=1).reshape(shape) for each in (found.logp, found.correct))
    return logp, correct
