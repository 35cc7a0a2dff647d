"""Versions of what rendered the book, as a substitution: ``{{ versions }}`` is a sentence for the colophon."""

import platform
from importlib import metadata

PACKAGES = {
    "torch": "PyTorch",
    "transformers": "transformers",
    "numpy": "NumPy",
    "pandas": "pandas",
    "matplotlib": "Matplotlib",
    "papermill": "papermill",
    "jupyter-book": "Jupyter Book",
    "sphinx": "Sphinx",
    "myst-nb": "MyST-NB",
    "sphinx-book-theme": "sphinx-book-theme",
}


def versions() -> str:
    """Such as "Python 3.11.7, PyTorch 2.13.0, …"; what is not installed is left out."""
    found = [f"Python {platform.python_version()}"]
    for name, shown in PACKAGES.items():
        try:
            found.append(f"{shown} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _substitute(app, config):
    config.myst_substitutions = {**(config.myst_substitutions or {}), "versions": versions()}


def setup(app):
    app.connect("config-inited", _substitute)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
