"""``dms``: the entry point.  A module of commands registers them when it is imported."""

import sys

from typer import TyperException
from typer.main import get_command

from companion.cli import batch, check, measure, memory, reproduce, retrofit, sample, share, studies  # noqa: F401
from companion.cli.app import PANELS, app, spread

GROUPS = {  # of pyproject.toml, by a package that may be missing
    "matplotlib": "book",
    "seaborn": "book",
    "nbformat": "book",
    "papermill": "book",
    "gguf": "smollm2",
    "peft": "lora",
    "math_verify": "eval",
    "reasoning_gym": "eval",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 after one line on standard error for bad input."""
    app.registered_commands.sort(key=lambda command: PANELS.index(command.rich_help_panel))
    commands = get_command(app)
    words = spread(commands, sys.argv[1:] if arguments is None else list(arguments))
    try:
        return commands.main(words, prog_name="dms", standalone_mode=False) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in GROUPS:
            raise
        message = f"{package} is not installed: pip install 'dms-companion[{GROUPS[package]}]'"
    except (ValueError, TyperException) as error:
        message = error.format_message() if isinstance(error, TyperException) else error
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error
    print("dms:", message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
