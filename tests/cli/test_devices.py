"""The number of devices changes nothing but the speed; a bucket costs one compilation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.process import Result, cold, devices, losses, write_rows


@pytest.mark.slow
def test_eight_devices_lose_what_one_does_and_one_takes_over(
    ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    one, eight = config("one", per_device_train_batch_size=8), config("eight", per_device_train_batch_size=1)
    for path, env in ((one, devices(1)), (eight, devices(8))):
        ended = ntjax("train", "--config", path, env=env)
        assert ended.code == 0, ended.err
    stages = {task: latest(task) / "sft_stage" for task in ("one", "eight")}
    assert losses(stages["eight"]) == pytest.approx(losses(stages["one"]), rel=1e-5)

    resume = "train", "--config", eight, "--resume", stages["eight"] / "checkpoint-12"
    refused = ntjax(*resume)
    assert refused.code == 78
    assert "rows of a step: 8 -> 1" in refused.err
    taken_over = ntjax(*resume, "stages.0.per_device_train_batch_size=8")
    assert taken_over.code == 0, taken_over.err
    assert "resuming at step 12 of 24" in taken_over.out
    assert losses(stages["eight"]) == pytest.approx(losses(stages["one"]), rel=1e-5)


@pytest.mark.slow
def test_a_deepspeed_file_sets_the_mesh_and_offloads(
    place: Path, ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    """What lies in the host's memory changes no number, and is saved and restored like any other."""
    cpu = {"device": "cpu"}
    zero = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    (place / "ds.json").write_text(json.dumps({"zero_optimization": zero, "steps_per_print": 9}))
    plain, offloaded = (config(task, per_device_train_batch_size=1) for task in ("ds-plain", "ds-offloaded"))
    alone = ntjax("train", "--config", plain, "mesh.zero_stage=3", env=devices(4))
    assert alone.code == 0, alone.err
    command = "train", "--config", offloaded, "--deepspeed", "ds.json"
    ended = ntjax(*command, env=devices(4))
    assert ended.code == 0, ended.err
    assert "without a counterpart here, and not read: steps_per_print" in ended.out
    assert "optimizer's state in the host's memory" in ended.out
    assert "fsdp 4, ZeRO 3, weights in the host's memory" in ended.out
    stages = latest("ds-plain") / "sft_stage", latest("ds-offloaded") / "sft_stage"
    assert losses(stages[1]) == losses(stages[0])

    resumed = ntjax(*command, "--resume", stages[1] / "checkpoint-12", env=devices(4))
    assert resumed.code == 0, resumed.err
    assert losses(stages[1]) == losses(stages[0])


def test_devices_that_share_nothing_out_are_refused(
    ntjax: Callable[..., Result], config: Callable[..., Path]
) -> None:
    ended = ntjax("train", "--config", config("apart"), "mesh.data=-1", "mesh.zero_stage=3", env=devices(2))
    assert ended.code == 78
    assert "zero_stage = 3, but no devices share anything out: 2 are along data" in ended.err


def test_rows_whose_rotations_go_by_their_length_are_not_split(
    ntjax: Callable[..., Result], config: Callable[..., Path], place: Path
) -> None:
    folder = Path(shutil.copytree(place / "model", place / "stretched"))
    hf = json.loads((folder / "config.json").read_text())
    hf |= {"max_position_embeddings": 32}
    hf["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(hf))
    command = "train", "--config", config("stretched", max_steps=2), "model.model_name_or_path=stretched"
    ended = ntjax(*command, "mesh.sequence=2", env=devices(2))
    assert ended.code == 78
    assert "dynamic RoPE goes by a document's length past 32 tokens" in ended.err
    assert ntjax(*command, "datasets.sft.max_length=32", "mesh.sequence=2", env=devices(2)).code == 0


def test_weights_may_be_held_in_less_than_is_computed_in(
    ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    ended = ntjax("train", "--config", config("narrow", max_steps=6), "model.param_dtype=bfloat16")
    assert ended.code == 0, ended.err
    found = losses(latest("narrow") / "sft_stage")
    assert found[-1] < found[0]


def test_the_step_is_compiled_once_a_bucket(place: Path, config: Callable[..., Path]) -> None:
    """Rows of up to 64 tokens and of up to 128, in turn, with accumulation."""
    rows = [{"prompt": "What is", "completion": " blue" * (90 if i % 3 == 0 else 5)} for i in range(24)]
    write_rows(place / "buckets.jsonl", rows)
    path = config(
        "buckets",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 10},
        dataset={"dataset_path": "buckets.jsonl", "max_length": 256, "shuffle": False},
    )
    ended = cold(place, ("train", "--config", str(path)), {"JAX_LOG_COMPILES": "1", **devices(1)})
    assert ended.code == 0, ended.err
    compiled = re.findall(r"Compiling jit\(step\) with global shapes", ended.err)
    assert len(compiled) == 2
