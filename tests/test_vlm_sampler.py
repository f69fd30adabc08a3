"""The sampler on prompts with pictures: transformers' own greedy text, one group or several, one device or eight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.config import DatasetConfig
from ntjax.data.pooled import pooled, room
from ntjax.data.prompts import Prompt, PromptEncoder
from ntjax.draw import Sampling
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.hf.processor import load_processor
from ntjax.hf.vision import Processor
from ntjax.layout import RULES, Layout
from ntjax.mesh import make_mesh
from ntjax.models import Model, build
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Tokens
from ntjax.params import Params
from ntjax.sampler import Completion, Sampler
from tests import vlm, vlm_reference
from tests.cases import some

# Images before, within and after words, one, several and none; lengths differ.
ASKED: tuple[vlm_reference.Said, ...] = (
    [0, "What is this?"],
    ["How are you today?"],
    [1, 2, "Add the numbers: 12, 7 and 30."],
    ["The sky is ", 4, " blue, or is it ", 5, "?"],
    [3, "user"],
    [0, 0, 6, "thrice"],
)
LENGTH = 12


class Made(NamedTuple):
    folder: Path
    photos: list[Path]
    vision: Processor
    model: Model
    params: Params
    prompts: list[Prompt]
    whole: list[Completion]  # the greedy completions of all prompts


FAMILIES = [
    ("llava", "clip"),
    pytest.param(("llava_next", "siglip"), marks=pytest.mark.more),
    ("qwen2_5_vl", "clip"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family[0])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("sees")
    folder, photos = vlm.tiny_vlm(place / "model", *request.param), vlm_reference.photos(place)
    hf = read_config(folder)
    vision, model = load_processor(folder, hf), build(hf)
    params = load_params(folder, model.specs, dtype="float32")
    encode = PromptEncoder(vision.tokenizer, DatasetConfig(dataset_path="x"), 512, vision=vision)
    prompts = [encode({"prompt": turns(said, photos, "image")}, "row")[0] for said in ASKED]
    made = Made(folder, photos, vision, model, params, prompts, [])
    return made._replace(whole=complete(made, greedy(made)))


def turns(said: vlm_reference.Said, photos: Sequence[Path], key: str) -> list[dict[str, Any]]:
    """A question in parts, its images under `key`."""
    parts = [
        {"type": "image", key: str(photos[part])} if isinstance(part, int) else {"type": "text", "text": part}
        for part in said
    ]
    return [{"role": "user", "content": parts}]


def complete(made: Made, sampling: Sampling, *, slots: int = 64, **options: Any) -> list[Completion]:
    model, params = made.model, options.pop("params", made.params)
    if (layout := options.pop("layout", None)) is not None:
        model = replace(model, layout=layout)
        params = layout.put(params, model.specs)
    sampler = Sampler(model, sampling, slots=slots, tokenizer=made.vision.tokenizer, vision=made.vision)
    return sampler(params, options.pop("prompts", made.prompts), **options)


def greedy(made: Made, **options: Any) -> Sampling:
    never = (made.vision.image_id,)
    return Sampling(**{"max_new_tokens": LENGTH, "temperature": 0.0, "never": never, **options})


def same(ours: Sequence[Completion], theirs: Sequence[Completion]) -> None:
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def generated(made: Made, theirs: Any, said: vlm_reference.Said) -> list[int]:
    """transformers' greedy text; the placeholder is suppressed, as TRL does."""
    inputs = vlm_reference.processor(made.folder).apply_chat_template(
        turns(said, made.photos, "path"),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = theirs.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=LENGTH,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[made.vision.image_id],
        )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_is_transformers_greedy(made: Made) -> None:
    theirs = vlm_reference.model(made.folder)
    for said, completion in zip(ASKED, made.whole, strict=True):
        assert completion.tokens == generated(made, theirs, said), said
    assert len({tuple(completion.tokens) for completion in made.whole}) == len(ASKED)


def test_slots_groups_and_refills_change_nothing(made: Made) -> None:
    """One prompt after another, in slots that others had before."""
    same(complete(made, greedy(made), slots=4, group=2), [one for one in made.whole for _ in "ab"])
    (alone,) = complete(made, greedy(made), prompts=made.prompts[2:3])
    same([alone], made.whole[2:3])


@pytest.mark.more
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_see_what_one_does(made: Made, sizes: dict[str, int]) -> None:
    layout = Layout(make_mesh(sizes), zero=3, rules=tuple({**RULES, "vocab": "none"}.items()))
    same(complete(made, greedy(made), layout=layout), made.whole)
    twice = [one for one in made.whole for _ in "ab"]
    same(complete(made, greedy(made), layout=layout, slots=16, group=2), twice)


def test_logprobs_are_those_of_a_full_forward_pass(made: Made) -> None:
    sampling = Sampling(max_new_tokens=LENGTH, temperature=0.7, never=(made.vision.image_id,))
    completions = complete(made, sampling, group=2, seed=3)
    prompts = [prompt for prompt in made.prompts for _ in range(2)]
    lines = []
    for prompt, completion in zip(prompts, completions, strict=True):
        (document,) = prompt.documents
        lines.append([replace(document, tokens=np.array([*prompt.tokens, *completion.tokens], np.int32))])
    length = max(len(line[0].tokens) for line in lines)
    space = room([lines], 1, made.vision)
    assert space is not None
    pictures = Pictures.of(pooled(lines, length, 1, space, made.vision))
    ids, segments = np.zeros((2, len(lines), length), np.int32)
    for row, (document,) in enumerate(lines):
        ids[row, : len(document.tokens)], segments[row, : len(document.tokens)] = document.tokens, 1
    at = Tokens(jnp.broadcast_to(jnp.arange(length), ids.shape), jnp.asarray(segments))
    hidden = made.model.hidden(made.params, jnp.asarray(ids), at, pictures)
    logp = jax.nn.log_softmax(hidden @ made.model.head(made.params).T / sampling.temperature)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        where = np.arange(len(completion.tokens)) + len(prompt.tokens) - 1
        expected = logp[row, where, np.array(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", some([0.0, 2.0], [2.0]))
def test_the_placeholder_is_never_drawn(made: Made, temperature: float) -> None:
    """Where it is by far the likeliest after the first prompt, and its log-prob counts as that of any token."""
    image, drawn = made.vision.image_id, made.whole[0].tokens[0]
    head = np.array(made.params["head"])
    head[image] = 2 * head[drawn]
    params = {**made.params, "head": jnp.asarray(head)}
    sampling = greedy(made, temperature=temperature)
    for completion in complete(made, sampling, params=params):
        assert image not in completion.tokens
    if temperature == 0:
        (loose,) = complete(made, greedy(made, never=()), prompts=made.prompts[:1], params=params)
        (kept,) = complete(made, sampling, prompts=made.prompts[:1], params=params)
        assert (loose.tokens[0], kept.tokens[0]) == (image, drawn)
        assert kept.logprobs[0] < made.whole[0].logprobs[0]
