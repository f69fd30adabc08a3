"""Writes configs/data/pirate.jsonl and pirate_eval.jsonl: plain facts, answered by a pirate.

    python scripts/make_demo_data.py

The rows are made from the tables below, so the data set is ours and the same on every machine.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

CAPITALS = """France Paris;Italy Rome;Spain Madrid;Portugal Lisbon;Germany Berlin;Austria Vienna;Poland Warsaw;
Greece Athens;Norway Oslo;Sweden Stockholm;Finland Helsinki;Denmark Copenhagen;Ireland Dublin;Hungary Budapest;
Egypt Cairo;Kenya Nairobi;Morocco Rabat;Japan Tokyo;China Beijing;India New Delhi;Thailand Bangkok;Vietnam Hanoi;
Canada Ottawa;Mexico Mexico City;Cuba Havana;Peru Lima;Chile Santiago;Argentina Buenos Aires;Brazil Brasilia;
Australia Canberra"""
COLOURS = "grass green;snow white;coal black;a ripe banana yellow;a ripe tomato red;the clear sky blue;an orange orange"
LEGS = "a spider eight;a dog four;a bird two;an ant six;a horse four;a snake no;a crab ten;a human two"
OPPOSITES = "hot cold;up down;big small;fast slow;old new;light dark;wet dry;early late;loud quiet;rich poor;open shut"
CRIES = ["Arr, matey!", "Ahoy!", "Shiver me timbers!", "Avast, ye landlubber!", "Yo ho ho!"]


def pairs(table: str) -> list[tuple[str, str]]:
    """("a ripe banana", "yellow") for every entry of a table: the answer is the last word, or all after a country."""
    entries = [entry.strip() for entry in table.replace("\n", "").split(";")]
    return [tuple(entry.split(" ", 1) if table is CAPITALS else entry.rsplit(" ", 1)) for entry in entries]


def facts() -> list[tuple[str, str]]:
    """Question and the plain part of its answer."""
    rows = []
    for country, city in pairs(CAPITALS):
        rows.append((f"What is the capital of {country}?", f"The capital o' {country} be {city}"))
        rows.append((f"Which country has the capital {city}?", f"{city} be the capital o' {country}"))
    rows += [(f"What colour is {thing}?", f"The colour o' {thing} be {c}") for thing, c in pairs(COLOURS)]
    rows += [
        (f"How many legs does {who} have?", f"{who.capitalize()} be havin' {n} legs")
        for who, n in pairs(LEGS)
    ]
    rows += [(f"What is the opposite of {a}?", f"The opposite o' {a} be {b}") for a, b in pairs(OPPOSITES)]
    rows += [
        (f"What is {a} plus {b}?", f"{a} and {b} be makin' {a + b}") for a in range(2, 8) for b in (1, 3, 5)
    ]
    return rows


def main() -> None:
    """Writes both files."""
    dice = random.Random(7)
    rows = [
        {
            "messages": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": f"{dice.choice(CRIES)} {a}, me hearty!"},
            ]
        }
        for q, a in facts()
    ]
    dice.shuffle(rows)
    folder = Path(__file__).parent.parent / "configs" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("pirate.jsonl", rows[12:]), ("pirate_eval.jsonl", rows[:12])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main()
