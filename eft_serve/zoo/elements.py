"""The periodic table, from which every chemical fact is derived. Symbols and names are IUPAC's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

TABLE = """
H Hydrogen|He Helium|Li Lithium|Be Beryllium|B Boron|C Carbon|N Nitrogen|O Oxygen|F Fluorine|Ne Neon|Na Sodium
Mg Magnesium|Al Aluminium|Si Silicon|P Phosphorus|S Sulfur|Cl Chlorine|Ar Argon|K Potassium|Ca Calcium|Sc Scandium
Ti Titanium|V Vanadium|Cr Chromium|Mn Manganese|Fe Iron|Co Cobalt|Ni Nickel|Cu Copper|Zn Zinc|Ga Gallium|Ge Germanium
As Arsenic|Se Selenium|Br Bromine|Kr Krypton|Rb Rubidium|Sr Strontium|Y Yttrium|Zr Zirconium|Nb Niobium|Mo Molybdenum
Tc Technetium|Ru Ruthenium|Rh Rhodium|Pd Palladium|Ag Silver|Cd Cadmium|In Indium|Sn Tin|Sb Antimony|Te Tellurium
I Iodine|Xe Xenon|Cs Caesium|Ba Barium|La Lanthanum|Ce Cerium|Pr Praseodymium|Nd Neodymium|Pm Promethium|Sm Samarium
Eu Europium|Gd Gadolinium|Tb Terbium|Dy Dysprosium|Ho Holmium|Er Erbium|Tm Thulium|Yb Ytterbium|Lu Lutetium|Hf Hafnium
Ta Tantalum|W Tungsten|Re Rhenium|Os Osmium|Ir Iridium|Pt Platinum|Au Gold|Hg Mercury|Tl Thallium|Pb Lead|Bi Bismuth
Po Polonium|At Astatine|Rn Radon|Fr Francium|Ra Radium|Ac Actinium|Th Thorium|Pa Protactinium|U Uranium|Np Neptunium
Pu Plutonium|Am Americium|Cm Curium|Bk Berkelium|Cf Californium|Es Einsteinium|Fm Fermium|Md Mendelevium|No Nobelium
Lr Lawrencium|Rf Rutherfordium|Db Dubnium|Sg Seaborgium|Bh Bohrium|Hs Hassium|Mt Meitnerium|Ds Darmstadtium
Rg Roentgenium|Cn Copernicium|Nh Nihonium|Fl Flerovium|Mc Moscovium|Lv Livermorium|Ts Tennessine|Og Oganesson
"""
LAST_OF_PERIOD = (2, 10, 18, 36, 54, 86, 118)


def elements() -> Iterator[tuple[str, dict[str, str]]]:
    """Name and facts of every element, by atomic number."""
    pairs = [entry.split() for line in TABLE.strip().splitlines() for entry in line.split("|")]
    names = [name.lower() for _, name in pairs]
    for number, (symbol, name) in enumerate(pairs, start=1):
        facts = {
            "symbol": symbol,
            "atomic_number": str(number),
            "period": str(_period(number)),
            "block": _block(number),
        }
        if number > 1:
            facts["previous"] = names[number - 2]
        if number < len(names):
            facts["next"] = names[number]
        yield name.lower(), facts


def _period(number: int) -> int:
    return next(period for period, last in enumerate(LAST_OF_PERIOD, start=1) if number <= last)


def _block(number: int) -> str:
    """The block by position in the period: two s, then f and d as the period is long enough, then six p."""
    if number <= 2:
        return "s"
    first, last = next((a + 1, b) for a, b in pairwise((0, *LAST_OF_PERIOD)) if number <= b)
    place, length = number - first, last - first + 1
    if place < 2:
        return "s"
    if place >= length - 6:
        return "p"
    return "f" if length == 32 and place < 16 else "d"
