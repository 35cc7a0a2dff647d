"""Units of measure after a number: two answers that name different ones are different."""

import re
from collections import Counter

SPELT = (  # one unit a line of words; plurals in -s and -es are read too
    "m meter metre",
    "cm centimeter centimetre",
    "mm millimeter millimetre",
    "km kilometer kilometre",
    "inch in",
    "foot ft feet",
    "yard yd",
    "mile mi",
    "g gram",
    "kg kilogram",
    "mg milligram",
    "pound lb",
    "ounce oz",
    "ton",
    "s second sec",
    "ms millisecond",
    "minute min",
    "hour hr h",
    "day",
    "week",
    "month",
    "year yr",
    "l liter litre",
    "ml milliliter millilitre",
    "gallon gal",
    "degree deg",
    "radian rad",
    "dollar",
    "cent",
    "am",
    "pm",
)
MEASURES = {word: line.split()[0] for line in SPELT for word in line.split()}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
TOKEN = re.compile(r"(?<!['\u2019a-z])(?!in\s+[a-z])[a-z]+|\^\s*\{?\s*-?\d+|/")  # "in" before a word is no inch


def measures(text: str) -> dict[str, int]:
    """{unit: power} of the units named in "cm^2", "square inches", "\\text{ m}/\\text{s}"; other words do not count."""
    text = re.sub(r"\\[a-z]+|\.", "", text.lower().replace("mph", "mile/hour"))
    found, last, power, sign = Counter(), None, 1, 1
    for token in TOKEN.findall(text):
        name = next((MEASURES[x] for x in (token, token[:-1], token[:-2]) if x in MEASURES), None)
        if token in ("/", "per"):
            sign = -1
        elif token[0] == "^" or token in ("squared", "cubed"):
            found[last] *= POWERS.get(token) or int(token.strip("^{ \t\n"))
        elif token in POWERS:
            power = POWERS[token]
        else:
            found[name] += sign * power
            last, power = name, 1
    return {name: power for name, power in found.items() if name and power}
