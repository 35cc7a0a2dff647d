"""What every chapter does besides its subject: show the library's code, and say and keep what was measured where."""

import ast
import inspect
import subprocess
import sysconfig
import textwrap
from pathlib import Path

from companion.provenance import describe
from dms_core.storage import write_json


def source(*objects, docstrings: bool = False):
    """The source of functions, methods or classes as one code block, so that book and library cannot drift.

    docstrings: False leaves them out; the text around says what they say.  Returns an IPython Markdown.
    """
    from IPython.display import Markdown

    found = [textwrap.dedent(inspect.getsource(thing)).rstrip() for thing in objects]
    blocks = found if docstrings else [_without_docstrings(text) for text in found]
    return Markdown("```python\n" + _narrow("\n\n\n".join(blocks)) + "\n```")


def keep(run_dir: Path | str, chapter: str, **numbers):
    """Write a chapter's numbers and what they were measured on to RUN_DIR/chapters/CHAPTER.json; show the latter.

    Returns a pandas DataFrame of one row a fact.
    """
    import pandas as pd

    made_on = describe()
    write_json(Path(run_dir) / "chapters" / f"{chapter}.json", {"made_on": made_on, **numbers})
    facts = {name: made_on[name] for name in ("processor", "capability", "threads", "python")} | made_on["packages"]
    return pd.Series(facts, name="this chapter ran on").astype(str).to_frame()


def _narrow(text: str) -> str:
    """Code in lines as short as those of the cells, where the formatter is installed."""
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    if not ruff.exists():
        return text
    command = [ruff, "format", "--isolated", "--line-length", "88", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.rstrip()


def _without_docstrings(text: str) -> str:
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[first:last] = [None] * (last - first)
            if last < len(lines) and lines[last] == "":
                lines[last] = None
    return "\n".join(line for line in lines if line is not None)
