"""Let the pages work with no network: one MathJax file beside them, and no script that would load another from outside.

`mathjax_path` in _config.yml names the file. It is taken from the installed package sphinx-mathjax-offline, whose own
extension would copy every MathJax bundle and point the pages at one that lacks packages such as boldsymbol. It does not
live in book/_static: Jupyter Book loads every script there a second time.
"""

from importlib.resources import files
from pathlib import Path


def _copy_mathjax(app):
    if app.builder.format != "html":
        return
    name = app.config.mathjax_path
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / name).write_bytes((files("sphinx-mathjax-offline") / "static" / "mathjax" / name).read_bytes())


def _drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book always adds Thebe, live code over a CDN, even with its launch button off."""
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename} {s.attributes.get('body')}".lower()]


def setup(app):
    app.connect("builder-inited", _copy_mathjax)
    app.connect("html-page-context", _drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
