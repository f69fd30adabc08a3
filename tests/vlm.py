"""Vision-language models small enough to be made while a test starts, and something for them to look at.

Every weight is random, norms and biases too, so that none that is left out or taken twice goes unnoticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

Family = Literal["llava", "llava_next", "qwen2_5_vl"]
Tower = Literal["clip", "siglip"]

FAMILIES: tuple[tuple[Family, Tower], ...] = (
    ("llava", "clip"),
    ("llava", "siglip"),
    ("llava_next", "clip"),
    ("llava_next", "siglip"),
    ("qwen2_5_vl", "clip"),  # which has a tower of its own
)
SIZES = [(33, 71), (64, 64), (100, 37), (29, 28), (200, 12), (7, 5)]  # (width, height)
SIDE, PATCH = 30, 7  # of CLIP and SigLIP; patches leave two pixels over
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

# As llava-hf's: a turn's images before its text.
LLAVA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen2.5-VL's: images where they are.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image of (width, height): colours that run from corner to corner, under noise."""
    width, height = size
    down, right = np.mgrid[0:height, 0:width]
    ramps = np.stack(
        [255 * down / height, 255 * right / width, 255 * (down + right) / (height + width)], axis=-1
    )
    noise = np.random.default_rng([seed, *size]).normal(0, 40, ramps.shape)
    return Image.fromarray(np.clip(ramps + noise, 0, 255).astype(np.uint8))


def tiny_vlm(folder: Path, family: Family, tower: Tower = "clip", seed: int = 0) -> Path:
    """Writes a model of two layers, a tower of three, tokenizer and processor, as a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tests.torch_reference import randomised

    words = vlm_tokenizer(family)
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config(family, tower, words)))
    randomised(model, 0.15, seed)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    save_processor(folder, family, tower, words)
    return folder


def tiny_processor(folder: Path, family: Family, tower: Tower = "clip") -> Path:
    """The same folder without the weights."""
    words = vlm_tokenizer(family)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(family, tower, words)))
    save_processor(folder, family, tower, words)
    return folder


def vlm_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with the family's own tokens and chat template."""
    tokenizer = tiny_tokenizer()
    own = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(own if family == "qwen2_5_vl" else ["<image>"], special_tokens=True)
    tokenizer.chat_template = QWEN if family == "qwen2_5_vl" else LLAVA
    return tokenizer


def config(family: Family, tower: Tower, words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Its config.json, as far as it isn't transformers' default."""
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        ids = {
            name + "_id": words.convert_tokens_to_ids(token)
            for name, token in {
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
                "vision_start_token": "<|vision_start|>",
                "vision_end_token": "<|vision_end|>",
            }.items()
        }
        vision: dict[str, Any] = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,  # two features in each direction
            "fullatt_block_indexes": [1],
        }
        text |= {"model_type": "qwen2_5_vl_text", "rope_parameters": rope}
        return {"model_type": family, "text_config": text, "vision_config": vision, **ids}
    vision = {"model_type": f"{tower}_vision_model", **TOWER}
    hf = {
        "model_type": family,
        "text_config": text,
        "vision_config": vision,
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "image_seq_length": (SIDE // PATCH) ** 2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    return {**hf, "image_grid_pinpoints": GRIDS} if family == "llava_next" else hf


def image_processor(family: Family, tower: Tower) -> Any:
    """transformers', of those that compute with Pillow and NumPy."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    if family == "qwen2_5_vl":
        # 4 to 40 features of 8 x 8 pixels
        return Qwen2VLImageProcessorPil(patch_size=4, min_pixels=4 * 64, max_pixels=40 * 64)
    if family == "llava_next":
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=GRIDS
        )
    if tower == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    return SiglipImageProcessorPil(size=square)


def save_processor(folder: Path, family: Family, tower: Tower, words: PreTrainedTokenizerFast) -> None:
    """The files of a processor as they lie on the hub."""
    image_processor(family, tower).save_pretrained(folder)
    words.save_pretrained(folder)
    if family == "qwen2_5_vl":
        return
    whole = {
        "processor_class": "LlavaProcessor" if family == "llava" else "LlavaNextProcessor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "num_additional_image_tokens": int(tower == "clip"),
    }
    (folder / "processor_config.json").write_text(json.dumps(whole, indent=2))
