"""What would spoil a training run and can be seen in its data: the checks of `ntjax.inspect`.

A complaint is a BadData with the row, what is wrong with it and one thing to do; a note is what may be meant so.
All examples are looked at where their arrays are enough; where conversations have to be rendered, the first `RENDERED`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ntjax.config import DatasetConfig
from ntjax.data.chat import Message, canonical
from ntjax.data.encoded import Encoded
from ntjax.data.files import Row, Rows
from ntjax.data.pairs import EncodedPairs
from ntjax.data.placeholders import Placing, takes_lists
from ntjax.data.preference import preference, split_prompt
from ntjax.data.prompts import Prompts
from ntjax.data.spans import marks_assistant, rendered
from ntjax.errors import BadData
from ntjax.stages.base import StageConfig

RENDERED = 100
MARK = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_turn>")
ANSWER = "ANSWER"


@dataclass(frozen=True)
class Inspected:
    """A stage's examples, and what they were made of and with; `stops` end a completion."""

    stage: StageConfig
    dataset: DatasetConfig
    rows: Rows
    examples: Encoded | EncodedPairs | Prompts
    tokenizer: Any
    stops: frozenset[int]
    vision: Any = None

    @property
    def documents(self) -> Encoded | None:
        """All documents: of pairs, chosen and rejected in turn. None of prompts, which nothing is learned of."""
        if isinstance(self.examples, EncodedPairs):
            return self.examples.documents
        return self.examples if isinstance(self.examples, Encoded) else None

    @property
    def paired(self) -> bool:
        """Whether an example is a pair of documents."""
        return isinstance(self.examples, EncodedPairs)

    def source(self, example: int) -> int | None:
        """The row that an example was made of, where that is known."""
        if self.documents is not None:
            return int(self.documents.sources[example * (2 if self.paired else 1)])
        found = self.examples
        assert isinstance(found, Prompts)
        known = not found.dropped and not found.bad and self.dataset.formatting_func is None
        return example if known else None

    def where(self, example: int) -> str:
        """The place of that row."""
        source = self.source(example)
        return f"example {example + 1}" if source is None else self.rows.where(source)

    @property
    def chats(self) -> bool:
        """Whether the first row is a conversation, and the chat template has a part in it."""
        row = self.rows[0]
        return self.tokenizer.chat_template is not None and (
            "instruction" in row or any(map(_turns, row.values()))
        )


def complaints(seen: Inspected) -> Iterator[BadData]:
    """What must not be trained on as it is."""
    foreign = list(marks_in_pieces(seen)) if seen.chats else []
    yield from foreign
    if seen.documents is not None:
        yield from () if foreign else never_stops(seen, seen.documents)
        yield from learns_nothing(seen, seen.documents)
    yield from begins_twice(seen)
    if seen.chats:
        yield from prompts_learned(seen)


def notes(seen: Inspected) -> Iterator[str]:
    """What is worth knowing."""
    tokenizer = seen.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield (
            f"{tokenizer.pad_token!r} ends and pads: here padding is masked by its place, so ends are learned; "
            "trainers that mask it by its id would not learn them"
        )
    if seen.chats:
        yield from _other_marks(seen)
    if seen.documents is not None and not seen.stage.scores:
        yield from _empty_answers(seen, seen.documents)


def never_stops(seen: Inspected, documents: Encoded) -> Iterator[BadData]:
    """No end is learned in any whole document: of pairs, of those that were chosen."""
    if not seen.stage.learns_to_stop:
        return
    answers = np.arange(len(documents)) % 2 == 0 if seen.paired else np.ones(len(documents), bool)
    whole = answers & ~documents.truncated
    where = seen.where(0)
    if not whole.any():
        message = f"all {answers.sum()} answers are cut off: a model trained on them never learns to stop"
        yield BadData(message, where=where, fix=f"raise max_length, which is {seen.stage.row_length}")
        return
    learned = documents.tokens[documents.mask & np.repeat(whole, documents.lengths)]
    if np.isin(learned, list(seen.stops | set(seen.tokenizer.all_special_ids))).any():
        return
    if seen.chats and marks_assistant(seen.tokenizer, {}):
        fix = "put the token that ends a turn inside {% generation %} in the chat template"
    else:
        fix = f"let the chat template end the assistant's turn with {seen.tokenizer.eos_token}"
    message = (
        f"no end token is learned in any of {whole.sum()} whole rows: a model trained on them never stops"
    )
    yield BadData(message, where=where, fix=fix)


def learns_nothing(seen: Inspected, documents: Encoded) -> Iterator[BadData]:
    """Nothing is learned but ends and white space, or both sides of all pairs are the same."""
    if seen.paired:
        pairs = [documents.example(i).tokens for i in range(len(documents))]
        if all(np.array_equal(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)):
            message = (
                f"chosen and rejected are the same tokens in all {len(pairs) // 2} pairs: nothing is learned"
            )
            yield BadData(
                message, where=seen.where(0), fix="look at chosen_field and rejected_field, and max_length"
            )
    if not seen.stage.scores and not _said(seen, documents).any():
        message = "nothing is learned but ends of turns: all answers are empty"
        yield BadData(message, where=seen.where(0), fix="look at response_field, or at the data")


def begins_twice(seen: Inspected) -> Iterator[BadData]:
    """Text that begins with the token that the tokenizer puts before it."""
    begin = seen.tokenizer.bos_token_id
    if begin is None:
        return
    for index in range(len(seen.examples)):
        for document in seen.examples.example(index).documents:
            if document.tokens[:2].tolist() == [begin, begin]:
                name = seen.tokenizer.bos_token
                message = f"the row begins with {name} twice: the text has it, and the tokenizer adds it"
                yield BadData(message, where=seen.where(index), fix=f"take {name} out of the text")
                return


def marks_in_pieces(seen: Inspected) -> Iterator[BadData]:
    """A chat template that ends turns with a mark which isn't a token: it is of another model.

    Other marks may well be in pieces: Zephyr's and Tulu's models were trained so.
    """
    text = _probe(seen)
    end = text.rpartition(ANSWER)[2].strip()
    vocabulary = seen.tokenizer.get_vocab()
    if not MARK.fullmatch(end) or end in vocabulary:
        return
    broken = [mark for mark in dict.fromkeys(MARK.findall(text)) if mark not in vocabulary]
    counted = ", ".join(f"{mark} ({_pieces(seen, mark)} tokens)" for mark in broken)
    message = f"the chat template is of another model: its marks are no tokens of this one: {counted}"
    fix = "start from the instruct model whose template it is, or take this model's own template"
    yield BadData(message, where=seen.where(0), fix=fix)


def prompts_learned(seen: Inspected) -> Iterator[BadData]:
    """A chat template that shows a prompt otherwise once an answer follows, so that the answer begins too early."""
    if seen.stage.scores or seen.stage.rolls_out or marks_assistant(seen.tokenizer, {}):
        return
    placing = Placing.of(seen.vision, seen.tokenizer, seen.dataset)
    for index in range(min(RENDERED, len(seen.examples))):
        source = seen.source(index)
        if source is None or seen.dataset.formatting_func is not None:
            return
        row, where = seen.rows[source], seen.rows.where(source)
        for turns, answers, options in _conversations(seen, row, where, placing):
            for k in answers:
                if complaint := _broken(seen, turns, k, options, where):
                    yield complaint
                    return


def _conversations(
    seen: Inspected, row: Row, where: str, placing: Placing
) -> Iterator[tuple[list[Message], list[int], Mapping[str, Any]]]:
    """The conversation of a row, which of its turns are learned, and what it passes to the chat template."""
    if seen.paired:
        shaped = split_prompt(preference(row, seen.dataset, where, placing), where)
        prompt, answer = shaped["prompt"], shaped["chosen"]
    else:
        shaped = canonical(row, seen.dataset, where, chat=True, placing=placing)
        prompt, answer = shaped.get("prompt", []), shaped.get("completion") or shaped.get("messages")
    if not isinstance(answer, list) or not isinstance(prompt, list):
        return
    turns = [*prompt, *answer]
    answers = [k for k, turn in enumerate(turns) if k >= max(len(prompt), 1) and turn["role"] == "assistant"]
    yield turns, answers, {"tools": shaped.get("tools"), **shaped.get("chat_template_kwargs", {})}


def _broken(
    seen: Inspected, turns: Sequence[Message], k: int, options: Mapping[str, Any], where: str
) -> BadData | None:
    """The complaint if what `turns[:k]` shows isn't there any more when turn k follows."""
    text = rendered(seen.tokenizer, turns, options, where)
    whole = rendered(seen.tokenizer, turns[: k + 1], options, where)
    content = turns[k - 1].get("content")
    if not text.startswith(whole) or not isinstance(content, str):
        return None  # then turns are found by marks: see `data.spans`
    asked = rendered(seen.tokenizer, turns[:k], options, where, ask=True)
    begun = len(os.path.commonprefix([asked, whole]))
    if begun >= asked.rfind(content.strip()) + len(content.strip()):
        return None
    before, after = (one[max(0, begun - 20) : begun + 20] for one in (asked, whole))
    message = (
        f"the chat template shows the prompt otherwise once turn {k} follows, so the prompt is learned too: "
    )
    fix = "mark the assistant's text with {% generation %} in the template, or correct it"
    return BadData(f"{message}{before!r} becomes {after!r}", where=where, fix=fix)


def _other_marks(seen: Inspected) -> Iterator[str]:
    """Marks of the template that are no tokens, and an end of turn that ends no completion."""
    text = _probe(seen)
    vocabulary, end = seen.tokenizer.get_vocab(), text.rpartition(ANSWER)[2].strip()
    broken = [m for m in dict.fromkeys(MARK.findall(text)) if m not in vocabulary]
    if broken and end in vocabulary:
        counted = ", ".join(f"{mark} ({_pieces(seen, mark)} tokens)" for mark in broken)
        yield f"marks of the chat template that are no tokens: {counted}; right only if the model was trained so"
    if end in vocabulary and vocabulary[end] not in seen.stops:
        names = ", ".join(map(repr, seen.tokenizer.convert_ids_to_tokens(sorted(seen.stops))))
        yield (
            f"turns end with {end!r}, but completions only at {names}: name {end!r} as eos_token in "
            "tokenizer_config.json, or add its id to eos_token_id in generation_config.json"
        )


def _empty_answers(seen: Inspected, documents: Encoded) -> Iterator[str]:
    empty = np.flatnonzero(~_said(seen, documents))
    if len(empty):
        example = int(empty[0]) // (2 if seen.paired else 1)
        yield f"{len(empty)} answers are empty, and only ends are learned there; the first is {seen.where(example)}"


def _said(seen: Inspected, documents: Encoded) -> np.ndarray:
    """[documents] bool: whether anything but ends and white space is learned."""
    learned = np.unique(documents.tokens[documents.mask])
    ends = seen.stops | set(seen.tokenizer.all_special_ids)
    blank = [i for i in learned.tolist() if i in ends or not seen.tokenizer.decode([i]).strip()]
    content = documents.mask & ~np.isin(documents.tokens, blank)
    return np.logical_or.reduceat(content, documents.offsets[:-1])


def _probe(seen: Inspected) -> str:
    """A question and an answer as the chat template shows them; "" where it refuses them."""
    lists = takes_lists(seen.tokenizer)
    turns = [
        {"role": role, "content": [{"type": "text", "text": said}] if lists else said}
        for role, said in (("user", "hey"), ("assistant", ANSWER))
    ]
    try:
        return rendered(seen.tokenizer, turns, {}, seen.where(0))
    except BadData:  # rows may have what it asks for
        return ""


def _pieces(seen: Inspected, mark: str) -> int:
    return len(seen.tokenizer(mark, add_special_tokens=False)["input_ids"])


def _turns(value: Any) -> bool:
    """Whether a column holds messages."""
    first = next(islice(value, 1), None) if isinstance(value, list) else None
    return isinstance(first, Mapping) and bool({"role", "from"} & set(first))
