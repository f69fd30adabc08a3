"""Qwen2.5-VL's features, logits and gradients are transformers', and don't depend on what lies beside a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ntjax.errors import ConfigError
from ntjax.layout import Layout
from ntjax.mesh import make_mesh
from ntjax.models import Cache, Model, build
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Kept, Tokens
from ntjax.ops.logprobs import token_logprobs
from ntjax.params import Params
from tests.cases import some
from tests.torch_reference import randomised, stacked

TOLERANCE = 1e-4
IMAGE, WORDS, CHANNELS = 55, 50, 3 * 2 * 2 * 2
TEXT: dict[str, Any] = {
    "model_type": "qwen2_5_vl_text",
    "vocab_size": 62,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]},
}
VISION: dict[str, Any] = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 2,
    "window_size": 8,  # two features in each direction
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1, 3],
}
HF: dict[str, Any] = {"model_type": "qwen2_5_vl", "text_config": TEXT, "vision_config": VISION}
HF |= {"image_token_id": IMAGE, "video_token_id": 56, "vision_start_token_id": 57, "vision_end_token_id": 58}


@dataclass(frozen=True, eq=False)
class Image:
    """An image of `height` x `width` patches, as transformers' processor gives them."""

    height: int
    width: int
    seed: int = 0

    @property
    def patches(self) -> np.ndarray:
        """[P, C]."""
        shape = self.height * self.width, CHANNELS
        return np.random.default_rng(self.seed + 10).normal(size=shape).astype(np.float32)

    @property
    def count(self) -> int:
        """Of features."""
        return self.height * self.width // 4

    @property
    def grid(self) -> torch.Tensor:
        """As `image_grid_thw`."""
        return torch.tensor([[1, self.height, self.width]])

    def unit(self) -> dict[str, np.ndarray]:
        """What our tower reads."""
        index, ends = get_vision_window_index(self.grid, 2, VISION["window_size"], VISION["patch_size"])
        window = np.zeros(self.count, np.int32)
        window[index.numpy()] = np.searchsorted(ends.numpy(), np.arange(self.count) * 4, side="right")
        at = get_vision_position_ids(self.grid, 2).numpy().astype(np.int32)
        return {"patches": self.patches, "at": at, "window": np.repeat(window, 4)}


Document = list[int | Image]  # so many words, or an image
Row = list[Document]
A, B, C = Image(6, 10), Image(4, 4, 1), Image(10, 6, 2)
LARGE = Image(18, 18, 3)  # more patches than attention takes at a time
ROWS: list[Row] = [[[3, A, 1, B, 2, C, 4]], [[1, C, 6]], [[9]]]


@cache
def pair(tied: bool = False) -> tuple[Qwen2_5_VLForConditionalGeneration, Model, Params]:
    """A transformers model with every weight random, biases too, and ours with the same."""
    hf = HF | {"tie_word_embeddings": tied}
    theirs = Qwen2_5_VLForConditionalGeneration._from_config(
        AutoConfig.for_model(**hf), attn_implementation="eager"
    ).eval()
    randomised(theirs, 0.15)
    ours = build(hf)
    return theirs, ours, stacked(theirs.state_dict(), ours.specs)


def images(document: Document) -> list[Image]:
    return [piece for piece in document if isinstance(piece, Image)]


def ids_of(document: Document) -> np.ndarray:
    """[t]: words that depend on the document alone."""
    draw = np.random.default_rng(len(document)).integers
    pieces = (
        np.full(piece.count, IMAGE) if isinstance(piece, Image) else draw(3, WORDS, piece)
        for piece in document
    )
    return np.concatenate(list(pieces)).astype(np.int32)


def reference(document: Document) -> dict[str, Any]:
    """What transformers' model is called with."""
    ids = torch.tensor(ids_of(document)).long()[None]
    shown = images(document)
    given = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    if shown:
        given["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in shown]))
        given["image_grid_thw"] = torch.cat([image.grid for image in shown])
    return given


def places_of(document: Document) -> np.ndarray:
    """[t, 3]."""
    given = reference(document)
    given.pop("pixel_values", None)
    return pair()[0].model.get_rope_index(**given)[0][:, 0].T.numpy()


def pool(groups: list[list[Image]], more: int = 0) -> dict[str, jax.Array]:
    """Units of groups, with room for so many units and features `more` than there are."""
    count = max(map(len, groups)) + more
    size = max((image.count for image in chain(*groups)), default=1) * 4 + more * 4
    units = {
        "patches": np.zeros((len(groups), count, size, CHANNELS), np.float32),
        "at": np.zeros((len(groups), count, size, 2), np.int32),
        "window": np.zeros((len(groups), count, size), np.int32),
    }
    for group, shown in enumerate(groups):
        for number, image in enumerate(shown):
            for name, x in image.unit().items():
                units[name][group, number, : len(x)] = x
    return {name: jnp.asarray(x) for name, x in units.items()}


def batch(rows: list[Row], groups: int = 1, time: int = 64, more: int = 0) -> tuple[Any, Tokens, Pictures]:
    """Rows of documents one after another, as the loader makes them."""
    each = len(rows) // groups
    shown = [
        [image for document in chain(*rows[group * each : (group + 1) * each]) for image in images(document)]
        for group in range(groups)
    ]
    units = pool(shown, more)
    features = units["window"].shape[-1] // 4
    ids, positions, segments = (np.zeros((len(rows), time), np.int32) for _ in range(3))
    index, places = np.full_like(ids, -1), np.zeros((len(rows), time, 3), np.int32)
    unit = 0
    for number, row in enumerate(rows):
        unit, start = unit if number % each else 0, 0
        for segment, document in enumerate(row, start=1):
            at = slice(start, start + len(ids_of(document)))
            ids[number, at] = ids_of(document)
            positions[number, at] = np.arange(at.stop - start)
            segments[number, at] = segment
            places[number, at] = places_of(document)
            numbers = [
                np.arange(image.count) + (unit + n) * features for n, image in enumerate(images(document))
            ]
            index[number, at][ids[number, at] == IMAGE] = np.concatenate([*numbers, np.zeros(0, np.int64)])
            unit, start = unit + len(numbers), at.stop
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(segments))
    return jnp.asarray(ids), tokens, Pictures(jnp.asarray(index), units, jnp.asarray(places))


def logits(model: Model, params: Params, *given: Any) -> jax.Array:
    hidden = jax.jit(model.hidden)(params, *given)
    return hidden @ model.head(params).T


@pytest.mark.parametrize("shown", [[A], [B], [C], [A, B, C], [LARGE]], ids=["A", "B", "C", "A B C", "large"])
def test_features_are_transformers(shown: list[Image]) -> None:
    theirs, model, params = pair()
    units = pool([shown], more=2)

    @jax.jit
    def features(params: Params, units: dict[str, jax.Array]) -> jax.Array:
        module: Any = model.bind(params)
        return module.projector(module.vision_tower(*(units[n][0] for n in ("patches", "at", "window"))))

    ours = features(params, units)
    with torch.no_grad():
        pixels = torch.tensor(np.concatenate([image.patches for image in shown]))
        grids = torch.cat([image.grid for image in shown])
        wanted = theirs.model.get_image_features(pixels, grids).pooler_output
    assert np.isfinite(ours).all()
    for image, one, other in zip(shown, ours, wanted, strict=False):
        assert np.abs(other.numpy()).max() > 0.5
        np.testing.assert_allclose(one[: image.count], other.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_transformers(tied: bool, groups: int) -> None:
    theirs, model, params = pair(tied)
    ours = np.asarray(logits(model, params, *batch(ROWS, groups)))
    for row, (document,) in zip(ours, ROWS, strict=True):
        with torch.no_grad():
            wanted = theirs(**reference(document)).logits[0].numpy()
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=0, atol=TOLERANCE)


def test_rows_without_pictures_need_no_places() -> None:
    _, model, params = pair()
    ids, at, pictures = batch(ROWS[2:], groups=1)
    hidden = jax.jit(model.hidden)
    with_places = hidden(params, ids, at, Pictures(pictures.index, pool([[A]]), pictures.places))
    np.testing.assert_allclose(hidden(params, ids, at), with_places, rtol=0, atol=1e-6)


def test_room_in_the_pool_changes_nothing() -> None:
    _, model, params = pair()
    tight, roomy = (logits(model, params, *batch(ROWS, more=more)) for more in (0, 3))
    np.testing.assert_allclose(roomy, tight, rtol=0, atol=1e-5)


def test_packed_documents_are_as_alone() -> None:
    _, model, params = pair()
    documents: list[Document] = [[2, A, 3], [5], [1, B, 2, C, 1]]
    packed = logits(model, params, *batch([documents]))[0]
    apart = logits(model, params, *batch([[document] for document in documents]))
    start = 0
    for document, alone in zip(documents, apart, strict=True):
        end = start + len(ids_of(document))
        np.testing.assert_allclose(packed[start:end], alone[: end - start], rtol=0, atol=1e-5)
        start = end


def mean_nll(model: Model, rows: list[Row], **options: Any) -> Callable[[Params], jax.Array]:
    """The mean over the tokens of all rows but their first, of weights."""
    ids, at, pictures = batch(rows, **options)
    learned = at.segments[:, 1:] > 0

    def loss(params: Params) -> jax.Array:
        hidden = model.hidden(params, ids, at, pictures)
        logp = token_logprobs(hidden[:, :-1], model.head(params), ids[:, 1:]).logp
        return -jnp.sum(logp * learned) / jnp.sum(learned)

    return loss


@cache
def torch_gradients() -> dict[str, torch.Tensor]:
    """Those of `mean_nll` of `ROWS`, by name."""
    theirs = pair()[0]
    theirs.zero_grad()
    sums, count = [], 0
    for (document,) in ROWS:
        given = reference(document)
        targets = given["input_ids"][0, 1:]
        scores = theirs(**given).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
        count += len(targets)
    (sum(sums) / count).backward()
    return {name: parameter.grad for name, parameter in theirs.named_parameters()}


@pytest.mark.parametrize("remat", ["none", "full", "minimal"])
def test_gradients_are_transformers_and_reach_every_weight(remat: str) -> None:
    _, model, params = pair()
    wanted = stacked(torch_gradients(), model.specs)
    gradients = jax.jit(jax.grad(mean_nll(build(HF, remat=remat), ROWS, more=1)))(params)
    for path, gradient in gradients.items():
        largest = float(jnp.abs(wanted[path]).max())
        assert largest > 0, path
        np.testing.assert_allclose(gradient, wanted[path], rtol=0, atol=TOLERANCE * largest, err_msg=path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_tensor_is_declared_once(tied: bool) -> None:
    theirs, model, _ = pair(tied)
    declared = [name for spec in model.specs.values() for _, name in spec.tensors()]
    assert len(declared) == len(set(declared))
    tensors = theirs.state_dict()
    assert set(declared) == set(tensors) - ({"lm_head.weight"} if tied else set())
    for spec in model.specs.values():
        assert {tuple(tensors[name].shape) for _, name in spec.tensors()} == {spec.torch_shape}, spec.hf


MESHES: dict[str, tuple[dict[str, int], int]] = {
    "zero 3 over 4, sequence 2": ({"fsdp": 4, "sequence": 2}, 3),
    "data 2, zero 2 over 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
}


@pytest.mark.parametrize("name", some(MESHES, []))
def test_several_devices_compute_what_one_does(name: str) -> None:
    _, model, params = pair()
    rows: list[Row] = [*ROWS, [[7]], [[2, B, 1], [1, A, 1]], [[30]], [[4]], [[1, C, 9]]]
    mesh, zero = MESHES[name]
    layout = Layout(make_mesh(mesh), zero)
    spread = build(HF, layout=layout)
    held = jax.device_put(params, layout.shardings(params, spread.specs))
    wanted = jax.jit(model.hidden)(params, *batch(rows))
    found = jax.jit(spread.hidden)(held, *batch(rows, groups=layout.rows))
    real = batch(rows)[1].segments > 0
    np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=1e-5)
    gradients = jax.jit(jax.grad(mean_nll(spread, rows, groups=layout.rows)))(held)
    for path, one in jax.jit(jax.grad(mean_nll(model, rows)))(params).items():
        largest = float(jnp.abs(one).max())
        np.testing.assert_allclose(gradients[path], one, rtol=0, atol=1e-4 * largest, err_msg=path)


def test_decoding_goes_on_after_pictures() -> None:
    _, model, params = pair()
    ids, at, pictures = batch([[[3, A, 1, B, 12]]], time=35)
    length, columns = 25, 10
    wanted = jax.jit(model.hidden)(params, ids, at, pictures)
    assert pictures.places is not None
    prompt = Pictures(pictures.index[:, :length], pictures.units, pictures.places[:, :length])
    before = jax.tree.map(lambda x: x[:, :length], at)
    _, kept = jax.jit(model.prefill)(params, ids[:, :length], before, prompt)
    empty = model.cache(1, length, 1, columns)
    layers = tuple(Kept(new, old.own) for new, old in zip(kept, empty.layers, strict=True))
    shift = jnp.max(prompt.places, axis=(1, 2)) + 1 - length
    assert shift[0] < 0
    cache = Cache(layers, before, empty.own, jnp.int32(0), shift)
    step: Any = jax.jit(model.decode)
    for column in range(length, length + columns):
        place = jax.tree.map(lambda x, column=column: x[:, column : column + 1], at)
        hidden, cache = step(params, model.layers(params), ids[:, column : column + 1], place, cache)
        np.testing.assert_allclose(hidden[:, 0], wanted[:, column], rtol=0, atol=1e-5)


def test_old_config_files_mean_the_same() -> None:
    text = {key: value for key, value in TEXT.items() if key not in ("rope_parameters", "model_type")}
    vision = {key: value for key, value in VISION.items() if key != "model_type"}
    scaling = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat = {"model_type": "qwen2_5_vl", **text, "rope_theta": 500.0, "rope_scaling": scaling}
    flat |= {"vision_config": vision, "tie_word_embeddings": True}
    assert build(flat).config == build(HF | {"tie_word_embeddings": True}).config
    nested = HF | {"text_config": TEXT | {"tie_word_embeddings": True}}
    assert build(nested).config == build(flat).config
    assert build(flat).config.rope.sections == (2, 3, 3)


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        ({}, {"out_hidden_size": 32}, "out_hidden_size = 32, but words have 64"),
        ({}, {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [2, 2, 2]}}, {}, "8 frequencies"),
    ],
)
def test_what_cannot_be_run_is_refused(text: dict[str, Any], vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(HF | {"text_config": TEXT | text, "vision_config": VISION | vision})
