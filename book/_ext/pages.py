"""Finish the pages for readers: tables as a typesetter would set them, roles that screen readers know, and pages.js.

A table gets one header row (pandas writes an index's names in a row of their own), numbers to the right under their
header, words to the left, and true minus signs.  "95 %" stays on one line everywhere outside code.
"""

import re
from pathlib import Path

from bs4 import BeautifulSoup

SCRIPT = "pages.js"
TABLE = re.compile(r'<table[^>]*class="[^"]*\b(?:dataframe|table)\b.*?</table>', re.S)
MARKUP = re.compile(r"(<(pre|code|script|style|textarea)\b.*?</\2>|<[^>]*>)", re.S)
NUMBER = re.compile(r"(?=.*\d|\W?$)[^A-Za-z]*(?:e[+−]\d+)?[^A-Za-z]*[KMG]?$|nan$|None$|inf$")
EMPTY = re.compile(r"<th([^>]*)>(?:\s|&nbsp;)*</th>")
MINUS = re.compile(r"(?<![\w.)\]-])-(?=\d)|(?<=\de)-(?=\d)")


def set_table(html: str) -> str:
    """A table of a page, set as above.

    >>> set_table('<table class="dataframe"><thead><tr><th></th><th>a</th></tr><tr><th>x</th><th></th></tr></thead>'
    ...     '<tbody><tr><th>y</th><td>-1</td></tr></tbody></table>').split("<tbody>")
    ['<table class="dataframe"><thead><tr><th>x</th><th class="number">a</th></tr></thead>', \
'<tr><th>y</th><td class="number">−1</td></tr></tbody></table>']
    """
    soup = BeautifulSoup(html, "html.parser")
    del soup.table["border"]
    for text in soup.find_all(string=MINUS):
        text.replace_with(MINUS.sub("−", text))
    head, body = (part("tr") if part else [] for part in (soup.thead, soup.tbody))
    for row in head:
        del row["style"]
    if len(head) > 1:
        _join_names(head)
    columns = min((len(row("td")) for row in body), default=0)
    for column in range(1, columns + 1):  # from the right: what stands for several rows is in the first of them alone
        cells = [row("td")[-column] for row in body]
        if all(NUMBER.match(cell.get_text(strip=True)) for cell in cells):
            for cell in cells + [row(["th", "td"])[-column] for row in head[-1:]]:
                cell["class"] = [*cell.get("class", ()), "number"]
    return str(soup)


def _join_names(head: list) -> None:
    """Move the names of an index into the empty cells above them."""
    above, names = head[-2]("th"), [cell.get_text(strip=True) for cell in head[-1]("th")]
    count = max((place + 1 for place, name in enumerate(names) if name), default=0)
    if len(above) == len(names) and not any(cell.get_text(strip=True) for cell in above[:count]):
        for cell, name in zip(above, names[:count], strict=False):
            cell.string = name
        head.pop().extract()


def finish(html: str) -> str:
    """The body of a page, with its tables set and what must not break kept together."""
    parts = MARKUP.split(
        TABLE.sub(lambda found: set_table(found[0]), html)
    )  # text, markup, name of its element or None
    parts[::3] = [re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text) for text in parts[::3]]
    parts[2::3] = [""] * len(parts[2::3])
    html = "".join(parts).replace('role="doc-biblioentry"', 'role="listitem"')  # in a list, which wants items
    html = EMPTY.sub(r"<td\1></td>", html)  # nothing is no header
    return html.replace('<summary aria-label="Toggle hidden content">', "<summary>")  # its text says what it shows


def _finish_page(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = finish(context["body"])


def _add_script(app):
    if app.builder.format == "html":
        static = Path(app.outdir) / "_static"
        static.mkdir(parents=True, exist_ok=True)
        (static / SCRIPT).write_bytes(Path(__file__).with_name(SCRIPT).read_bytes())
        app.add_js_file(SCRIPT, loading_method="defer")  # after what it changes is there, before that begins


def setup(app):
    app.connect("builder-inited", _add_script)
    app.connect("html-page-context", _finish_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
