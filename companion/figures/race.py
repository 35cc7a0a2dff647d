"""The README's race as an animated SVG: the embedded model, dense and with DMS, at one budget of KV reads.

Both sides may read their caches equally often, so both bars fill at the same pace; a side's chains take turns.  A
letter is a token.  It fades by the share of KV heads that drop it, when it leaves the window.  Who asks for less motion
sees how it ends.

``python -m companion.figures.race`` runs the models and writes book/_static/race.svg.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from companion.experiments.heldout import kept_tokens
from companion.paths import REASONER, checkout
from companion.tasks.puzzles import extract_assignment, make_puzzle, solves
from dms_core.checkpoint import is_checkpoint, load_base, load_model, load_tokenizer
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import Chain, SamplingConfig, sample_chains

PUZZLE, SEED = ("validation", 17, 1), 0  # the puzzle that the live page opens with; of sampling
TOKENS, CHAINS, CR = 300, 2, 8  # dense tokens that the budget holds; DMS's chains and ratio
SECONDS, REST = 12, 6  # of the race; of its end, before it begins anew
COLUMNS, STEP, LINE, PANEL = 54, 7.4, 15, 424  # letters a line; px: a letter's width, a line's height, a side's width
STYLE = """
svg{--paper:#fff;--line:#d9dde3;--ink:#1d2530;--soft:#56606e;--dense:#3a4452;--dms:#0173b2;--gone:#e6e9ee;--good:#0b7a4b;--bad:#b3261e}
@media(prefers-color-scheme:dark){svg{--paper:#121212;--line:#36404c;--ink:#e8ecf1;--soft:#a5b0bd;--dense:#c3ccd6;--dms:#56b4e9;
--gone:#2a2f37;--good:#5fd0a0;--bad:#ff9b8f}}
text{font:14px system-ui,"Segoe UI",Helvetica,Arial,sans-serif;fill:var(--ink)}
.t{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.h{font-weight:650;font-size:16px}.s{fill:var(--soft)}.e{text-anchor:end}
"""


@dataclass(frozen=True)
class Letter:
    """A token.  appears, fades: shares of the budget read by then; held: the share of KV heads that keep it."""

    text: str
    appears: float
    fades: float
    held: float


@dataclass(frozen=True)
class Side:
    """What one side wrote, a list a chain; read: the share of the budget; answer: None without one."""

    title: str
    chains: list[list[Letter]]
    read: float
    cut: bool
    answer: str | None
    right: bool


def run_side(title: str, directory: Path, prompt: str, width: int, budget: float, most: int | None = None) -> Side:
    """Let the model in ``directory`` write ``width`` chains until one passes or ``budget`` KV reads are used up.

    most: tokens of a chain, at least what the budget holds; None: as many as the model has positions.
    """
    dense, tokenizer = not is_checkpoint(directory), load_tokenizer(directory)
    model = attach(load_base(directory), DMSConfig()) if dense else load_model(directory)
    ids = tokenizer(prompt)["input_ids"]
    most = most or model.config.max_position_embeddings - len(ids)
    config = SamplingConfig(most, batch=width, seed=SEED, stride=1)
    with model.dms.disabled() if dense else nullcontext():
        chains = sorted(
            sample_chains(model, tokenizer, [ids], [(0, i) for i in range(width)], config), key=lambda x: x.chain
        )
    answers = [extract_assignment(tokenizer.decode(chain.tokens)) for chain in chains]
    right = [answer is not None and solves(prompt, answer) for answer in answers]
    order, cut = take_turns(chains, budget, right)
    written: list[list[Letter]] = []
    for number, chain in enumerate(chains):
        at = [read / budget for i, read in order if i == number]
        whole = [*ids, *chain.tokens]
        held = torch.ones(len(whole)) if dense else kept_tokens(model, whole).float().mean((0, 1))
        texts = tokenizer.convert_ids_to_tokens(chain.tokens)
        later = [*at[model.dms.config.window + 1 :], *[2.0] * len(at)]  # when a token leaves the window
        kept = held[len(ids) :].tolist()
        written.append([Letter(*x) for x in zip(texts, at, later, kept, strict=False)])
    ended = [i for i, chain in enumerate(chains) if sum(number == i for number, _ in order) == made(chain)]
    best = next((i for i in ended if right[i]), next(iter(ended), None))
    answer = None if best is None else answers[best]
    return Side(title, written, order[-1][1] / budget, cut, answer, best is not None and right[best])


def made(chain: Chain) -> int:
    """Tokens that a chain wrote, the stop token too."""
    return len(chain.tokens) + chain.finished


def take_turns(chains: Sequence[Chain], budget: float, right: Sequence[bool]) -> tuple[list[tuple[int, float]], bool]:
    """(chain, KV reads of all so far) for each token that the budget holds, and whether the budget ended it.

    Chains take turns, a token each, until all have ended or one has ended that is ``right``.
    """
    order, spent, at = [], 0.0, [0] * len(chains)
    while under_way := [i for i, chain in enumerate(chains) if at[i] < made(chain)]:
        for i in under_way:
            spent += chains[i].reads[at[i] + 1] - chains[i].reads[at[i]]
            if spent > budget:
                return order, True
            order.append((i, spent))
            at[i] += 1
            if right[i] and at[i] == made(chains[i]):
                return order, False
    return order, False


class Timeline:
    """CSS classes of what appears, and perhaps fades, at shares of the race."""

    def __init__(self) -> None:
        self.names: dict[tuple[float, float, float], str] = {}

    def __call__(self, appears: float, fades: float = 2.0, held: float = 1.0) -> str:
        """The class of an element that is shown from ``appears`` on, and from ``fades`` on with opacity ``held``."""
        fades, held = (2.0, 1.0) if held == 1 else (fades, held)
        key = (_percent(appears), _percent(fades), round(held, 2))
        return self.names.setdefault(key, f"k{len(self.names)}")

    def css(self) -> str:
        """Keyframes a class; the looks without motion are those of the end."""
        rules = []
        for (appears, fades, held), name in self.names.items():
            faded = f"{fades:g}%{{opacity:{held:g};fill-opacity:{held:g}}}" if fades < 100 else ""
            end = f"opacity:{held:g};fill-opacity:{held:g};" if faded else ""
            rules.append(
                f"@keyframes {name}{{0%{{opacity:0;fill-opacity:0}}{appears:g}%{{opacity:1;fill-opacity:1}}{faded}}}"
            )
            rules.append(f".{name}{{{end}animation:{name} {SECONDS + REST}s step-end infinite}}")
        return "".join(rules) + "@media(prefers-reduced-motion:reduce){*{animation:none!important}}"


def _percent(share: float) -> float:
    """Of the loop, at a share of the race, in steps of a quarter; 100 for what never comes."""
    return min(round(400 * max(share, 0.001) * SECONDS / (SECONDS + REST)) / 4, 100) if share <= 1 else 100


def draw_side(side: Side, left: float, top: float, colour: str, when: Timeline) -> tuple[list[str], float]:
    """SVG elements of one side, and how far down they reach."""
    bar, at = PANEL - 24, left + 12
    stop = 100 * side.read * SECONDS / (SECONDS + REST)
    parts = [
        f'<text class="h" x="{at}" y="{top + 24}" style="fill:var(--{colour})">{escape(side.title)}</text>',
        f'<rect x="{at}" y="{top + 34}" width="{bar}" height="12" rx="6" fill="var(--gone)"/>',
        f"<style>@keyframes {colour}{{0%{{transform:scaleX(0)}}{stop:.2f}%,100%{{transform:scaleX({side.read:.4f})}}}}"
        f".{colour}{{transform:scaleX({side.read:.4f});animation:{colour} {SECONDS + REST}s linear infinite}}</style>",
        f'<g transform="translate({at} {top + 34})"><rect class="{colour}" width="{bar}" height="12" rx="6" '
        f'fill="var(--{colour})"/></g>',
    ]
    appeared = sorted(letter.appears for chain in side.chains for letter in chain)
    steps = [side.read * i / 30 for i in range(31)]
    for now, then in zip(steps, [*steps[1:], 2.0], strict=True):
        count = sum(x <= now for x in appeared) if then < 2 else len(appeared)
        parts.append(
            f'<text class="s e {when(now, then, 0.0 if then < 2 else 1.0)}" x="{left + PANEL - 12}" y="{top + 24}">'
            f"{count} tokens written</text>"
        )
    y = top + 50.0
    for chain in side.chains:
        for start in range(0, len(chain), COLUMNS):
            y += LINE
            letters = "".join(
                f'<tspan class="{when(x.appears, x.fades, 0.2 + 0.8 * x.held)}">{escape(x.text)}</tspan>'
                for x in chain[start : start + COLUMNS]
            )
            parts.append(
                f'<text class="t" x="{at}" y="{y:g}" {_length(chain[start : start + COLUMNS])}>{letters}</text>'
            )
        y += 7
    return parts, y


def _length(letters: Sequence[Letter]) -> str:
    """Makes a line as wide in every font."""
    return f'textLength="{STEP * len(letters):g}" lengthAdjust="spacingAndGlyphs"'


def verdict(side: Side) -> tuple[str, str]:
    """How a side ended, and the colour of the sentence."""
    said = "no answer" if side.answer is None else " ".join(re.findall("..", side.answer))
    how = "budget used up" if side.cut else f"{100 * (1 - side.read):.0f} % of the budget left"
    return f"{said} {'✓' if side.right else '✗'}  ({how})", "good" if side.right else "bad"


def draw(prompt: str, sides: Sequence[Side]) -> str:
    """The race as SVG, the first side at the left."""
    when, parts, bottoms = Timeline(), [], []
    for i, (side, colour) in enumerate(zip(sides, ("dense", "dms"), strict=True)):
        drawn, bottom = draw_side(side, 8 + i * (PANEL + 8), 50, colour, when)
        parts += drawn
        bottoms.append(bottom)
    low, width = max(bottoms) + 8, 2 * PANEL + 24
    for i, side in enumerate(sides):
        said, colour = verdict(side)
        place = f'x="{20 + i * (PANEL + 8)}" y="{low + 14:g}" style="fill:var(--{colour});font-weight:650"'
        parts.append(f'<text class="{when(side.read)}" {place}>{escape(said)}</text>')
    boxes = (8 + i * (PANEL + 8) for i in range(2))
    frame = [
        f'<rect x="{x}" y="50" width="{PANEL}" height="{low - 22:g}" rx="10" fill="none" stroke="var(--line)"/>'
        for x in boxes
    ]
    lines = ", ".join(re.sub("([=+-])", r" \1 ", line) for line in prompt[:-2].split(";")[1:]).replace("-", "−")
    head = f'<text x="12" y="20">Digits, modulo 10, that fulfil <tspan class="t">{escape(lines)}</tspan></text>'
    note = "Both sides read their key–value cache equally often. A token fades as heads forget it."
    title = f"A race at an equal budget of KV reads. {'. '.join(f'{x.title}: {verdict(x)[0]}' for x in sides)}."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {low + 36:g}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}{when.css()}</style>"
        f'<rect width="{width}" height="{low + 36:g}" rx="12" fill="var(--paper)"/>{head}'
        f'<text class="s" x="12" y="41">{note}</text>{"".join([*frame, *parts])}</svg>\n'
    )


def race(tokens: int = TOKENS, report: Callable[[str], None] = print) -> str:
    """Run both models on PUZZLE; the budget is what ``tokens`` dense tokens read.  Returns the SVG."""
    prompt = make_puzzle(*PUZZLE).prompt
    budget = (tokens - 1) * (2 * len(prompt) + tokens) / 2  # the sum of prompt + 1 .. prompt + tokens - 1
    sides = [
        run_side("Dense", REASONER, prompt, 1, budget),
        run_side(f"DMS, CR {CR}, {CHAINS} chains", REASONER / f"dms-cr{CR}", prompt, CHAINS, budget),
    ]
    for side in sides:
        report(f"{side.title}: {sum(map(len, side.chains))} tokens, {verdict(side)[0]}")
    return draw(prompt, sides)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="default: book/_static/race.svg")
    file = parser.parse_args(arguments).file or checkout("the race") / "book" / "_static" / "race.svg"
    file.write_text(race())
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
