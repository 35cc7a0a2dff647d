"""``dms``: the companion's commands.  Those with --json print one JSON object on the last line of standard output.

Each ``cli_*`` module has ``add_commands(add)``, which declares its commands, and HELP, what their JSON holds.
"""

import argparse
import json
import os
import sys

from companion.cli import ablate as cli_ablate
from companion.cli import batch as cli_batch
from companion.cli import embedded as cli_embedded
from companion.cli import eval as cli_eval
from companion.cli import grid as cli_grid
from companion.cli import kernels as cli_kernels
from companion.cli import lm as cli_lm
from companion.cli import plan as cli_plan
from companion.cli import published as cli_published
from companion.cli import retrofit as cli_retrofit
from companion.cli import tasks as cli_tasks
from companion.cli import tokens as cli_tokens

MODULES = (
    cli_embedded, cli_tasks, cli_plan, cli_eval, cli_grid, cli_lm, cli_tokens, cli_retrofit, cli_kernels,
    cli_published, cli_ablate, cli_batch,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Entry point.  Bad input exits with status 2 and one line on standard error."""
    args = make_parser().parse_args(arguments)
    try:
        result = args.run(args)
    except ValueError as error:
        print(f"dms: {error}", file=sys.stderr)
        return 2
    if args.json and not int(os.environ.get("RANK", 0)):  # under torchrun the first process speaks
        print(json.dumps(result))
    return 0 if args.passed(result) else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dms", description=__doc__.splitlines()[0], epilog=json_help(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print the result as JSON, last")
        command.set_defaults(run=run, passed=lambda result: True)
        return command

    for module in MODULES:
        module.add_commands(add)
    return parser


def json_help() -> str:
    return "JSON on standard output:\n" + "".join(module.HELP for module in MODULES)


if __name__ == "__main__":
    sys.exit(main())
