"""The processor in a model folder: its tokenizer, and what it makes of pictures.

transformers' image processors that compute with Pillow and NumPy are read without the rest of a processor, which for
Qwen2.5-VL wants torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax.data.pictures import Picture
from ntjax.errors import BadData, ConfigError, InputMissing
from ntjax.hf.files import read_json
from ntjax.hf.tokenizer import load_tokenizer, save_tokenizer
from ntjax.hf.vision import Llava, LlavaNext, Processor, QwenVL, Settings
from ntjax.models import sees

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGES, WHOLE = "preprocessor_config.json", "processor_config.json"
FILES = (IMAGES, WHOLE, "video_preprocessor_config.json")
TEMPLATE = "chat_template.json"  # as transformers 4 wrote it
NESTED = "image_processor"  # where transformers 5 writes IMAGES, in WHOLE
TOKENS = {"qwen2_5_vl": "<|image_pad|>"}  # of the others, "<image>"
Common = dict[str, Any]  # the fields that all families have
OWN = "use the tokenizer and processor files that came with the weights"


def load_words(
    folder: Path, hf: Mapping[str, Any], **bounds: Any
) -> tuple[PreTrainedTokenizerBase, Processor | None]:
    """The tokenizer in a model's folder, and its processor if the model sees images; `bounds` and errors are
    `load_processor`'s."""
    if not sees(hf):
        return load_tokenizer(folder), None
    vision = load_processor(folder, hf, **bounds)
    return vision.tokenizer, vision


def save_words(tokenizer: PreTrainedTokenizerBase, vision: Processor | None, folder: Path) -> None:
    """Writes what `load_words` reads."""
    if vision is None:
        save_tokenizer(tokenizer, folder)
    else:
        vision.save(folder)


def load_processor(
    folder: Path,
    hf: Mapping[str, Any],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    where: str | None = None,
) -> Processor:
    """The processor of the model whose config.json is `hf`; never its own code, never from the network.

    `min_pixels` and `max_pixels`, set at `where`, bound the area that Qwen2.5-VL scales pictures to. The tokenizer has
    the processor's chat template, if that has one.

    Raises:
        InputMissing: there is none. BadData: it can't be read, or isn't this model's. ConfigError: pictures can't be
        bounded so, or the model drops features that its processor counts. Others are `load_tokenizer`'s.
    """
    from transformers import AutoConfig

    settings = {name: read_json(folder / name) for name in FILES if (folder / name).exists()}
    if IMAGES not in settings and NESTED not in settings.get(WHOLE, {}):
        raise InputMissing(
            f"no {IMAGES}, so nothing says how images are scaled",
            where=str(folder),
            fix=f"copy {IMAGES}, {WHOLE} and the chat template beside the weights",
        )
    config = AutoConfig.for_model(**hf)
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model_type {config.model_type!r} sees no images", where=str(folder))
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    bounds = {name: value for name, value in given.items() if value is not None}
    if bounds and config.model_type != "qwen2_5_vl":
        raise ConfigError(
            f"image_min_pixels, image_max_pixels: {config.model_type} scales every image to one size",
            where=where,
            fix="leave them out",
        )
    tokenizer = _tokenizer(folder, settings)
    images = _image_processor(folder, bounds)
    common = {
        "tokenizer": tokenizer,
        "settings": settings,
        "images": images,
        "image_id": config.image_token_id,
        "image_token": _image_token(tokenizer, settings, config, folder),
    }
    made = FAMILIES[config.model_type](config, folder, common)
    if bounds:
        _bound(made, settings, where)
    _try(made, folder)
    return made


def _tokenizer(folder: Path, settings: Settings) -> PreTrainedTokenizerBase:
    """The folder's, with the template that transformers' processor would render: one of its own comes first."""
    tokenizer = load_tokenizer(folder)
    old = read_json(folder / TEMPLATE) if (folder / TEMPLATE).exists() else {}
    own = settings.get(WHOLE, {}).pop("chat_template", None) or old.get("chat_template")
    if own is not None:
        tokenizer.chat_template = own
    return tokenizer


def _image_processor(folder: Path, bounds: Mapping[str, int]) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True, **bounds
        )
    except Exception as error:  # whatever a constructor makes of what is in the file
        raise BadData(f"the image processor can't be read: {error}", where=str(folder), fix=OWN) from error


def _image_token(tokenizer: Any, settings: Settings, config: Any, folder: Path) -> str:
    """The placeholder, which the model knows by the same id."""
    said = getattr(tokenizer, "image_token", None) or settings.get(WHOLE, {}).get("image_token")
    token = str(said or TOKENS.get(config.model_type, "<image>"))
    number = tokenizer.get_vocab().get(token)
    if number != config.image_token_id:
        raise BadData(
            f"{token} is {'no token' if number is None else f'token {number}'} of the tokenizer, and config.json says "
            f"that {config.image_token_id} stands for images",
            where=str(folder),
            fix=OWN,
        )
    return token


def _llava(config: Any, folder: Path, common: Common) -> Llava:
    tower, settings = config.vision_config, common["settings"]
    side, strategy = tower.image_size // tower.patch_size, config.vision_feature_select_strategy
    clip = tower.model_type == "clip_vision_model"
    if strategy == "default" and not clip:
        raise ConfigError(
            f'vision_feature_select_strategy = "default" drops the class token, and {tower.model_type} has none',
            where=str(folder / "config.json"),
            fix='set it to "full"',
        )
    whole = clip and strategy == "full"
    # Old files lack some of it, and transformers then counts wrong.
    told = {
        "processor_class": "LlavaProcessor" if config.model_type == "llava" else "LlavaNextProcessor",
        "image_token": common["image_token"],
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(clip),
    }
    told |= {name: value for name, value in settings.get(WHOLE, {}).items() if value is not None}
    settings[WHOLE] = told
    tokens = (tower.image_size // told["patch_size"]) ** 2 + told["num_additional_image_tokens"]
    tokens -= told["vision_feature_select_strategy"] == "default"
    if tokens != side**2 + whole:
        raise BadData(
            f"{tokens} tokens for an image, and the model has {side**2 + whole} features of it (config.json)",
            where=str(folder / WHOLE),
            fix=OWN,
        )
    if config.model_type == "llava":
        return Llava(**common, image=tower.image_size, patch=tower.patch_size, whole=whole)
    return _next(config, folder, common, whole)


def _next(config: Any, folder: Path, common: Any, whole: bool) -> LlavaNext:
    if whole:
        raise ConfigError(
            'vision_feature_select_strategy = "full" keeps the class token, which has no place in a line of patches',
            where=str(folder / "config.json"),
            fix='set it to "default"',
        )
    grids, stated = (
        tuple(tuple(grid) for grid in given.image_grid_pinpoints) for given in (config, common["images"])
    )
    if grids != stated:
        raise BadData(
            f"image_grid_pinpoints are {list(stated)}, and in config.json {list(grids)}",
            where=str(folder),
            fix=OWN,
        )
    tower = config.vision_config
    return LlavaNext(**common, image=tower.image_size, patch=tower.patch_size, grids=grids)


def _qwen(config: Any, folder: Path, common: Common) -> QwenVL:
    tower, images = config.vision_config, common["images"]
    sizes = ("patch_size", "patch_size"), ("temporal_patch_size", "temporal_patch_size")
    for name, own in (*sizes, ("merge_size", "spatial_merge_size")):
        if getattr(images, name, None) != getattr(tower, own):
            raise BadData(
                f"{name} is {getattr(images, name, None)}, and {own} in config.json {getattr(tower, own)}",
                where=str(folder),
                fix=OWN,
            )
    merge = tower.spatial_merge_size
    return QwenVL(
        **common,
        patch=tower.patch_size,
        merge=merge,
        channels=tower.in_channels * tower.temporal_patch_size * tower.patch_size**2,
        window=tower.window_size // merge // tower.patch_size,
    )


FAMILIES: dict[str, Callable[[Any, Path, Common], Processor]] = {
    "llava": _llava,
    "llava_next": _llava,
    "qwen2_5_vl": _qwen,
}


def _bound(made: Processor, settings: Settings, where: str | None) -> None:
    """The bounds that were asked for are written too."""
    least, most = made.images.size.shortest_edge, made.images.size.longest_edge
    if least > most:
        raise ConfigError(
            f"image_min_pixels: {least} are more than {most}, the most",
            where=where,
            fix="give both: what isn't given is the processor's own",
        )
    whole = settings.get(WHOLE, {})
    file, name = (whole, NESTED) if NESTED in whole else (settings, IMAGES)
    rest = {key: value for key, value in file[name].items() if key not in ("min_pixels", "max_pixels")}
    file[name] = {**rest, "size": {"shortest_edge": least, "longest_edge": most}}


def _try(made: Processor, folder: Path) -> None:
    """Raises BadData unless a picture becomes what the model takes."""
    from PIL import Image

    picture = Picture.of(Image.new("RGB", (64, 48)), str(folder))
    wanted = {name: array.shape[1:] for name, array in made.blank(made.count(picture.size)).items()}
    try:
        found = {name: array.shape[1:] for name, array in made.units(picture).items()}
    except Exception as error:
        raise BadData(f"the image processor fails: {error}", where=str(folder), fix=OWN) from error
    if found != wanted:
        raise BadData(
            f"images become {found}, and the model takes {wanted} (config.json)", where=str(folder), fix=OWN
        )
