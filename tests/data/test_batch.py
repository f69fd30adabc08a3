"""Examples laid out in rows."""

from __future__ import annotations

import numpy as np

from ntjax.data.batch import Example, collate


def example(*tokens, learned):
    return Example(np.array(tokens, np.int32), np.array(learned, np.bool_))


def test_layout_by_hand():
    a = example(11, 12, 13, learned=[0, 0, 1])
    b = example(21, 22, learned=[0, 1])
    batch = collate([[a, b], [b], []], length=6, pad_id=9)
    table = {
        "tokens": [[11, 12, 13, 21, 22, 9], [21, 22, 9, 9, 9, 9], [9, 9, 9, 9, 9, 9]],
        "mask": [[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    }
    dtypes = {"tokens": np.int32, "mask": np.bool_, "segments": np.int32, "positions": np.int32}
    assert batch.keys() == table.keys()
    for name, expected in table.items():
        assert batch[name].dtype == dtypes[name]
        assert batch[name].tolist() == expected, name


def test_the_first_token_of_a_document_is_never_learned():
    """In a packed row it would be predicted from the document before it."""
    every = example(1, 2, learned=[1, 1])
    assert collate([[every, every]], length=4, pad_id=0)["mask"].tolist() == [[False, True, False, True]]
