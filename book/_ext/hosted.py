"""What needs an address that others can reach: launch buttons, and the card of a page that is shared.

Both addresses stand in CITATION.cff alone: `repository-code`, that of the repository on GitHub, and `url`, that of the
rendered book. Without the first there are no launch buttons; without the second a page names its card by a relative
address, which most services do not follow. Binder installs what .binder names. Colab opens a notebook without its
repository, where nothing of ours can be imported, and is not offered.
"""

import re
from html import escape, unescape

import yaml

from companion.paths import checkout

ABOUT = (
    "Dynamic Memory Sparsification of the key–value cache: derived, computed and tested, with a model that runs in "
    "the page."
)


def _read_addresses(app, config):
    facts = yaml.safe_load((checkout("the book") / "CITATION.cff").read_text())
    config.html_baseurl = facts.get("url", "")
    if repository := facts.get("repository-code"):
        where = {"repository_url": repository, "repository_branch": "HEAD", "path_to_docs": ""}
        launch = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
        config.html_theme_options |= {**where, "launch_buttons": launch}


def _add_card(app, pagename, templatename, context, doctree):
    base, card = app.config.html_baseurl, "_static/social.png"
    title = unescape(re.sub("<[^>]*>", "", context.get("title") or app.config.html_title))
    properties = {
        "og:type": "article",
        "og:title": title,
        "og:description": ABOUT,
        "og:image": f"{base.rstrip('/')}/{card}" if base else context["pathto"](card, 1),
        "og:image:alt": "The title of the book beside a curve of accuracy against KV reads",
    }
    tags = [f'<meta property="{name}" content="{escape(value)}" />' for name, value in properties.items()]
    names = {"description": ABOUT, "twitter:card": "summary_large_image"}
    tags += [f'<meta name="{name}" content="{escape(value)}" />' for name, value in names.items()]
    context["metatags"] = context.get("metatags", "") + "\n    ".join(["", *tags])


def setup(app):
    app.connect("config-inited", _read_addresses)
    app.connect("html-page-context", _add_card)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
