"""Is one LaTeX answer the same as another?  Runs in the grader's process (see worker.py).

Math-Verify reads and compares expressions.  Before it, texts are freed of what is only style, and lists, tuples,
matrices, bases, percent and moduli are taken apart, which it drops or takes for something else.  After it, an exact
look refuses what only its tolerance held equal.
"""

import re
from functools import lru_cache
from itertools import chain

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Expr, Float, N, Rational
from units import MEASURES, measures

# Units are taken off here: those of Math-Verify hold "ab", "t" and "h", which are variables as well.
READ = LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="all"))
STYLE = re.compile(
    r"(?<=([\^_]))?\\(?:math(?:bf|rm|it|sf|tt|normal)|boldsymbol|bm|pmb|text(?:bf|it|rm|sf|tt|normal)?|[mh]box|emph"
    r"|underline|ensuremath|boxed|fbox|operatorname\*?|(?:text)?color\s*\{[^{}]*\})\s*\{"
)
DEGREE = r"(?:\u00b0|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z]))"
SPELLINGS = [  # one for many
    (r"[\u2212\u2013]", "-"),
    (r"[\u00a0\u2002-\u200a\u202f]", r"\\,"),
    (r"\\(?:mathrm|textrm|textnormal|[mh]box)\s*\{", r"\\text{"),
    (r"\\(?:(?:bf|rm|it|sf|tt)(?:series|family)?|(?:display|text)style|left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", " "),
    (r"\\color\s*\{[^{}]*\}(?!\s*\{)|\\[vh]?phantom\s*\{[^{}]*\}", " "),
    (r"\\varnothing|\u2205|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\[lc]?dots[cbmio]?(?![A-Za-z])|\.\.\.|\u2026", r"\\ldots "),
    (r"\\\$|\$|\\pounds|[\u20ac\u00a3\u00a5]|(?<!\\)\\[()\[\]]", ""),
    (DEGREE + r"(?=[\s.]*$)", r"\\text{ degrees}"),
    (DEGREE, " "),
    (r"\\text\{\s*(?:\\?%|percent(?:age)?)\s*\}|\bpercent(?:age)?\b|\uff05|(?<!\\)%", r"\\%"),
]
SPELLINGS = [(re.compile(pattern), new) for pattern, new in SPELLINGS]
WORDS = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z][A-Za-z0-9 ,.'-]*")  # a text, not a number or a variable in \text
SAID = re.compile(r"(?=.*[A-Za-z]{2})(?:[A-Za-z0-9 ,.'()]|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2}))+")
TEXT = re.compile(r"\\text\{([^{}]*)\}")
GROUPED = [  # digits by three
    re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\\!|(?<!\\)\\[,;:! ]|~)\s*\d{3})+(?!\d)"),
    re.compile(r"(?<![\d.,([{])(?<![\d,]\s)\d{1,3}(?:,\d{3})+(?!,?\d)(?![^(\[]*[)\]])"),  # but no coordinates
    re.compile(r"^[+-]?\d{1,3}(?: \d{3})+(?![ \d])"),
]
SPACE = re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])")
LABEL = re.compile(r"(?:(?:\\text\{)?\s*(?:the )?(?:final )?answer(?: is)?\s*:?\s*\}?\s*[:=]?|=|\\therefore)\s*", re.I)
GAP = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
MEASURE = r"(?:(?:square|cubic|sq|cu)\.?\s+)?(?:" + "|".join(MEASURES) + r")(?:e?s)?\b"
UNIT = re.compile(
    r"(?:(?<=[\d)}])|(?<=[A-Za-z])(?=[\s~\\,;:]*\\text\{\s*" + MEASURE + "))"  # n is odd is no unit after a letter
    r"(?:(?:\s|~|\\[,;: ])*(?:\\cdot|\\times|/)?\s*\\text\{\s*"
    r"(?![ije]\}|(?:and|or)\W|[^{}]*\b(?:base|mod)\b)[^{}\d]*\}(?:\^(?:\{-?\d+\}|\d))?)+\s*$"
)
BARE_UNIT = re.compile(
    r"^([+-]?[\d.,]+(?:/\d+)?)(?:\s*(?:[cmkn]m|[km]g|ft|mi|hrs?|mins?|secs?|lbs?|mph|m[lL]|[ap]m)"
    r"|(?:\s+(?!(?:and|or|mod|base)\b)(?:(?=\w*[aeiouy])[a-z]{3,}|sq|cu)\b)+)(?:\^\{?\d\}?)?$"
)
MODULUS = re.compile(
    r"\s*(?:\\pmod\s*\{?([^{}\s]+)\}?|\(?\s*(?:\\?mod(?![A-Za-z])|\\text\{\s*\(?mod\s*\})\s*\{?(\w+)\}?\s*\)?)$"
)
NUMERAL = re.compile(
    r"\(?(\w+)\)?\s*(?:_\s*\{?|(?:\\text\{)?\s*\(?\s*(?:in )?(?=base))\s*(?:\\text\{)?\s*(?:base)?\s*\}?\s*(\w+)[\s})]*"
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BASES = {name: str(i) for i, name in enumerate(NUMBERS, 2)}
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*\s*(?:\([^()=]*\))?|\([a-z](?:,\s*[a-z])+\)")
EQUALS = re.compile(r"(?<![<>!\\:])=|\\in(?![A-Za-z])")
AND = re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)
BRACKETS = re.compile(r"\\?[{}]|[()\[\]]|\\begin(?=\{)|\\end(?=\{)|\\\\|,")
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXACT, DECIMAL, ROUNDED = 1e-25, 1e-14, 1e-5  # relative: exact values, two decimals, a decimal and an exact value


@lru_cache(maxsize=4096)
def equal(gold: str, answer: str) -> bool:
    """Whether the answer has gold's value, and is as many things: 3 is not 3, 3, and 52_8 is not 52_9.

    A unit, a base, a percent sign or a modulus may be left out, but not be another one; only a unit may stand where
    gold has none.  Words that count things, as in 4 ways, are no units.
    """
    (one, unit), (other, other_unit) = normal(gold), normal(answer)
    if unit and other_unit and unit != other_unit:
        return False
    gold, answer = one or gold.strip(), other or answer.strip()
    return bool(gold and answer) and _same(gold, answer)


def normal(text: str) -> tuple[str, dict[str, int]]:
    """The text without style, labels and units, and without spaces and commas within numbers; the units (see units)."""
    units = ["dollar "] if text.count("\\$") == 1 and "dollar" not in text else []

    def take(found: re.Match) -> str:
        kept = found[1] if found.re is BARE_UNIT else ""
        units.append(found[0].removeprefix(kept))
        return kept

    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = _unstyled(UNIT.sub(take, text.strip())).strip()
    if label := LABEL.match(text):
        text = text[label.end() :]
    for pattern in GROUPED:
        text = pattern.sub(lambda found: re.sub(r"[^\d+-]", "", found[0]), text)
    text = re.sub(r"[\s.,;\u3002]+$", "", SPACE.sub(" ", text))
    text = REPEATING.sub(_fraction, re.sub(r"\+\s*-", "-", text))
    text = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)  # Math-Verify takes 2i for a variable
    text = re.sub(r"^\s*[A-Za-z]\s*\\equiv", "", text)
    return BARE_UNIT.sub(take, UNIT.sub(take, text).strip()), measures(" ".join(units))


def _unstyled(text: str) -> str:
    """Without commands that only set their argument in another type; words stay in \\text."""
    start = 0
    while found := STYLE.search(text, start):
        end = next((at for at, depth, _ in _walk(text, found.end()) if depth < 0), None)
        if end is None:
            break
        content = text[found.end() : end]
        is_words = WORDS.fullmatch(content.strip())
        new = f"\\text{{{content}}}" if is_words else f"{{{content}}}" if found[1] else content
        start = found.start() + (len(new) if is_words else 0)
        text = text[: found.start()] + new + text[end + 1 :]
    return text


def _fraction(found: re.Match) -> str:
    whole, head, tail = found[1], found[2], found[3] or found[4]
    value = int(f"{whole}{head}{tail}") - int(f"{whole}{head}" or "0")
    return rf"\frac{{{value}}}{{{'9' * len(tail)}{'0' * len(head)}}}"


def _walk(text: str, start: int = 0):
    """(place, depth after it, token) of brackets, row ends and commas."""
    depth = 0
    for found in BRACKETS.finditer(text, start):
        depth += found[0] in ("{", "\\{", "(", "[", "\\begin")
        depth -= found[0] in ("}", "\\}", ")", "]", "\\end")
        yield found.start(), depth, found[0]


def _opened(text: str) -> tuple[str, str]:
    """The brackets around the whole text, such as "(]", and what they hold; ("", text) without any."""
    for mark in ("\\{", "{", "(", "["):
        if text.startswith(mark):
            closed = next(((at, token) for at, depth, token in _walk(text) if depth == 0), None)
            if closed and closed[0] + len(closed[1]) == len(text):
                return mark + closed[1], text[len(mark) : closed[0]].strip()
    return "", text


def _elements(text: str) -> list[str]:
    """What a list or a set holds, or the one thing that the text is; of \\pm both."""
    kind, inner = _opened(text)
    if kind in ("{}", "\\{\\}", "()") and (held := _elements(inner)) and (len(held) == 1 or kind != "()"):
        return held
    text, start, parts = AND.sub(",", text), 0, []
    for at in [*(at for at, depth, token in _walk(text) if token == "," and depth == 0), len(text)]:
        parts.append(text[start:at].strip())
        start = at + 1
    return [one for part in parts if part for one in _signs(part)]


def _signs(text: str) -> list[str]:
    if len(re.findall(r"\\pm(?![A-Za-z])", text)) != 1:
        return [text]
    upper, lower = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
    return [lower.sub(other, upper.sub(one, text)) for one, other in ("+-", "-+")]


def _words(text: str) -> list[str] | None:
    """What is said, where the text is nothing but words."""
    plain = TEXT.sub(r" \1 ", text)
    return re.findall("[a-z0-9]+", plain.casefold()) if SAID.fullmatch(plain) else None


def _same(gold: str, answer: str) -> bool:
    if GAP.sub("", gold) == GAP.sub("", answer):
        return True
    if (words := _words(gold)) and words == _words(answer):  # but AB is not ab
        return "\\text" in gold + answer or len(max(words, key=len)) > 2 or _same_value(gold, answer)
    if TEXT.fullmatch(gold):
        return False
    golds, answers = _elements(gold), _elements(answer)
    if len(golds) == len(answers) == 1:
        return _same_one(golds[0], answers[0])
    if len(golds) == len(answers):  # in any order
        return all(_taken(one, answers) for one in golds)
    if any(len(x) == 1 and _defined(x[0])[0] for x in (golds, answers)):  # x in {1, 2} and 1, 2
        return _same(*(_defined(text)[1] if len(x) == 1 else text for x, text in ((golds, gold), (answers, answer))))
    golds, answers = (_elements(_opened(x[0])[1]) if len(x) == 1 else x for x in (golds, answers))  # (1, 2) and 1, 2
    return _in_order(golds, answers)


def _taken(one: str, others: list[str]) -> bool:
    """Whether one of the others is the same; it is then taken out."""
    for i, other in enumerate(others):
        if _same(one, other):
            del others[i]
            return True
    return False


def _in_order(golds: list[str], answers: list[str]) -> bool:
    return len(golds) == len(answers) > 1 and all(map(_same, golds, answers))


def _same_one(gold: str, answer: str) -> bool:
    """Of two answers that are no lists."""
    (modulus, gold), (other, answer) = _modulus(gold), _modulus(answer)
    (base, gold), (other_base, answer) = _based(gold), _based(answer)
    if modulus and other and modulus != other:
        return False
    if base or other_base:
        return gold == answer and (base == other_base or other_base is None or (base, other_base) == (None, "10"))
    if gold.endswith("\\%") or answer.endswith("\\%"):
        return _same_share(gold, answer)
    (name, value), (other, other_value) = _defined(gold), _defined(answer)
    if (name and other in (name, None)) or (name is None and other is not None):
        return _same(value, other_value)
    (kind, inner), (other_kind, other_inner) = _opened(gold), _opened(answer)
    if kind and kind == other_kind and max(len(_elements(inner)), len(_elements(other_inner))) > 1:
        return _in_order(_elements(inner), _elements(other_inner))
    if (rows := _rows(gold)) and (others := _rows(answer)):
        shapes, cells = zip(*((list(map(len, x)), chain.from_iterable(x)) for x in (rows, others)), strict=True)
        return shapes[0] == shapes[1] and all(map(_same, *cells))
    return _same_value(gold, answer)


def _modulus(text: str) -> tuple[str | None, str]:
    found = MODULUS.search(text)
    return (found[1] or found[2], text[: found.start()]) if found and found.start() else (None, text)


def _based(text: str) -> tuple[str | None, str]:
    """Of 52_8 the base and the digits."""
    if found := NUMERAL.fullmatch(text):
        digits, base = found[1].upper(), BASES.get(found[2], found[2])
        if re.search(r"\d|\w\w", digits) and base.isdigit() and set(digits) <= set(DIGITS[: int(base)]):
            return base, digits.lstrip("0")
    return None, text


def _same_share(gold: str, answer: str) -> bool:
    """Where one is a percentage, or both."""
    (share, gold), (other, answer) = ((x.endswith("\\%"), x.removesuffix("\\%").strip()) for x in (gold, answer))
    hundredth = r"\frac{{{}}}{{100}}"
    if not share:
        return _same(gold, hundredth.format(answer))
    return _same(gold, answer) or (not other and _same(hundredth.format(gold), answer))


def _defined(text: str) -> tuple[str | None, str]:
    """Of f(x) = 1 + 2 = 3 what is defined ("" if it is no name, None without a sign) and the value."""
    first, *sides = [side.strip() for side in EQUALS.split(text)]
    if not sides:
        return None, text
    return re.sub(r"\s", "", first) if NAME.fullmatch(first) else "", sides[-1]


def _rows(text: str) -> list[list[str]] | None:
    """The cells of a matrix."""
    if found := MATRIX.fullmatch(text):
        return [[cell.strip() for cell in row.split("&")] for row in found[2].split("\\\\") if row.strip()]
    return None


@lru_cache(maxsize=4096)
def _same_value(gold: str, answer: str) -> bool:
    if "\\ldots" in gold + answer:  # Math-Verify leaves them out
        return re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer)
    pairs = ((one, other) for one in _read(gold) for other in _read(answer))
    options = {"allow_set_relation_comp": True, "timeout_seconds": None}  # the caller keeps the time
    return any(verify(one, other, **options) and not _apart(one, other) for one, other in pairs)


@lru_cache(maxsize=4096)
def _read(text: str) -> list:
    return parse(f"\\boxed{{{text}}}", [READ, ExprExtractionConfig()], parsing_timeout=None)


def _apart(gold, answer) -> bool:
    """Whether two values, or two expressions at one place, differ though a fixed tolerance hides it."""
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    place = {symbol: Rational(7 + 3 * i, 5) for i, symbol in enumerate(symbols)}
    gold, answer = (x.doit().subs(place) for x in (gold, answer))
    if not (gold.is_number and answer.is_number and gold.is_finite and answer.is_finite):
        return False
    if gold.is_Rational and answer.is_Rational:
        return gold != answer
    decimals = gold.has(Float) or answer.has(Float)
    literal = all(x.is_Float or x.is_Integer for x in (gold, answer))
    tolerance = EXACT if not decimals else DECIMAL if literal else ROUNDED
    size, difference = (N(x, 30) for x in (abs(gold) + abs(answer), abs(gold - answer)))
    return bool(difference > tolerance * size)
