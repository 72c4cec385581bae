"""`python -m smcscale`: a few commands, for a first look without writing code.

Each command's work is in `smcscale.models.commands` and `smcscale.models.demo`, imported only when
the command runs. Wrong input is one line on standard error and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

_OVERVIEW = """smcscale: Sequential Monte Carlo in JAX

  python -m smcscale filter data.csv --column NAME --model stochastic_volatility
      filter a column of a CSV file: a table, and a picture of the filtered state
  python -m smcscale solve "question"
      solve a word problem with particles that a reward model judges; for your own models
      --model FOLDER --reward FOLDER (without --reward the texts vote)
  python -m smcscale demo
      both of these on shipped data, with pictures in demo/

Add --help to a command for its options. As a library: from smcscale import SMC, ParticleFilter"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; those of the process by default.
    Returns:
        code: 0, or 2 for wrong input, after one line on standard error.
    """
    try:
        options = _parser().parse_args(arguments)
        if options.command is None:
            print(_OVERVIEW)
        elif options.command == "filter":
            _filter(options)
        elif options.command == "solve":
            _solve(options)
        else:
            _demo(options)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        text = " ".join(str(error).removeprefix("smcscale:").split())
        print(f"smcscale: {text}", file=sys.stderr)
        return 2
    return 0


def _filter(options: argparse.Namespace) -> None:
    from smcscale.models import commands

    commands.filter_file(
        options.file,
        column=options.column,
        model=options.model,
        num_particles=options.particles,
        num_runs=options.runs,
        seed=options.seed,
        picture=options.picture,
    )


def _solve(options: argparse.Namespace) -> None:
    from smcscale.models import commands

    commands.solve_question(
        options.question,
        model=options.model,
        reward=options.reward,
        num_particles=options.particles,
        seed=options.seed,
    )


def _demo(options: argparse.Namespace) -> None:
    from smcscale.models import demo

    demo.demo(options.folder)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m smcscale", description="Sequential Monte Carlo in JAX")
    commands = parser.add_subparsers(dest="command")

    one = commands.add_parser("filter", help="filter a column of a CSV file")
    one.add_argument("file", help="a CSV file with a header line")
    one.add_argument("--column", help="its name; by default the only numeric one")
    one.add_argument("--model", default="stochastic_volatility", help="the program (%(default)s)")
    one.add_argument("--particles", type=_count, default=1000, help="of each run (%(default)s)")
    one.add_argument("--runs", type=_count, default=4, help="independent runs (%(default)s)")
    one.add_argument("--seed", type=int, default=0, help="of the random numbers (%(default)s)")
    one.add_argument("--picture", help="where it goes; by default FILE_COLUMN.png in this folder")

    two = commands.add_parser("solve", help="solve a word problem")
    two.add_argument("question", help="the problem, in quotes")
    two.add_argument("--model", metavar="FOLDER", help="a Hugging Face layout; default: shipped")
    two.add_argument(
        "--reward",
        metavar="FOLDER",
        help="a process reward model with the same tokenizer; without it the texts vote",
    )
    two.add_argument("--particles", type=_count, default=16, help="number of texts (%(default)s)")
    two.add_argument("--seed", type=int, default=0, help="of the random numbers (%(default)s)")

    three = commands.add_parser("demo", help="both on shipped data")
    three.add_argument("--folder", default="demo", help="where the pictures go (%(default)s)")
    return parser


def _count(text: str) -> int:
    """A positive whole number."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
