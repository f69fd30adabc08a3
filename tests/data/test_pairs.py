"""Pairs as tokens: TRL 1.16's, computed here by TRL itself from the same rows; pairs laid out in rows."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from trl import DPOTrainer, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ntjax.data import pairs as encoding
from ntjax.data.batch import Example, Pair
from ntjax.data.encoded import gather
from ntjax.data.files import Table
from ntjax.data.loader import Plan, batches
from ntjax.data.pairs import EncodedPairs, PairEncoder, encode_dpo, encode_pairs
from ntjax.data.preference import preference
from ntjax.errors import BadData, InputMissing
from tests.tiny import tiny_tokenizer

FIELDS = SimpleNamespace(text_field=None, prompt_field=None, chosen_field=None, rejected_field=None)
encode_reward = partial(encoding.encode_reward, pad_id=0)
disable_progress_bars()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dpo_by_trl(row, tokenizer, max_length=1000, truncation_mode="keep_start"):
    """[(ids, which of them are in the completion)] of chosen and rejected, or None where TRL drops the row."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation_mode)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    made = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, args, "t")
    if not len(made):
        return None
    collator = DataCollatorForPreference(0, max_length=max_length, truncation_mode=truncation_mode)
    batch = {name: array.numpy() for name, array in collator([made[0]]).items()}
    real = batch["attention_mask"].astype(bool)
    return [
        (batch["input_ids"][i][real[i]].tolist(), batch["completion_mask"][i][real[i]].astype(bool).tolist())
        for i in (0, 1)
    ]


def reward_by_trl(row, tokenizer, max_length=1000):
    """[ids of chosen, ids of rejected], or None where TRL drops the row."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    made = RewardTrainer._prepare_dataset(None, Dataset.from_list([row]), tokenizer, args, "t")
    return [made[0]["chosen_ids"], made[0]["rejected_ids"]] if len(made) else None


def ours(encode, row, tokenizer, max_length=1000, **options):
    return encode(preference(row, FIELDS, "t:1"), tokenizer, max_length=max_length, **options)


def assert_same(pair, theirs):
    for document, (ids, completion) in zip(pair.documents, theirs, strict=True):
        assert document.tokens.tolist() == ids
        assert not document.mask[0]  # nothing predicts it; TRL's shift drops it
        assert document.mask[1:].tolist() == completion[1:]


ROWS = {
    "text": {"prompt": "The capital of", "chosen": " France is Paris.", "rejected": " Paris is France."},
    "text that merges": {"prompt": "line\n", "chosen": "\n\nline", "rejected": "line"},
    "text without prompt": {"prompt": "", "chosen": "yes", "rejected": "no 🙂"},
    "text that has ended": {"prompt": "done", "chosen": " yes<|im_end|>", "rejected": " no<|im_end|> no"},
    "implicit text": {
        "chosen": "\n\nHuman: hi\n\nAssistant: It is blue.",
        "rejected": "\n\nHuman: hi\n\nAssistant: It is wide. It is not.",
    },
    "implicit text that continues": {"chosen": "The sea is", "rejected": "The sea is blue"},
    "messages": {
        "prompt": [user("What is the capital of France?")],
        "chosen": [assistant("Paris.")],
        "rejected": [assistant("日本 🙂")],
    },
    "messages with a system turn": {
        "prompt": [{"role": "system", "content": "Be brief."}, user("1"), assistant("2"), user("3")],
        "chosen": [assistant("\n\n two newlines first")],
        "rejected": [assistant("")],
    },
    "implicit messages": {
        "chosen": [user("hi"), assistant("Hello, how are you today?")],
        "rejected": [user("hi"), assistant("Hello")],
    },
    "implicit messages of several turns": {
        "chosen": [user("1"), assistant("2"), user("3"), assistant("4")],
        "rejected": [user("1"), assistant("2"), user("5"), assistant("6")],
    },
    "the same messages": {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("2")]},
}
TEXT = [name for name in ROWS if "text" in name]
TALK = [name for name in ROWS if "messages" in name]
CASES = [(t, n) for t in (None, "chatml", "llama2") for n in TEXT]
CASES += [(t, n) for t in ("chatml", "llama2", "generation", "thinking") for n in TALK]


@pytest.mark.parametrize(("template", "name"), CASES)
def test_dpo(template, name):
    tokenizer = tiny_tokenizer(template)
    assert_same(ours(encode_dpo, ROWS[name], tokenizer), dpo_by_trl(ROWS[name], tokenizer))


@pytest.mark.parametrize(("template", "name"), CASES)
def test_reward(template, name):
    tokenizer = tiny_tokenizer(template)
    pair = ours(encode_reward, ROWS[name], tokenizer)
    assert [one.tokens.tolist() for one in pair.documents] == reward_by_trl(ROWS[name], tokenizer)
    for document in pair.documents:
        scored = np.flatnonzero(document.tokens != tokenizer.pad_token_id)[-1]
        assert np.flatnonzero(document.mask).tolist() == [scored]


def test_random_strings_agree():
    """The prompt that both documents begin with, on strings made to merge across borders."""
    tokenizer = tiny_tokenizer("chatml")
    rng = np.random.default_rng(0)
    pieces = ["\n", "\n\n", " ", "  ", "the", " the", "capital", "🙂", "é", "\t", "in", "g", "<|im_end|>"]
    for _ in range(20):
        prompt, chosen, rejected = ("".join(rng.choice(pieces, 6)) for _ in range(3))
        for row in (
            {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            {"chosen": "the " + prompt + chosen, "rejected": "the " + prompt + rejected},
            {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]},
        ):
            assert_same(ours(encode_dpo, row, tokenizer), dpo_by_trl(row, tokenizer))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("name", ["text", "messages", "implicit messages"])
def test_dpo_truncates(mode, name):
    """TRL drops what we find nothing to learn in: rows whose prompt alone fills max_length."""
    tokenizer = tiny_tokenizer("chatml")
    whole = ours(encode_dpo, ROWS[name], tokenizer)
    lengths = [len(document.tokens) for document in whole.documents]
    prompt = int(whole.chosen.mask.argmax())
    for max_length in (2, prompt, prompt + 1, min(lengths), max(lengths)):
        pair = ours(encode_dpo, ROWS[name], tokenizer, max_length, keep_end=mode == "keep_end")
        theirs = dpo_by_trl(ROWS[name], tokenizer, max_length, mode)
        assert [document.truncated for document in pair.documents] == [n > max_length for n in lengths]
        assert (theirs is None) == (not any(document.mask.any() for document in pair.documents))
        assert (theirs is None) == (mode == "keep_start" and max_length <= prompt)
        if theirs is not None:
            assert_same(pair, theirs)


def test_reward_drops_pairs_that_are_too_long():
    tokenizer = tiny_tokenizer("chatml")
    longest = max(map(len, reward_by_trl(ROWS["messages"], tokenizer)))
    for max_length in (longest - 1, longest):
        pair = ours(encode_reward, ROWS["messages"], tokenizer, max_length)
        dropped = reward_by_trl(ROWS["messages"], tokenizer, max_length) is None
        assert dropped == (max_length < longest)
        assert dropped == (not any(document.mask.any() for document in pair.documents))


@pytest.mark.parametrize("name", ["messages", "implicit messages"])
def test_tools_and_template_options_reach_the_template(name):
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{{ flavour }}" + tokenizer.chat_template
    extra = {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"flavour": "x"}}
    row = ROWS[name] | extra
    pair = ours(encode_dpo, row, tokenizer)
    assert_same(pair, dpo_by_trl(row, tokenizer))
    assert tokenizer.decode(pair.chosen.tokens).startswith('[{"name": "add"}]x')
    reward = ours(encode_reward, row, tokenizer)
    assert [one.tokens.tolist() for one in reward.documents] == reward_by_trl(row, tokenizer)


def encoder(encode=encode_dpo, max_length=100, formatting_func=None):
    return PairEncoder(partial(encode, max_length=max_length), tiny_tokenizer(), FIELDS, formatting_func)


def table(*rows):
    return Table("d.jsonl", rows, range(1, 1000))


def document(*tokens):
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) == len(tokens) - 1)


def by_hand(*pairs, **options):
    """Pairs of these documents; of each the last token is learned."""
    made = [Pair(document(*chosen), document(*rejected)) for chosen, rejected in pairs]
    gathered = gather(Table("d", [{"n": n} for n in range(len(made))]), lambda row, _: [made[row["n"]]])
    return EncodedPairs(gathered.encoded(), **options)


A, B, C = ([1, 2], [1, 3, 4]), ([5, 6, 7], [5, 8]), ([1, 9], [1, 9])


def test_a_pair_is_as_long_as_its_longer_document():
    pairs = by_hand(A, B)
    assert pairs.lengths.tolist() == [3, 3]
    assert pairs.sizes.tolist() == [5, 5]
    assert len(pairs) == 2
    assert pairs.example(1).chosen.tokens.tolist() == [5, 6, 7]
    assert pairs.example(1).rejected.tokens.tolist() == [5, 8]


def test_layout_by_hand():
    """Two pairs in the first slot, one in the second, none in the third."""
    margin, ref_logps = np.float32([0.5, 1, 2]), np.float32([[-1, -2], [-3, -4], [-5, -6]])
    pairs = by_hand(A, B, C, margin=margin, ref_logps=ref_logps)
    batch = pairs.batch([[0, 1], [2], []], length=7, documents=2, pad_id=0)
    none = [0] * 7
    expected = {
        "tokens": [
            [[1, 2, 5, 6, 7, 0, 0], [1, 3, 4, 5, 8, 0, 0]],
            [[1, 9, 0, 0, 0, 0, 0], [1, 9, 0, 0, 0, 0, 0]],
            [none, none],
        ],
        "mask": [
            [[0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0, 0]],
            [[0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]],
            [none, none],
        ],
        "segments": [
            [[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 0, 0]],
            [[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
            [none, none],
        ],
        "positions": [
            [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1, 0, 0]],
            [[0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]],
            [none, none],
        ],
        "pairs": [[1, 1], [1, 0], [0, 0]],
        "margin": [[0.5, 1], [2, 0], [0, 0]],
        "ref_logps": [[[-1, -3], [-2, -4]], [[-5, 0], [-6, 0]], [[0, 0], [0, 0]]],
    }
    dtypes = {"mask": np.bool_, "pairs": np.bool_, "margin": np.float32, "ref_logps": np.float32}
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name].dtype == dtypes.get(name, np.int32), name
        assert batch[name].tolist() == values, name


def test_margins_and_reference_scores_are_there_only_if_known():
    assert by_hand(A).batch([[0]], 3, 1, 0).keys() == {"tokens", "mask", "segments", "positions", "pairs"}


def test_packed_batches_hold_every_pair_once():
    """Both rows of a slot hold the same pairs, and no row is overfull, whichever document is longer."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, (40, 2))
    pairs = by_hand(*[([n + 1] * a, [n + 1] * b) for n, (a, b) in enumerate(lengths.tolist())])
    plan = Plan(pairs.lengths, 64, rows_per_microbatch=4, accumulation=2, packing=True)
    assert plan.documents > 2
    seen = []
    for batch in batches(plan, pairs, pad_id=0):
        assert batch["tokens"].shape == (2, 4, 2, 64)
        assert batch["pairs"].shape == (2, 4, plan.documents)
        counts = batch["pairs"].sum(-1)
        assert np.array_equal(batch["segments"].max(-1), np.stack([counts, counts], -1))
        first = (batch["positions"] == 0) & (batch["segments"] > 0)
        chosen, rejected = (batch["tokens"][:, :, side][first[:, :, side]] for side in (0, 1))
        assert chosen.tolist() == rejected.tolist()
        seen += chosen.tolist()
    assert sorted(seen) == list(range(1, 41))


def test_unpacked_slots_hold_one_pair():
    pairs = by_hand(A, B, C)
    plan = Plan(pairs.lengths, 64, rows_per_microbatch=2, shuffle=False)
    first, last = batches(plan, pairs, pad_id=0)
    assert first["pairs"].tolist() == [[[True], [True]]]
    assert last["pairs"].tolist() == [[[True], [False]]]
    assert first["tokens"].shape == (1, 2, 2, 64)


def test_the_digest_sees_tokens_and_margins():
    """Reference scores follow from the model, and aren't data."""
    digests = [
        by_hand(A).digest(),
        by_hand(B).digest(),
        by_hand(A, margin=np.float32([1])).digest(),
        by_hand(A, margin=np.float32([2])).digest(),
    ]
    assert len(set(digests)) == 4
    scored = dataclasses.replace(by_hand(A), ref_logps=np.zeros((1, 2), np.float32))
    assert scored.digest() == digests[0]


def test_rows_are_counted():
    same = {"prompt": "a", "chosen": " b", "rejected": " b"}
    cut = {"prompt": "a", "chosen": " b", "rejected": " b" * 200}
    filled = {"prompt": "a " * 200, "chosen": "b", "rejected": "c"}
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    bad = {"prompt": "a", "chosen": " b", "rejected": None}
    pairs = encode_pairs(table(same, cut, filled, good, bad), encoder(), max_bad_rows=1)
    assert len(pairs) == 3
    first, second, third = pairs.report().splitlines()
    assert first.startswith("3 pairs of 5 rows, ")
    assert second == (
        "1 truncated; 1 dropped: too long for max_length; 1 with the same tokens on both sides; "
        "1 bad rows passed over"
    )
    assert third == "d.jsonl:5 rejected: null isn't text"


def test_more_than_half_too_long_is_an_error():
    row = {"prompt": "a", "chosen": " b", "rejected": " b" * 200}
    with pytest.raises(BadData, match="1 of 1 rows have nothing to learn; in 1 of them an answer is longer"):
        encode_pairs(table(row), encoder(encode_reward), too_long="an answer is longer than max_length")


def test_margins_are_kept_for_rewards_and_must_be_all_there():
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = table({**row, "margin": 0.5}, {**row, "margin": 2})
    pairs = encode_pairs(rows, encoder(encode_reward))
    assert pairs.margin.tolist() == [0.5, 2]
    assert pairs.margin.dtype == np.float32
    assert pairs.example(1).margin == 2
    assert encode_pairs(rows, encoder(encode_dpo)).margin is None
    with pytest.raises(BadData, match="d.jsonl:2: no margin, and other rows have one"):
        encode_pairs(table({**row, "margin": 0.5}, row), encoder(encode_reward))


def test_ids_the_model_does_not_have_are_an_error():
    row = {"prompt": "a", "chosen": " b", "rejected": "<|im_end|>"}
    with pytest.raises(BadData, match="d.jsonl:1: token 2 isn't one of the model's 2"):
        encode_pairs(
            table(row),
            PairEncoder(lambda *_, **__: Pair(document(0, 1), document(0, 2)), None, FIELDS),
            vocab_size=2,
        )


def test_unknown_columns_are_missing_input():
    with pytest.raises(InputMissing, match="d.jsonl:1: no column 'chosen', 'rejected'. There is 'text'"):
        encode_pairs(table({"text": "a"}), encoder(), max_bad_rows=10)


def test_formatting_func_may_make_several_pairs_of_a_row():
    def ranked(row):
        first, second, third = row["answers"]
        return [{"prompt": "p", "chosen": first, "rejected": other} for other in (second, third)]

    pairs = encode_pairs(table({"answers": ["a", "b", "c"]}), encoder(formatting_func=ranked))
    assert len(pairs) == 2
    assert pairs.documents.sources.tolist() == [0, 0, 0, 0]


def test_workers_give_the_same():
    rows = table(*[ROWS[name] for name in ROWS] * 30)
    one, two = (encode_pairs(rows, encoder(encode_reward), workers=workers) for workers in (1, 2))
    assert one.digest() == two.digest()
