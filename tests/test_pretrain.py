"""A pretrain stage: its settings, its examples, and its loss against transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ntjax.data.batch import collate
from ntjax.data.encoded import Encoded
from ntjax.data.files import Table
from ntjax.data.pack import first_fit
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.models import Model, build
from ntjax.stages.pretrain import Options
from tests.tiny import tiny_model, tiny_tokenizer

FIELDS: Any = SimpleNamespace(
    text_field=None, image_field=None, max_bad_rows=0, preprocessing_num_workers=None
)
TEXTS = ["The sea is wide and the sky is blue. " * n for n in (1, 9, 2, 5)]


def encoded(**options: Any) -> Encoded:
    stage = Options(stage_type="pretrain", max_length=32, **options)
    return stage.encode(
        Table("d", [{"text": text} for text in TEXTS]), tiny_tokenizer(None), FIELDS, None, 400
    )


def rows(made: Encoded) -> dict[str, Any]:
    """All examples as one batch of packed rows."""
    packs = first_fit(made.lengths.tolist(), 32)
    return collate([[made.example(i) for i in pack] for pack in packs], 32, 0)


WHOLE = [len(tiny_tokenizer(None)(text)["input_ids"]) + 1 for text in TEXTS]


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_of_a_long_document_is_lost(packing: bool) -> None:
    made = encoded(packing=packing)
    assert len(made.tokens) == sum(WHOLE)
    assert made.lengths.max() == 32
    assert made.mask.sum() == sum(WHOLE) - len(made)


def test_bfd_drops_what_is_over_max_length() -> None:
    made = encoded(packing_strategy="bfd")
    assert made.lengths.tolist() == [min(length, 32) for length in WHOLE]
    assert made.truncated.tolist() == [length > 32 for length in WHOLE]


def test_wrapped_rows_are_full() -> None:
    made = encoded(packing_strategy="wrapped")
    packs = first_fit(made.lengths.tolist(), 32)
    assert [int(made.lengths[pack].sum()) for pack in packs] == [32] * (sum(WHOLE) // 32) + [sum(WHOLE) % 32]


def test_rows_are_packed_in_order_only_where_they_are_wrapped() -> None:
    orders = [
        Options(stage_type="pretrain", packing_strategy=s).packs_in_order for s in (None, "bfd", "wrapped")
    ]
    assert orders == [False, False, True]


def test_wrapped_rows_are_packed_rows() -> None:
    wrong = Options(stage_type="pretrain", packing=False, packing_strategy="wrapped")
    assert [name for name, _ in wrong.conflicts()] == ["packing_strategy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), None)


def ours(folder: Path) -> tuple[Model, dict[str, jax.Array]]:
    model = build(read_config(folder))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return model, load_params(folder, model.specs, dtype="float32", sharding=lambda path, shapes: place)


def test_the_loss_is_that_of_every_piece_alone(folder: Path) -> None:
    made = encoded(packing_strategy="wrapped")
    batch = rows(made)
    model, params = ours(folder)
    loss = jax.jit(Options(stage_type="pretrain").loss(model))(params, batch)["loss"]
    reference = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for piece in map(made.example, range(len(made))):
        if len(piece.tokens) > 1:
            ids = torch.tensor(piece.tokens[None].astype(np.int64))
            with torch.no_grad():
                total += (len(piece.tokens) - 1) * float(reference(ids, labels=ids).loss)
            count += len(piece.tokens) - 1
    assert float(loss.weight) == count
    np.testing.assert_allclose(float(loss.total), total, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_blocked_attention_changes_nothing_but_memory(
    folder: Path, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntjax.ops.blocked.BLOCK", 8)
    made = encoded(packing_strategy="wrapped")
    batch = rows(made)
    model, params = ours(folder)

    def gradient(attention: str) -> dict[str, jax.Array]:
        other = build(model.hf, remat=remat, attention=attention)
        assert other.config == replace(model.config, remat=remat, attention=attention)
        loss = Options(stage_type="pretrain").loss(other)
        return jax.jit(jax.grad(lambda params: loss(params, batch)["loss"].total))(params)

    blocked, plain = gradient("blocked"), gradient("xla")
    for path in plain:
        np.testing.assert_allclose(
            blocked[path], plain[path], atol=1e-5 * np.abs(plain[path]).max(), err_msg=path
        )
