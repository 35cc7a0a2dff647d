"""What a rendered book's files tell: links, anchors and sizes."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

MEGABYTE = 1 << 20
LARGEST, LARGEST_LIVE = 3 * MEGABYTE, 5 * MEGABYTE  # a page with its images; the live page with its models


class Page(HTMLParser):
    """What a page names, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.kinds: set[tuple[str, str]] = set()  # of its parts, by tag and class; those of a line of code are one
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.kinds |= {(tag, name) for name in (found.get("class") or "").split() or [""] if tag != "span"}
        self.links += [found[key] for key in ("href", "src") if found.get(key) is not None]
        self.images += [found["src"]] if tag == "img" and found.get("src") else []
        if tag == "meta" and (found.get("http-equiv") or "").lower() == "refresh":
            self.links.append(found["content"].partition("url=")[2])


def pages_of(html: Path) -> list[Path]:
    """The pages of a rendered book, without what its theme keeps and without the part that the first page embeds."""
    found = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts and path.name != "embed.html"]
    if not found:
        raise ValueError(f"{html}: holds no pages; render the book first (make book)")
    return found


def check_files(html: Path) -> list[str]:
    """Faults of a rendered book that its files tell: links and anchors that lead nowhere, pages that are too large."""
    pages, faults = {path.resolve(): Page(path.read_text()) for path in pages_of(html)}, []
    for path, page in pages.items():
        name = path.relative_to(html.resolve())
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                faults.append(f"{name}: {link} leads nowhere")
            elif anchor and target in pages and anchor not in pages[target].names:
                faults.append(f"{name}: {link} names no part of {target.name}")
        images = {(path.parent / unquote(link)).resolve() for link in page.images if not urlsplit(link).scheme}
        live = path.parent.name == "live"
        parts = path.parent.iterdir() if live else {path} | images
        size = sum(part.stat().st_size for part in parts if part.is_file())
        if size > (LARGEST_LIVE if live else LARGEST):
            faults.append(f"{name}: {size / MEGABYTE:.1f} MB with its images")
    return faults
