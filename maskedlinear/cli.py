"""The command ``maskedlinear``: reads the command line, and imports only what the chosen subcommand needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

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
    commands.add_parser(
        "conformance",
        help="run the conformance suite; all options are passed on to it",
        add_help=False,
    )
    return parser


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
