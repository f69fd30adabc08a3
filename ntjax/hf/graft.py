"""A new vision-language model: a language model, a vision tower, and between them a projector of random numbers.

What comes of it is a LLaVA (arXiv:2310.03744), whose projector is to be trained first. The language model gets one
more token, which stands for a picture, in rows that are added to its embedding: the mean of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.errors import BadData, ConfigError
from ntjax.hf.files import Layout, Source, exported_config, read_config, read_json, to_json
from ntjax.hf.folder import Tensors, check, open_weights
from ntjax.hf.names import in_file
from ntjax.hf.shards import write_safetensors
from ntjax.hf.tokenizer import check_vocab, load_tokenizer, save_generation_config, stop_ids
from ntjax.models import Model, build, sees
from ntjax.params import Spec, initial

IMAGE = "<image>"
ROUND = 64  # the vocabulary grows to a multiple of it
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
TOWER, LANGUAGE, HEAD = "model.vision_tower.", "model.language_model.", "lm_head.weight"
Read = Callable[[str], np.ndarray]  # a tensor by its name
# Makes text of the parts of a message, for a template that knows nothing of parts.
FLAT = (
    "{%- set flat = namespace(messages=[]) %}{%- for message in messages %}"
    "{%- if message['content'] is string or not message['content'] %}"
    "{%- set flat.messages = flat.messages + [message] %}"
    "{%- else %}{%- set said = namespace(text='') %}{%- for part in message['content'] %}"
    "{%- set said.text = said.text + (part['text'] if part['type'] == 'text' else '<image>\n') %}{%- endfor %}"
    "{%- set flat.messages = flat.messages + [dict(message, content=said.text)] %}{%- endif %}{%- endfor %}"
    "{%- set messages = flat.messages %}"
)


def graft(language: Path, vision: Path, out: Path, dtype: str, seed: int = 0) -> Model:
    """Writes the folder of a LLaVA made of the language model in `language` and the tower in `vision`: a folder with a
    CLIP or SigLIP or with a LLaVA, or the JSON file of a tower's config, whose weights are then random.

    Raises ConfigError: one of the two isn't what it is taken for. BadData: weights aren't those of a config.json.
    """
    hf, (tower, weights) = read_config(language), _tower(vision)
    if sees(hf):
        raise ConfigError(f"{language} sees already", where="--model", fix="name a language model")
    tokenizer = load_tokenizer(language)
    stops = stop_ids(language, tokenizer)
    check_vocab(tokenizer, hf["vocab_size"])
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = FLAT + tokenizer.chat_template
    rows = max(hf["vocab_size"], -(-len(tokenizer) // ROUND) * ROUND)
    model = build(_config(hf, tower, tokenizer.get_vocab()[IMAGE], rows))
    words, specs = open_weights(language), _declared(model)
    check(words, build(hf).specs)
    read = _reader(specs, words, _tensors(weights, specs) if weights else None, seed)
    layouts = {name: Layout(spec.torch_shape, jnp.dtype(dtype)) for name, spec in specs.items()}
    files = {in_file(name, "llava"): name for name in layouts}
    write_safetensors(
        out,
        {file: layouts[name] for file, name in files.items()},
        lambda file: read(files[file]).astype(layouts[files[file]].dtype),
        extra={"config.json": to_json(exported_config(model.hf, dtype))},
    )
    _processor(tokenizer, vision, tower).save_pretrained(out)
    save_generation_config(out, language, tokenizer, stops)
    return model


def fresh(config: Path, tokenizer: Path, out: Path, dtype: str, seed: int = 0) -> Model:
    """Writes the folder of a language model of random weights, as a config.json describes it, with the tokenizer in
    another folder."""
    words, hf = load_tokenizer(tokenizer), read_json(config)
    if sees(hf):
        raise ConfigError(
            f"{config} is of a model that sees images, which has a processor too",
            where="--model",
            fix="make the language model, and give it a tower with --vision",
        )
    model = build(hf)
    check_vocab(words, model.config.vocab)
    tensors = Tensors(initial(model.specs, jax.random.key(seed)), model.specs, dtype, model.hf["model_type"])
    extra = {"config.json": to_json(exported_config(model.hf, dtype))}
    write_safetensors(out, tensors.layouts, tensors.read, extra=extra)
    words.save_pretrained(out)
    save_generation_config(out, None, words)
    return model


def _tower(vision: Path) -> tuple[dict[str, Any], Source | None]:
    """A tower's config, and the checkpoint with its weights; None: they are to be drawn."""
    from transformers import AutoConfig

    hf = read_json(vision) if vision.is_file() else read_config(vision)
    told = hf.get("vision_config", hf)
    kind = str(told.get("model_type") or hf.get("model_type"))
    kind = TOWERS.get(kind, kind)
    if kind not in TOWERS.values():
        raise ConfigError(
            f"{vision} has no tower that is known: {kind!r}",
            where="--vision",
            fix="name a CLIP, a SigLIP, a LLaVA with one of them, or the JSON file of a tower's config",
        )
    whole = AutoConfig.for_model(**{**told, "model_type": kind})
    sizes = {"image_size": whole.image_size, "patch_size": whole.patch_size}  # left out where they are usual
    return {**told, "model_type": kind, **sizes}, None if vision.is_file() else open_weights(vision)


def _tensors(source: Source, specs: dict[str, Spec]) -> Read:
    """What reads a tower's weights by a LLaVA's names for them. Raises BadData unless they are all there."""
    names = {TOWER + name.rpartition("vision_model.")[2].removeprefix(TOWER): name for name in source.names()}
    wanted = {name: spec.torch_shape for name, spec in specs.items() if name.startswith(TOWER)}
    wrong = [n for n, shape in wanted.items() if n not in names or source.shape(names[n]) != shape]
    if wrong:
        raise BadData(
            f"{len(wrong)} weights of the tower in config.json aren't there, or have other shapes: {wrong[0]}",
            where=str(source.path),
            fix="name a folder whose config.json and weights belong together",
        )
    return lambda name: source.read(names[name])


def _reader(specs: dict[str, Spec], language: Source, tower: Read | None, seed: int) -> Read:
    """What gives each tensor of a LLaVA by its name."""
    keys = iter(jax.random.split(jax.random.key(seed), len(specs)))

    def read(name: str) -> np.ndarray:
        spec = specs[name]
        if name.startswith(TOWER) and tower is not None:
            return tower(name)
        if name.startswith(LANGUAGE) or name == HEAD:
            return _longer(language.read(name.replace(LANGUAGE, "model.")), spec.torch_shape)
        return np.asarray(initial({name: spec}, next(keys))[name].reshape(-1, *spec.torch_shape)[0])

    return read


def _longer(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An embedding with rows for new tokens."""
    if tensor.shape == shape:
        return tensor
    mean = tensor.astype(np.float32).mean(axis=0, keepdims=True)
    return np.concatenate([tensor, np.repeat(mean, shape[0] - len(tensor), axis=0).astype(tensor.dtype)])


def _processor(tokenizer: Any, vision: Path, tower: dict[str, Any]) -> Any:
    """Pictures as the tower was trained on them, or, where nothing says how, scaled and cropped to its size."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    clip, size = tower["model_type"] == TOWERS["clip"], tower["image_size"]
    square = {"height": size, "width": size}
    made: Any
    if any((vision / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        made = (CLIPImageProcessorPil if clip else SiglipImageProcessorPil).from_pretrained(vision)
    elif clip:
        made = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    else:
        made = SiglipImageProcessorPil(size=square)
    return LlavaProcessor(
        image_processor=made,
        tokenizer=tokenizer,
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="default" if clip else "full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=int(clip),
    )


def _config(language: dict[str, Any], tower: dict[str, Any], image: int, vocabulary: int) -> dict[str, Any]:
    clip = tower["model_type"] == TOWERS["clip"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**language, "vocab_size": vocabulary},
        "vision_config": tower,
        "image_token_index": image,
        "image_seq_length": (tower["image_size"] // tower["patch_size"]) ** 2,
        "vision_feature_layer": -2 if clip else -1,
        "vision_feature_select_strategy": "default" if clip else "full",
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
    }


def _declared(model: Model) -> dict[str, Spec]:
    return {name: spec for spec in model.specs.values() for _, name in spec.tensors()}
