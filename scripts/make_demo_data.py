"""Writes configs/data/*.jsonl, all of it made from the tables below: ours, and the same on every machine.

    python scripts/make_demo_data.py

pirate, pirate_eval: plain facts as conversations, answered by a pirate. sft: the same facts as prompt and
response. preferences: a prompt with a polite, short answer (chosen) and a rude or rambling one (rejected).
text: paragraphs on towns that don't exist. sums, sums_eval: sums and differences of one digit, as a conversation that
waits for its answer, and the answer in a column of its own, for a reward. shapes, shape_pairs, shape_prompts: drawings
in shapes/ and what they show, as LLaVA's conversations, as preferences and as questions with the answer in a column of
its own; shapes/tower.json is a small vision tower for them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent.parent / "configs" / "data"

CAPITALS = """France Paris;Italy Rome;Spain Madrid;Portugal Lisbon;Germany Berlin;Austria Vienna;Poland Warsaw;
Greece Athens;Norway Oslo;Sweden Stockholm;Finland Helsinki;Denmark Copenhagen;Ireland Dublin;Hungary Budapest;
Egypt Cairo;Kenya Nairobi;Morocco Rabat;Japan Tokyo;China Beijing;India New Delhi;Thailand Bangkok;Vietnam Hanoi;
Canada Ottawa;Mexico Mexico City;Cuba Havana;Peru Lima;Chile Santiago;Argentina Buenos Aires;Brazil Brasilia;
Australia Canberra"""
COLOURS = "grass green;snow white;coal black;a ripe banana yellow;a ripe tomato red;the clear sky blue;an orange orange"
LEGS = "a spider eight;a dog four;a bird two;an ant six;a horse four;a snake no;a crab ten;a human two"
OPPOSITES = "hot cold;up down;big small;fast slow;old new;light dark;wet dry;early late;loud quiet;rich poor;open shut"

CRIES = ["Arr, matey!", "Ahoy!", "Shiver me timbers!", "Avast, ye landlubber!", "Yo ho ho!"]
PIRATE = {" of ": " o' ", " is ": " be ", " has ": " be havin' ", " make ": " be makin' "}

THANKS = ["Good question.", "With pleasure.", "Happy to help.", "Of course."]
INSULTS = ["What a stupid thing to ask.", "Look it up yourself.", "Who cares?", "You really don't know that?"]
RAMBLES = [
    "Well, that depends on what you mean, and people have asked this for a long time, and one could say many things",
    "Before I answer, let me tell you about my weekend, which was long, and then there was the matter of the cat",
    "It is hard to say where to begin, so I will begin somewhere else, as one does, and then come back, or not",
]

PAINTS = ("red", "green", "blue", "orange", "purple", "black")
OUTLINES = {
    "square": ("rectangle", (12, 12, 36, 36)),
    "circle": ("ellipse", (10, 10, 38, 38)),
    "triangle": ("polygon", (24, 8, 40, 40, 8, 40)),
    "bar": ("rectangle", (4, 20, 44, 28)),
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 12,
}
TOWNS = [
    "Arlen",
    "Birkholm",
    "Corvane",
    "Dunmere",
    "Eskby",
    "Farrow",
    "Galtern",
    "Hollin",
    "Istmar",
    "Jorund",
]
RIVERS = ["Aure", "Belwin", "Carse", "Dorrow", "Elm"]
TRADES = [
    "boat builders",
    "glass blowers",
    "paper makers",
    "weavers",
    "bell founders",
    "bakers",
    "clock makers",
]
SIGHTS = [
    "a stone bridge",
    "an old lighthouse",
    "a round market hall",
    "a school with a green roof",
    "a mill",
]
SEASONS = ["spring", "summer", "autumn", "winter"]
SENTENCES = """{town} lies on the river {river}, half a day on foot from the sea.
Most of its people are {trade}, and their children usually learn the same work.
In the middle of the town stands {sight}, and everybody gives directions from there.
Visitors come in {season}, when the days are mild and the inns are cheap.
On market days the square fills before sunrise, and by noon the best things are gone.
The river {river} has flooded {count} times since anyone began to write it down.
After the last flood the {trade} rebuilt the lower streets on a bank of gravel.
There is a song about {town} that has {count} verses, but few can sing more than two.
A ferry crosses the {river} every hour, and in {season} it carries sheep as well.
The library owns {count} books on fishing and a single one on mountains.
Old people tell of a stranger who paid for {sight} and never came back to see it.
Nobody agrees who founded {town}, and each family of {trade} has its own story.
When the wind turns north, the smell of the sea reaches the town in the evening.
The road to {other} is {count} miles long and has more bends than that.
Between {town} and {other} there is an old quarrel about the price of wool.
Every {season} {town} and {other} meet for a race on the {river}, and the losers cook supper.
The school teaches reading, counting, swimming and the names of the winds.
A baker near {sight} sells bread with nuts in it, and the queue starts early.
At night {count} lamps are lit along the water, and a guard walks past each of them.
It is a quiet place, and those who leave it tend to write long letters home.""".splitlines()


def pairs(table: str) -> list[tuple[str, str]]:
    """("a ripe banana", "yellow") for every entry of a table: the answer is the last word, or all after a country."""
    entries = [entry.strip() for entry in table.replace("\n", "").split(";")]
    return [tuple(entry.split(" ", 1) if table is CAPITALS else entry.rsplit(" ", 1)) for entry in entries]


def facts() -> list[tuple[str, str]]:
    """Questions, and their answers without a full stop."""
    rows = []
    for country, city in pairs(CAPITALS):
        rows.append((f"What is the capital of {country}?", f"The capital of {country} is {city}"))
        rows.append((f"Which country has the capital {city}?", f"{city} is the capital of {country}"))
    rows += [(f"What colour is {thing}?", f"The colour of {thing} is {c}") for thing, c in pairs(COLOURS)]
    rows += [
        (f"How many legs does {who} have?", f"{who.capitalize()} has {n} legs") for who, n in pairs(LEGS)
    ]
    rows += [(f"What is the opposite of {a}?", f"The opposite of {a} is {b}") for a, b in pairs(OPPOSITES)]
    rows += [(f"What is {a} plus {b}?", f"{a} and {b} make {a + b}") for a in range(2, 8) for b in (1, 3, 5)]
    return rows


def pirate_rows(dice: random.Random) -> list[dict]:
    """A question and a pirate's answer, as messages."""
    rows = []
    for question, answer in facts():
        for plain, said in PIRATE.items():
            answer = answer.replace(plain, said)
        answer = f"{dice.choice(CRIES)} {answer}, me hearty!"
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
    dice.shuffle(rows)
    return rows


def sft_rows(dice: random.Random) -> list[dict]:
    """A prompt that ends where the answer begins, and the answer."""
    chosen = dice.sample(facts(), 48)
    return [{"prompt": f"Question: {q}\nAnswer:", "response": f" {a}."} for q, a in chosen]


def preference_rows(dice: random.Random) -> list[dict]:
    """The same with a polite answer, and one that is rude or doesn't come to the point."""
    rows = []
    for question, answer in dice.sample(facts(), 48):
        rude = f" {dice.choice(INSULTS)} {answer}, obviously."
        rambling = f" {dice.choice(RAMBLES)}, and so on. {answer}, I suppose."
        rows.append(
            {
                "prompt": f"Question: {question}\nAnswer:",
                "chosen": f" {dice.choice(THANKS)} {answer}.",
                "rejected": dice.choice([rude, rambling]),
            }
        )
    return rows


def text_rows(dice: random.Random) -> list[dict]:
    """Paragraphs of 40 to 200 words."""
    rows = []
    for number in range(40):
        town, other = dice.sample(TOWNS, 2)
        words = {"town": town, "other": other, "river": dice.choice(RIVERS), "season": dice.choice(SEASONS)}
        words |= {"trade": dice.choice(TRADES), "sight": dice.choice(SIGHTS)}
        told = sorted(dice.sample(range(1, len(SENTENCES)), 3 + number % 9))
        lines = [SENTENCES[line].format(**words, count=dice.randint(3, 90)) for line in [0, *told]]
        rows.append({"text": " ".join(lines)})
    return rows


def sum_rows(dice: random.Random) -> list[dict]:
    """Every sum and every difference of two digits that isn't negative."""
    rows = []
    for a in range(10):
        for b in range(10):
            rows.append((f"What is {a} + {b}?", a + b))
            if a >= b:
                rows.append((f"What is {a} - {b}?", a - b))
    dice.shuffle(rows)
    return [{"prompt": [{"role": "user", "content": asked}], "answer": str(answer)} for asked, answer in rows]


def shape_rows() -> list[tuple[str, str, str]]:
    """Draws every shape in every colour: (file, colour, shape)."""
    (FOLDER / "shapes").mkdir(exist_ok=True)
    rows = []
    for number, (colour, shape) in enumerate(itertools.product(PAINTS, OUTLINES)):
        image = Image.new("RGB", (48 + 8 * (number % 3), 48 + 8 * (number % 2)), "white")
        draw = ImageDraw.Draw(image)
        getattr(draw, OUTLINES[shape][0])(OUTLINES[shape][1], fill=colour)
        name = f"shapes/{colour}_{shape}.png"
        image.save(FOLDER / name, optimize=True)
        rows.append((name, colour, shape))
    return rows


def shape_data(rows: list[tuple[str, str, str]]) -> dict[str, list[dict]]:
    """The same drawings for three kinds of stage."""
    found: dict[str, list[dict]] = {"shapes": [], "shape_pairs": [], "shape_prompts": []}
    for number, (name, colour, shape) in enumerate(rows):
        right, wrong = (
            f"A {colour} {shape}.",
            f"A {PAINTS[(number // len(OUTLINES) + 1) % len(PAINTS)]} {shape}.",
        )
        asked = {"from": "human", "value": "<image>\nWhat is this?"}
        found["shapes"].append({"image": name, "conversations": [asked, {"from": "gpt", "value": right}]})
        question = [{"role": "user", "content": "<image>\nWhat is this?"}]
        answers = {
            side: [{"role": "assistant", "content": text}]
            for side, text in (("chosen", right), ("rejected", wrong))
        }
        found["shape_pairs"].append({"image": name, "prompt": question, **answers})
        found["shape_prompts"].append({"image": name, "prompt": question, "answer": right})
    two = [f"<image> and <image>: which is {rows[0][1]}?", "The first."]
    turns = [{"from": "human", "value": two[0]}, {"from": "gpt", "value": two[1]}]
    found["shapes"].append({"image": [rows[0][0], rows[-1][0]], "conversations": turns})
    turns = [{"from": "human", "value": "How many sides has a triangle?"}, {"from": "gpt", "value": "Three."}]
    found["shapes"].append({"conversations": turns})
    return found


def write(name: str, rows: Iterable[dict]) -> None:
    """One row a line."""
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Writes all files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pirates = pirate_rows(random.Random(7))
    write("pirate.jsonl", pirates[12:])
    write("pirate_eval.jsonl", pirates[:12])
    write("sft.jsonl", sft_rows(random.Random(8)))
    write("preferences.jsonl", preference_rows(random.Random(9)))
    write("text.jsonl", text_rows(random.Random(10)))
    sums = sum_rows(random.Random(11))
    write("sums.jsonl", sums[48:])
    write("sums_eval.jsonl", sums[:48])
    for name, rows in shape_data(shape_rows()).items():
        write(f"{name}.jsonl", rows)
    (FOLDER / "shapes" / "tower.json").write_text(json.dumps(TOWER, indent=2) + "\n")


if __name__ == "__main__":
    main()
