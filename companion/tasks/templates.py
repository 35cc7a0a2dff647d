"""Prompt templates of the evaluation protocols: templates.yaml quotes them with their sources."""

import re
from pathlib import Path

import yaml

TEMPLATES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8"))


def fill(name: str, **values: str) -> str:
    """The template with every ``<NAME>`` of ``values`` replaced, in one pass: values are not searched for names."""
    return re.sub(r"<([A-Z]+)>", lambda match: values.get(match[1], match[0]), TEMPLATES[name])
