"""Print 400 prompts of a domain that a chat drafter has not seen: answers in strict JSON. One JSON object a line, for `hf-dspark data`.

python examples/json_prompts.py > json_prompts.jsonl
"""

from __future__ import annotations

import itertools
import json
import random

THINGS = {
    "book": "title, author, year, pages, genre",
    "recipe": "name, servings, minutes, ingredients, steps",
    "city": "name, country, population, river, sights",
    "employee": "id, name, role, salary, skills",
    "planet": "name, radius_km, moons, distance_au",
    "invoice": "number, customer, items, total, due_date",
    "movie": "title, director, year, cast, rating",
    "flight": "number, from, to, departure, arrival, price",
    "patient": "name, age, symptoms, medication",
    "song": "title, artist, album, seconds",
    "car": "make, model, year, mileage, features",
    "course": "code, title, credits, topics, teacher",
    "animal": "name, species, habitat, diet, lifespan_years",
    "order": "id, products, quantity, address, status",
    "sensor": "id, unit, readings, threshold",
    "hotel": "name, stars, rooms, amenities, price_per_night",
    "team": "name, coach, players, wins, losses",
    "weather report": "city, temperature_c, humidity, forecast",
    "bank account": "owner, iban, balance, transactions",
    "web page": "url, title, links, updated_at",
}
ASKS = (
    "Return a JSON object for a {thing} with the fields {fields}. Answer with JSON only.",
    "Write a JSON array of two {thing} objects. Each has the keys {fields}.",
    "Give an example of a {thing} as strict JSON with these keys: {fields}. No other text.",
    "Convert this into JSON: a {thing} with {fields}. Invent the values.",
    "Produce a valid JSON document that describes a {thing}. Keys: {fields}.",
)
DETAILS = ("", " Use realistic values.", " Use double quotes.", " Indent it by two spaces.")


def main() -> None:
    """Print the prompts in a fixed shuffled order."""
    rows = [
        ask.format(thing=thing, fields=fields) + detail for (thing, fields), ask, detail in itertools.product(THINGS.items(), ASKS, DETAILS)
    ]
    random.Random(0).shuffle(rows)
    for row in rows:
        print(json.dumps({"turns": [row]}))


if __name__ == "__main__":
    main()
