"""Vision-language models from the command line: stages on rows with images, what they leave, and runs broken off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntjax.hf.names import in_modules
from tests.cli.process import Result, Running, checkpoints, cold, devices, losses, metrics, write_rows
from tests.vlm import SIZES, Family, photo, tiny_vlm

WHAT = [{"type": "text", "text": "What?"}]
FAMILIES: tuple[Family, ...] = ("llava", "llava_next", "qwen2_5_vl")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
REWARDS = '''
from pathlib import Path

def letters(prompts, responses):
    """The share of letters a to m; prompts are what was asked, in words."""
    assert all(isinstance(p, str) and "image" not in p and "[{" not in p for p in prompts), prompts
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in responses]

def columns(prompts, completions, completion_ids, images, answer, trainer_state, **kwargs):
    """Written for TRL: images are where the data have them, as files."""
    assert sorted(kwargs) == ["log_extra", "log_metric", "number"], kwargs
    for turns, shown in zip(prompts, images):
        parts = turns[0]["content"]
        parts = parts if isinstance(parts, list) else []
        assert [part["type"] for part in parts].count("image") == len(shown or []), (parts, shown)
        assert all(Path(path).is_file() for path in shown or []), shown
    return [float(len(text[0]["content"]) % 7 + (a in "sky")) for text, a in zip(completions, answer)]
'''
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 500,
    "per_device_train_batch_size": 2,
}
DRAWING = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "reward_function": ["seen_rewards.py:letters", "seen_rewards.py:columns"],
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"freeze": ["vision_tower"], "learning_rates": {"projector": 1e-2}},
    "dpo": {"freeze": ["vision_tower"], "precompute_ref_log_probs": True},
    "grpo": {**DRAWING, "beta": 0.1, "num_iterations": 2, "steps_per_generation": 2},
    "ppo": {
        "per_device_train_batch_size": 4,
        "response_length": 8,
        "reward_function": ["seen_rewards.py:letters"],
        "num_mini_batches": 2,
    },
}


@pytest.fixture(scope="session")
def gallery(place: Path) -> Path:
    """The working folder, with rows of each kind and the images they show: several, one, none."""
    (place / "photos").mkdir()
    for number, size in enumerate(SIZES):
        photo(size, seed=number).save(place / "photos" / f"{number}.png")
    shown = [[0], [], [1, 2], [3], [4, 5, 0], [5], [], [2]]
    rows = [
        {
            "images": [f"photos/{n}.png" for n in numbers],
            "asked": "<image>" * len(numbers) + f"What is {i}, the sea?",
            "answer": ["It is blue.", "The sky.", "Paris"][i % 3],
        }
        for i, numbers in enumerate(shown * 2)
    ]
    sft, pairs, prompts = [], [], []
    for number, row in enumerate(rows):
        images, answer = {"images": row["images"]}, row["answer"]
        user = {"role": "user", "content": row["asked"]}
        sft.append({**images, "messages": [user, {"role": "assistant", "content": answer}]})
        pairs.append({**images, "prompt": row["asked"], "chosen": answer, "rejected": " No."})
        prompts.append({**images, "prompt": [user], "answer": answer, "number": number})
    for name, kind in {"sft": sft, "pairs": pairs, "prompts": prompts}.items():
        write_rows(place / f"seen_{name}.jsonl", kind)
    (place / "seeing").mkdir(exist_ok=True)
    (place / "seen_rewards.py").write_text(REWARDS)
    return place


@pytest.fixture(scope="session")
def folder(gallery: Path) -> Callable[[Family], Path]:
    """folder("llava"): a tiny model of the family."""

    def folder(family: Family) -> Path:
        made = gallery / family
        return made if made.exists() else tiny_vlm(made, family)

    return folder


@pytest.fixture(scope="session")
def seeing(gallery: Path, folder: Callable[[Family], Path]) -> Callable[..., Path]:
    """seeing("name", "llava", {"stage_type": ...}, ..., model={...}): a config of stages on rows with images."""
    files = {"sft": "seen_sft", "dpo": "seen_pairs", "grpo": "seen_prompts", "ppo": "seen_prompts"}

    def seeing(
        task: str,
        family: Family,
        *stages: dict[str, Any],
        model: dict[str, Any] | None = None,
        dataset: dict[str, Any] | None = None,
    ) -> Path:
        kinds = {stage["stage_type"] for stage in stages}
        config = {
            "task_name": task,
            "base_output_dir": "out",
            "use_tensorboard": False,
            "model": {"model_name_or_path": str(folder(family)), "model_type": "vlm", **(model or {})},
            "datasets": {
                kind: {"dataset_path": f"{files[kind]}.jsonl", "max_length": 512, **(dataset or {})}
                for kind in kinds
            },
            "stages": [{**COMMON, **STAGES[stage["stage_type"]], **stage} for stage in stages],
        }
        path = gallery / f"{task}.json"
        path.write_text(json.dumps(config))
        return path

    return seeing


@pytest.fixture(scope="session")
def train(
    ntjax: Callable[..., Result], seeing: Callable[..., Path], latest: Callable[[str], Path]
) -> Callable[..., Path]:
    """train("name", "llava", {stage}, ...): the folder of a run that ended well."""

    def train(task: str, *args: Any, env: dict[str, str] | None = None, **options: Any) -> Path:
        ended = ntjax("train", "--config", seeing(task, *args, **options), env=env)
        assert ended.code == 0, ended.err
        return latest(task)

    return train


@pytest.fixture(scope="module")
def chain(train: Callable[..., Path]) -> Path:
    """sft, dpo, grpo and ppo of a LLaVA."""
    return train("seen_chain", "llava", *({"stage_type": kind} for kind in STAGES))


def completions(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "completions.jsonl").read_text().splitlines()]


def tensors(stage: Path) -> dict[str, np.ndarray]:
    """The weights in a folder, by the names of transformers' modules."""
    family = json.loads((stage / "config.json").read_text())["model_type"]
    return {in_modules(name, family): x for name, x in load_file(stage / "model.safetensors").items()}


def test_every_stage_leaves_a_model_with_its_processor(chain: Path, gallery: Path) -> None:
    before = tensors(gallery / "llava")
    for kind in STAGES:
        stage = chain / f"{kind}_stage"
        for name in ("config.json", "tokenizer.json", *PROCESSOR):
            assert (stage / name).exists(), (kind, name)
        after = tensors(stage)
        assert after.keys() == before.keys()
        moved = {name.split(".")[1] for name in before if not np.array_equal(before[name], after[name])}
        assert {"multi_modal_projector", "language_model"} <= moved
        assert ("vision_tower" in moved) == (kind in ("grpo", "ppo"))
        before = after
    assert metrics(chain / "dpo_stage")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_completions_are_recorded_with_the_names_of_images(chain: Path) -> None:
    for kind in ("grpo", "ppo"):
        for line in completions(chain / f"{kind}_stage"):
            ((turn,), shows) = line["prompt"], isinstance(line["prompt"][0]["content"], list)
            if shows:
                *images, text = turn["content"]
                assert images == [{"type": "image"}] * len(images) != []
                assert "the sea?" in text["text"]
                assert len(line["images"]) == len(images)
                assert all(Path(name).is_file() for name in line["images"])
            else:
                assert "images" not in line
                assert "the sea?" in turn["content"]
            assert "<image>" not in line["completion"]


def test_the_sampler_sees_what_the_trainer_sees(chain: Path) -> None:
    for kind in ("grpo", "ppo"):
        told = [record for record in metrics(chain / f"{kind}_stage") if "sampler/logprob_diff_max" in record]
        assert told
        assert max(record["sampler/logprob_diff_max"] for record in told) < 1e-4


def test_a_stage_on_rows_with_images_says_how_many_images_they_show(chain: Path) -> None:
    log = (chain / "train.log").read_text()
    assert "sft_stage: 16 examples of 16 rows" in log
    assert "18 images, 288 image tokens" in log


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        pytest.param("qwen2_5_vl", ["grpo"], marks=pytest.mark.more),
        pytest.param("qwen2_5_vl", ["sft", "dpo"], marks=pytest.mark.more),
        pytest.param("llava_next", ["sft", "dpo", "grpo"], marks=pytest.mark.more),
    ],
)
def test_the_other_families_go_through_stages_too(
    family: Family, kinds: list[str], train: Callable[..., Path]
) -> None:
    """Rows are packed."""
    packed = {"sft": {"packing": True}, "dpo": {"packing": True}, "grpo": {}}
    stages = [{"stage_type": kind, **packed[kind]} for kind in kinds]
    run = train("_".join(["seen", family, *kinds]), family, *stages)
    for kind in kinds:
        stage = run / f"{kind}_stage"
        assert len(losses(stage)) == 2
        if kind == "grpo":
            assert metrics(stage)[0]["sampler/logprob_diff_max"] < 1e-4
            shown = [line["prompt"][0]["content"] for line in completions(stage)]
            assert all(isinstance(content, str) or {"type": "image"} in content for content in shown)


@pytest.mark.parametrize(
    ("name", "family", "model", "kinds"),
    [
        ("lora", "llava", {}, ["sft"]),
        pytest.param("loras", "llava", {}, ["dpo", "grpo"], marks=pytest.mark.more),
        pytest.param(
            *("qlora", "qwen2_5_vl", {"load_in_4bit": True}, ["sft", "dpo", "grpo", "ppo"]),
            marks=pytest.mark.more,
        ),
    ],
)
def test_adapters_are_trained_on_images(
    name: str,
    family: Family,
    model: dict[str, Any],
    kinds: list[str],
    train: Callable[..., Path],
    gallery: Path,
) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    lora["modules_to_save"] = ["multi_modal_projector" if family == "llava" else "merger"]
    stages = [{"stage_type": kind, "freeze": ["vision_tower"]} for kind in kinds]
    run = train(f"seen_{name}", family, *stages, model={"use_lora": True, "lora_config": lora, **model})
    before = tensors(gallery / family)
    for kind in kinds:
        stage = run / f"{kind}_stage"
        adapter = load_file(stage / "adapter" / "adapter_model.safetensors")
        assert not any("vision_tower" in key or "visual.blocks" in key for key in adapter)
        assert any("language_model.layers.0.self_attn.q_proj.lora_A" in key for key in adapter)
        assert any("multi_modal_projector" in key or "visual.merger" in key for key in adapter)
        after = tensors(stage)
        assert after.keys() == before.keys()
        for key in PROCESSOR[: 2 if family == "llava" else 1]:
            assert (stage / key).exists()


ONE = {
    "stage_type": "sft",
    "per_device_train_batch_size": 8,
    "freeze": [],
    "max_steps": 4,
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def whole(train: Callable[..., Path]) -> Callable[[Family], Path]:
    """whole("llava"): the stage of a run on one device that nothing disturbed."""
    return cache(lambda family: train(f"seen_one_{family}", family, ONE) / "sft_stage")


@pytest.mark.slow
def test_a_resumed_run_shows_the_same_images(
    ntjax: Callable[..., Result], whole: Callable[[Family], Path], gallery: Path
) -> None:
    undisturbed = whole("qwen2_5_vl")
    broken = Path(shutil.copytree(undisturbed.parent, gallery / "copies" / "seen_broken"))
    for later in ("checkpoint-4", "checkpoint-3"):
        shutil.rmtree(broken / "sft_stage" / later)
    for made_last in ("stage.json", "model.safetensors"):
        (broken / "sft_stage" / made_last).unlink()
    ended = ntjax("train", "--config", gallery / "seen_one_qwen2_5_vl.json", "--resume", broken)
    assert ended.code == 0, ended.err
    assert "resuming at step 2 of 4" in ended.out
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert (broken / "sft_stage" / name).read_bytes() == (undisturbed / name).read_bytes()
    assert metrics(broken / "sft_stage") == metrics(undisturbed)


@pytest.mark.slow
def test_killed_within_a_window_it_goes_on_with_the_same_completions(
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    seeing: Callable[..., Path],
    train: Callable[..., Path],
    latest: Callable[[str], Path],
) -> None:
    stage = {"stage_type": "grpo", "max_steps": 8, "save_steps": 1}
    whole = train("seen_window", "llava", stage) / "grpo_stage"
    command = "train", "--config", seeing("seen_killed", "llava", stage)
    first = begin(*command)
    first.until(lambda: (latest("seen_killed") / "grpo_stage" / "checkpoint-6").exists())
    assert first.send(signal.SIGKILL).code == -9
    killed = latest("seen_killed") / "grpo_stage"
    saved = max(checkpoints(killed))
    assert saved in (6, 7), "the kill came too late to fall within the second window"
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert f"resuming at step {saved} of 8" in ended.out
    for name in ("model.safetensors", "completions.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


MESHES = {
    "data 4": {"data": 4},
    "fsdp 2 sequence 2": {"fsdp": 2, "sequence": 2, "zero_stage": 3},
    "data 2 fsdp 2 tensor 2": {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "zero_stage": 3,
        "rules": {"vocab": "none"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_meshes_lose_what_one_device_does(
    family: Family,
    name: str,
    whole: Callable[[Family], Path],
    seeing: Callable[..., Path],
    ntjax: Callable[..., Result],
    latest: Callable[[str], Path],
) -> None:
    """Also where rows come in two microbatches."""
    sizes = MESHES[name]
    rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
    split = {**ONE, "per_device_train_batch_size": 4 // rows, "gradient_accumulation_steps": 2}
    task = f"seen_{family}_{name.replace(' ', '_')}"
    path = seeing(task, family, {**split, "save_steps": 500})
    path.write_text(json.dumps({**json.loads(path.read_text()), "mesh": sizes}))
    count = rows * sizes.get("tensor", 1) * sizes.get("sequence", 1)
    ended = ntjax("train", "--config", path, env=devices(count))
    assert ended.code == 0, ended.err
    assert losses(latest(task) / "sft_stage") == pytest.approx(losses(whole(family)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_two_processes_do_what_one_does(
    kind: str,
    gallery: Path,
    train: Callable[..., Path],
    seeing: Callable[..., Path],
    latest: Callable[[str], Path],
) -> None:
    """Each decodes the images of its own rows."""
    stage = {"stage_type": kind, "per_device_train_batch_size": 4, "max_steps": 4}
    one = train(f"seen_{kind}_one", "qwen2_5_vl", stage, env=devices(2))
    path = seeing(f"seen_{kind}_two", "qwen2_5_vl", stage)
    command = sys.executable, "-m", "ntjax.train", "--config", str(path)
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = cold(gallery, ("launch", "--processes", "2", "--", *command), {**devices(1), **root})
    assert ended.code == 0, ended.err
    runs = [run / f"{kind}_stage" for run in (one, latest(f"seen_{kind}_two"))]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4, abs=1e-5)
    if kind == "grpo":
        drawn = [[line["completion"] for line in completions(run)] for run in runs]
        assert drawn[1] == drawn[0]


def generated(ended: Result) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def test_generate_is_shown_images_in_every_way(
    ntjax: Callable[..., Result], begin: Callable[..., Running], gallery: Path, folder: Callable[..., Path]
) -> None:
    """One, two, beside the rows of a file, and in a conversation: the same prompt gets the same answer."""
    model = "generate", "--model", folder("llava"), "--max-new-tokens", "6"
    one, other = "photos/0.png", "photos/1.png"
    (asked,) = generated(ntjax(*model, "--json", "--prompt", "What?", "--image", one))
    assert list(asked)[:4] == ["prompt", "completion", "tokens", "logprobs"]
    (both,) = generated(ntjax(*model, "--json", "--prompt", "What?", "--image", one, "--image", other))
    shutil.copy(gallery / one, gallery / "seeing" / "a.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "What?", "images": ["a.png"]},
        {"prompt": "<image><image>\nWhat?", "images": ["a.png", "../photos/1.png"]},
        {"prompt": "What?"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, *WHAT]}]},
    ]
    write_rows(gallery / "seeing" / "asked.jsonl", rows)
    found = generated(ntjax(*model, "--json", "--prompts", "seeing/asked.jsonl"))
    assert [row["tokens"] for row in found] == [
        asked["tokens"],
        both["tokens"],
        found[2]["tokens"],
        asked["tokens"],
    ]
    assert len({tuple(row["logprobs"]) for row in found[:3]}) == 3
    assert ntjax(*model, "--prompt", "What?", "--image", one).out == asked["completion"] + "\n"


@pytest.mark.slow
def test_a_chat_is_about_an_image(gallery: Path, folder: Callable[..., Path]) -> None:
    model = "--model", str(folder("llava")), "--max-new-tokens", "4", "--image", "photos/0.png"
    command = [sys.executable, "-m", "ntjax.generate", *model, "--chat"]
    ended = subprocess.run(
        command,
        input="What?\nAnd now?\n\n",
        cwd=gallery,
        env={**os.environ, **devices(1)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("> ") == 3


def test_inspect_counts_images(ntjax: Callable[..., Result], seeing: Callable[..., Path]) -> None:
    args = "inspect", "--config", seeing("seen_inspect", "llava", {"stage_type": "sft"})
    plain, shown = ntjax(*args), ntjax(*args, "--json")
    assert plain.code == 0, plain.err
    assert "<16 image tokens>" in plain.out
    assert "16 of images (33 x 71 pixels)" in plain.out
    assert "18 images, 288 image tokens" in plain.out
    assert ["image" in row for row in generated(shown)] == [True, False, True]
    assert [sum(row.get("image", ())) for row in generated(shown)] == [16, 0, 32]


def test_export_gives_what_the_stage_left(ntjax: Callable[..., Result], chain: Path, gallery: Path) -> None:
    stage, out = chain / "sft_stage", gallery / "exported"
    ended = ntjax("export", "--checkpoint", stage, "--out", out)
    assert ended.code == 0, ended.err
    for name in ("model.safetensors", "tokenizer.json", *PROCESSOR):
        assert (out / name).read_bytes() == (stage / name).read_bytes()
    refused = ntjax("export", "--checkpoint", stage, "--out", gallery / "flax", "--format", "flax")
    assert refused.code == 78
    assert "never had llava in Flax" in refused.err


def test_import_copies_a_folder_with_its_processor(
    ntjax: Callable[..., Result], gallery: Path, chain: Path
) -> None:
    ended = ntjax("import", "--model", chain / "sft_stage", "--out", gallery / "imported")
    assert ended.code == 0, ended.err
    names = ("model.safetensors", "tokenizer.json", "chat_template.jinja", *PROCESSOR)
    for name in names:
        assert (gallery / "imported" / name).read_bytes() == (chain / "sft_stage" / name).read_bytes()


def png(width: int, height: int) -> bytes:
    """A PNG of so many pixels, none of which is there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def unwell(gallery: Path, folder: Callable[..., Path], seeing: Callable[..., Path]) -> Path:
    """The config of a model without weights, beside files of rows whose last is wrong."""
    for name, gone in (("unweighted", "*.safetensors"), ("blind", "*processor_config.json")):
        shutil.copytree(folder("llava"), gallery / name, ignore=shutil.ignore_patterns(gone, "*.safetensors"))
    shutil.copytree(gallery / "model", gallery / "words", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = (gallery / "photos" / "1.png").read_bytes()
    broken = {
        "headless": whole[:20],
        "torn": whole[: len(whole) // 2],
        "bomb": png(9000, 9000),
        "line": png(900, 3),
    }
    for name, data in broken.items():
        (gallery / "photos" / f"{name}.png").write_bytes(data)
    answer = {"role": "assistant", "content": "It is blue."}
    good = {"images": ["photos/0.png"], "messages": [{"role": "user", "content": "<image>What?"}, answer]}
    wrong = {name: {**good, "images": [f"photos/{name}.png"]} for name in (*broken, "9")}
    wrong["two"] = {**good, "images": ["photos/0.png"] * 2}
    wrong["url"] = {**good, "images": ["https://example.org/a.png"]}
    for name, row in wrong.items():
        write_rows(gallery / f"wrong_{name}.jsonl", [good] * 5 + [row])
    write_rows(gallery / "asked_9.jsonl", [{"prompt": "a", "images": ["photos/9.png"]}])
    path = seeing("unwell", "llava", {"stage_type": "sft"}, dataset={"dataset_path": "wrong_9.jsonl"})
    path.write_text(path.read_text().replace(str(folder("llava")), "unweighted"))
    return path


PLAIN = ["stages.0.freeze=[]", "stages.0.learning_rates={}"]
WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "model_type llm": (["model.model_type=llm"], 78, ["is a vision-language model", 'set it to "vlm"']),
    "model_type vlm": (
        ["model.model_name_or_path=words"],
        78,
        ["unwell.json:", 'set it to "llm"', "--vision"],
    ),
    "image_field": (
        ["model.model_name_or_path=words", "model.model_type=llm", "datasets.sft.image_field=images", *PLAIN],
        78,
        ["datasets.sft.image_field", "reads text alone"],
    ),
    "another image_field": (
        ["datasets.sft.image_field=imags"],
        66,
        ["no column 'imags'; did you mean 'images'", "wrong_9.jsonl:1"],
    ),
    "no image": ([], 65, ["wrong_9.jsonl:6 images[0]", "there is no '9.png'", "did you mean"]),
    "two images": (
        ["datasets.sft.dataset_path=wrong_two.jsonl"],
        65,
        ["wrong_two.jsonl:6: 2 images, but 1 placeh"],
    ),
    "no header": (
        ["datasets.sft.dataset_path=wrong_headless.jsonl"],
        65,
        ["wrong_headless.jsonl:6", "mend the image"],
    ),
    "bomb": (["datasets.sft.dataset_path=wrong_bomb.jsonl"], 65, ["wrong_bomb.jsonl:6", "50 megapixels"]),
    "line": (["datasets.sft.dataset_path=wrong_line.jsonl"], 65, ["more than 200 times", "crop"]),
    "url": (["datasets.sft.dataset_path=wrong_url.jsonl"], 65, ["example.org/a.png is a URL", "download"]),
    "pixels": (
        ["model.image_max_pixels=999"],
        78,
        ["model.image_max_pixels=999", "llava scales every image to one"],
    ),
    "no processor": (["model.model_name_or_path=blind"], 66, ["blind: no preprocessor_config.json", "copy"]),
    "freeze": (
        ['stages.0.freeze=["tower"]', "stages.0.learning_rates={audio=1e-3}"],
        78,
        ["'audio', which is nowhere", "vision_tower"],
    ),
    "short": (
        ["datasets.sft.max_length=12", "datasets.sft.max_bad_rows=1"],
        65,
        ["5 of 5 rows have nothing to learn", "max_length"],
    ),
    "passed over": (["datasets.sft.max_bad_rows=1"], 66, ["no model.safetensors"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_told_before_weights_are_read(
    wrong: str, ntjax: Callable[..., Result], unwell: Path
) -> None:
    args, code, said = WRONG[wrong]
    ended = ntjax("train", "--config", unwell, *args)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert "fix: " in ended.err or wrong == "no image"
    for phrase in said:
        assert phrase in ended.err


def test_a_reward_stage_reads_text(ntjax: Callable[..., Result], seeing: Callable[..., Path]) -> None:
    path = seeing("seen_reward", "llava", {"stage_type": "dpo"})
    path.write_text(
        path.read_text().replace('"dpo"', '"reward"').replace('"precompute_ref_log_probs": true, ', "")
    )
    ended = ntjax("train", "--config", path)
    assert ended.code == 78, ended.err
    assert "transformers has no reward models that do" in ended.err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--prompt", "a", "--image", "nowhere.png"], 66, "--image: there is no file nowhere.png"),
        (["--prompt", "<image>"], 65, "--prompt: 0 images, but 1 placeholder"),
        (["--prompt", "a", "--image", "photos/torn.png"], 65, "the image can't be read"),
        (["--prompts", "asked_9.jsonl"], 65, "asked_9.jsonl:1 images[0]: there is no '9.png'"),
    ],
)
def test_generate_says_what_is_wrong(
    args: list[str],
    code: int,
    said: str,
    ntjax: Callable[..., Result],
    unwell: Path,
    folder: Callable[..., Path],
) -> None:
    ended = ntjax("generate", "--model", folder("llava"), *args)
    assert ended.code == code, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_an_image_that_breaks_while_it_is_shown_ends_the_run_and_leaves_what_is_saved(
    ntjax: Callable[..., Result], unwell: Path, gallery: Path, latest: Callable[[str], Path]
) -> None:
    command = (
        *("train", "--config", unwell, f"model.model_name_or_path={gallery / 'llava'}"),
        *("datasets.sft.dataset_path=wrong_torn.jsonl", "datasets.sft.shuffle=false"),
        *("stages.0.max_steps=4", "stages.0.save_steps=1"),
    )
    ended = ntjax(*command)
    assert ended.code == 65, ended.err
    assert "wrong_torn.jsonl:6 images[0]: the image can't be read" in ended.err
    assert "Traceback" not in ended.err
    stage = latest("unwell") / "sft_stage"
    saved = checkpoints(stage)
    assert saved == [1, 2]
    assert not (stage / "model.safetensors").exists()
    shutil.copy(gallery / "photos" / "1.png", gallery / "photos" / "torn.png")
    mended = ntjax(*command, "--resume", "auto", "--allow-changed")
    assert mended.code == 0, mended.err
    assert "resuming at step 2 of 4" in mended.out


@pytest.mark.slow
def test_a_reward_model_reads_the_words_alone(
    ntjax: Callable[..., Result], train: Callable[..., Path], gallery: Path, latest: Callable[[str], Path]
) -> None:
    turn = [{"role": "user", "content": "a"}]
    row = {"prompt": turn, **{s: [{"role": "assistant", "content": s}] for s in ("chosen", "rejected")}}
    write_rows(gallery / "judged.jsonl", [row] * 4)
    config = {
        "task_name": "judge",
        "base_output_dir": "out",
        "use_tensorboard": False,
        "model": {"model_name_or_path": "model"},
        "datasets": {"reward": {"dataset_path": "judged.jsonl"}},
        "stages": [{**COMMON, "stage_type": "reward"}],
    }
    (gallery / "judge.json").write_text(json.dumps(config))
    ended = ntjax("train", "--config", gallery / "judge.json")
    assert ended.code == 0, ended.err
    judge = str(latest("judge") / "reward_stage")
    run = train("seen_judged", "qwen2_5_vl", {"stage_type": "grpo", "reward_function": [judge]})
    assert "rewards/reward_stage/mean" in metrics(run / "grpo_stage")[0]
