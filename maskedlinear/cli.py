"""The command ``maskedlinear``: reads the command line, and imports only what the chosen subcommand needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any, NoReturn

from maskedlinear import __version__
from maskedlinear.bench import SETS
from maskedlinear.demo import Settings
from maskedlinear.demo.settings import FRAMEWORKS

__all__ = ["main"]

_NEEDED = {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib"}
_NEEDED_BY = {
    "torch": {"torch": "torch"},
    "flax": {"jax": "jax", "jaxlib": "jaxlib", "optax": "optax", "flax": "flax"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments; ``sys.argv`` without the program if ``None``.

    Returns:
        0 if all is well, 1 if the demo broke a promise, 2 if the command line is wrong or a package is missing; of
        ``conformance`` pytest's exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["conformance"]:  # argparse cannot pass on options that it does not know
        return _conformance(arguments[1:])
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return int(options.run(options))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="maskedlinear", description="The masked linear layer, the same in every framework.")
    parser.add_argument("--version", action="version", version=f"maskedlinear {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train one masked network in PyTorch and in Flax, and compare them",
        description="Train one masked network on scikit-learn's handwritten digits in PyTorch and in Flax, from the same "
        "masks, weights and batches; print a comparison, and write pictures and report.json into a folder. "
        "The exit status is 1 if the two do not agree.",
    )
    demo.add_argument(
        "--sparsity",
        type=float,
        nargs="+",
        metavar="S",
        default=Settings.sparsity,
        help="the fraction of masked connections, in [0, 1], of each of the three layers (default: 0 0.5 0)",
    )
    demo.set_defaults(run=_demo)
    _number(demo, "--epochs", Settings.epochs, "passes over the training set")
    _number(demo, "--batch-size", Settings.batch_size, "images a step")
    _number(
        demo, "--seed", Settings.seed, "decides the split, the masks, the initial weights and the order of the batches"
    )
    _only(demo, "--framework", tuple(FRAMEWORKS), "train in this framework only")
    _folder(demo, "maskedlinear-demo")
    bench = commands.add_parser(
        "bench",
        help="time both forms of the layer against what people use otherwise",
        description="Time training steps and inference of both forms, in each framework in a process of its own, against "
        "the framework's dense layer and other ways to mask it. Prints a table; writes results and plots into a folder. "
        "All of it takes about twenty minutes on two cores, which nothing else should use meanwhile.",
    )
    bench.set_defaults(run=_bench)
    _only(bench, "--framework", ("torch", "jax"), "time this framework only")
    _only(bench, "--set", SETS, "time these cases only")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    bench.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="instead, measure what compress(..., costs=Costs.load(FILE)) chooses by, in the one framework named with "
        "--framework; ten to fifteen minutes",
    )
    _folder(bench, "maskedlinear-bench")
    _add_inspect(commands)
    _add_convert(commands)
    _add_diff(commands)
    commands.add_parser(
        "conformance",
        help="run the conformance suite; all options are passed on to it",
        add_help=False,
    )
    return parser


_FILES = """\
FILE is a checkpoint of maskedlinear.checkpoint, safetensors, a state of PyTorch (weights only, never unpickled), .npz (of
arrays or of scipy), or a folder of Hugging Face's, sharded or not. It is known by what is in it, not by its name."""


def _add_inspect(commands: Any) -> None:
    parser = _of_files(
        commands,
        "inspect",
        "show the masks of a file: sparsity, dead nodes, sizes",
        "Show each masked weight of a file: how many entries are live, the outputs without inputs and the inputs without "
        "outputs, how the mask is written, the bytes dense and here, and these in units of the least that a random mask of "
        "that density takes (its values and its entropy). Sparsity is a fraction. Where the file does not say which axes "
        "are outputs, the name does: a matrix called kernel is (in, out), any other (out, in).",
        """\
  maskedlinear inspect model.safetensors
  maskedlinear inspect model.safetensors --plot masks.png
  maskedlinear inspect pruned.pt --masks zeros --json""",
        "0 all is well, 2 trouble",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--all", action="store_true", help="a line for each array without a mask, too")
    parser.add_argument(
        "--check", action="store_true", help="read arrays without masks too, and compare them with their sums"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, whose keys docs/command-line.md explains")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="draw the masks into a .png, .svg or .pdf (needs matplotlib)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it is there")
    _reading(parser)
    parser.set_defaults(run=_on_files, name="inspect", of_files=_inspect)


def _add_convert(commands: Any) -> None:
    parser = _of_files(
        commands,
        "convert",
        "write a file's arrays in another format",
        "Write what a file holds in another format. OUT appears when all of it is written, or not at all.",
        """\
  maskedlinear convert pruned.pt model.safetensors --to maskedlinear --masks zeros
  maskedlinear convert model.safetensors dense.safetensors --to safetensors
  maskedlinear convert model.safetensors arrays.npz --to npz""",
        "0 all is well, 2 trouble: nothing was written",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--to",
        choices=("maskedlinear", "safetensors", "npz", "torch"),
        required=True,
        help="maskedlinear: live values and masks; the others: whole arrays, +0 under their masks, for others to read",
    )
    parser.add_argument(
        "--values",
        choices=("raw", "pcodec"),
        default="raw",
        help="how maskedlinear files hold values: as they are, or compressed without loss (default: raw)",
    )
    parser.add_argument("--dormant", action="store_true", help="keep the values under masks, in maskedlinear files")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it is there")
    _reading(parser)
    parser.set_defaults(run=_on_files, name="convert", of_files=_convert)


def _add_diff(commands: Any) -> None:
    parser = _of_files(
        commands,
        "diff",
        "show how two files differ: names, shapes, dtypes, masks, values",
        "Compare what two files, of whatever formats, hold under the same names: shapes, dtypes, masks, values live in "
        "both (bit for bit, or as numbers if the dtypes differ), and dormant values.",
        """\
  maskedlinear diff before.safetensors after.safetensors
  maskedlinear diff model.safetensors dense.safetensors --dense
  maskedlinear diff a.safetensors b.npz --masks zeros --json""",
        "0 the same, 1 different, 2 trouble",
    )
    parser.add_argument("a", type=Path, metavar="FILE")
    parser.add_argument("b", type=Path, metavar="FILE")
    parser.add_argument(
        "--dense", action="store_true", help="compare arrays as they act, +0 under masks, and not masks"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, whose keys docs/command-line.md explains")
    _reading(parser)
    parser.set_defaults(run=_on_files, name="diff", of_files=_diff)


def _of_files(commands: Any, name: str, text: str, description: str, examples: str, statuses: str) -> Any:
    return commands.add_parser(
        name,
        help=text,
        description="\n".join(wrap(description, 100)),
        epilog=f"{_FILES}\n\nexamples:\n{examples}\n\nexit status: {statuses}; 130 after Ctrl-C, 141 if nobody reads on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--masks",
        choices=("stored", "zeros"),
        default="stored",
        help="the masks that a file has, or also, for weights without one of which at least a tenth is 0, those of their "
        "zeros (default: stored)",
    )
    parser.add_argument("--key", metavar="NAME", help="which state of a file of PyTorch that holds more than one")
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="what a compressed file, or a masked array as a whole one, may take (default: 1 GiB, or many times it)",
    )


def _how(options: argparse.Namespace) -> Any:
    from maskedlinear.files.source import How

    return How(options.masks, options.key, options.max_bytes)


def _inspect(options: argparse.Namespace) -> int:
    from maskedlinear.files.inspect import inspect

    return inspect(options.file, _how(options), options.all, options.check, options.json, options.plot, options.force)


def _convert(options: argparse.Namespace) -> int:
    from maskedlinear.files.convert import convert

    how = _how(options)
    return convert(options.file, options.out, how, options.to, options.dormant, options.values, options.force)


def _diff(options: argparse.Namespace) -> int:
    from maskedlinear.files.diff import diff

    return diff(options.a, options.b, _how(options), options.dense, options.json)


def _on_files(options: argparse.Namespace) -> int:
    from maskedlinear.files.command import guarded

    return guarded(f"maskedlinear {options.name}", lambda: int(options.of_files(options)))


def _only(parser: argparse.ArgumentParser, option: str, choices: Sequence[str], text: str) -> None:
    parser.add_argument(
        option, action="append", choices=choices, help=f"{text}; may be repeated (default: all of them)"
    )


def _folder(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(default), help="the report's folder (default: %(default)s)"
    )


def _number(parser: argparse.ArgumentParser, option: str, default: int, text: str) -> None:
    parser.add_argument(option, type=int, metavar="N", default=default, help=f"{text} (default: {default})")


def _demo(options: argparse.Namespace) -> int:
    frameworks = tuple(dict.fromkeys(options.framework or FRAMEWORKS))
    needed = _NEEDED | {module: name for framework in frameworks for module, name in _NEEDED_BY[framework].items()}
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        return _fail(
            f"maskedlinear demo needs {' and '.join(missing)}, which {are} not installed. "
            'Install it with: pip install "maskedlinear[all]"'
        )
    from maskedlinear.demo.problem import make_problem

    try:
        settings = Settings(
            sparsity=tuple(options.sparsity),
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            frameworks=frameworks,
        )
        problem = make_problem(settings)
        _make_folder(options.out)
    except ValueError as error:
        return _fail(f"maskedlinear demo: {error}")
    from maskedlinear.demo.command import run_demo

    return run_demo(settings, problem, options.out)


def _bench(options: argparse.Namespace) -> int:
    frameworks = tuple(dict.fromkeys(options.framework or ("torch", "jax")))
    if options.costs is not None and len(frameworks) != 1:
        return _fail(
            "maskedlinear bench: --costs measures one framework; got none or several: name it with --framework"
        )
    needed = {} if options.costs is not None else {"matplotlib": "matplotlib"}
    for framework in frameworks:  # in JAX, what compress exchanges are Flax layers
        needed |= _NEEDED_BY["flax" if framework == "jax" else framework]
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        return _fail(
            f"maskedlinear bench needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed. "
            'Install it with: pip install "maskedlinear[all]"'
        )
    try:
        _make_folder(options.out if options.costs is None else options.costs.parent)
    except ValueError as error:
        return _fail(f"maskedlinear bench: {error}")
    if options.costs is not None:
        from maskedlinear.bench.costs import measure_costs

        measure_costs(frameworks[0], options.costs, options.device)
        return 0
    from maskedlinear.bench.command import run_bench

    return run_bench(frameworks, tuple(dict.fromkeys(options.set or SETS)), options.device, options.out)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder; cannot make {path} ({error.strerror}): choose another") from error


def _conformance(arguments: Sequence[str]) -> int:
    try:
        from maskedlinear_conformance.__main__ import main as conformance
    except ModuleNotFoundError as error:  # which names the extra to install
        return _fail(f"maskedlinear conformance: {error}")
    return conformance(arguments)


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
