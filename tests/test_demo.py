"""The demo through its command line: what it shows, writes, promises and refuses; and the mathematics it measures by."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskedlinear_conformance.__main__
from helpers import python
from maskedlinear.cli import main
from maskedlinear.demo import Settings, flax_runner, torch_runner
from maskedlinear.demo.problem import make_problem
from maskedlinear.demo.reference import first_step, largest_difference
from maskedlinear.demo.report import broken_promises

FILES = {"network.png", "masks.png", "training.png", "weights.png", "report.json"}
TIMES = {"seconds", "first_step_seconds"}


def run(out: Path, *options: str) -> tuple[int, str, Any]:
    """Run the demo; return its exit status, what it printed, and ``report.json``."""
    screen = io.StringIO()
    with redirect_stdout(screen):
        status = main(["demo", "--out", str(out), *options])
    return status, screen.getvalue(), json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    status, screen, report = run(out, "--epochs", "2")
    assert status == 0
    return out, screen, report


def without_times(report: Any) -> Any:
    report = copy.deepcopy(report)
    for numbers in report["frameworks"].values():
        for key in TIMES:
            assert numbers.pop(key) > 0
    return report


def test_default_run_keeps_its_promises(tmp_path: Path) -> None:
    status, _, report = run(tmp_path)
    torch_run, flax_run = report["frameworks"]["torch"], report["frameworks"]["flax"]
    assert torch_run["test_accuracy"] > 0.95
    assert flax_run["test_accuracy"] > 0.95
    assert abs(torch_run["test_accuracy"] - flax_run["test_accuracy"]) <= 0.01
    assert report["comparison"]["first_gradients"]["bound_ratio"] <= 1
    assert torch_run["dormant_changed"] == flax_run["dormant_changed"] == 0
    assert report["broken_promises"] == []
    assert status == 0


def test_table_shows_what_the_report_holds(small: tuple[Path, str, Any]) -> None:
    _, screen, report = small
    assert "PyTorch" in screen
    assert "Flax" in screen
    comparison = report["comparison"]
    for numbers in report["frameworks"].values():
        assert f"{numbers['test_accuracy']:.2%}" in screen
        assert f"{numbers['last_epoch_loss']:.4f}" in screen
        assert f"{numbers['first_gradients']['bound_ratio']:.3f}" in screen
    for shown in (
        f"{comparison['accuracy_points']:.2f} points",
        f"{comparison['largest_loss_difference']:.1e}",
        f"{comparison['first_gradients']['absolute']:.1e}",
        f"{comparison['first_gradients']['own_ratio']:.3g}",
        "changed by AdamW",
        "50.0%",
        "Not a benchmark",
        "2/2 epochs",
    ):
        assert shown in screen
    assert "\x1b" not in screen  # no terminal, so no control sequences
    assert max(map(len, screen.splitlines()[:-1])) <= 80


def test_report_holds_settings_versions_and_numbers(small: tuple[Path, str, Any]) -> None:
    report = small[2]
    assert report["settings"]["sparsity"] == [0.0, 0.5, 0.0]
    assert report["settings"]["optimizer"]["weight_decay"] > 0
    for name in ("numpy", "torch", "jax", "flax", "optax", "scikit-learn", "maskedlinear"):
        assert report["versions"][name] == importlib.metadata.version(name)
    assert [(layer["out"], layer["in"], layer["masked"]) for layer in report["layers"]] == [
        (32, 64, 0),
        (16, 32, 256),
        (10, 16, 0),
    ]
    for numbers in report["frameworks"].values():
        assert numbers["sparsity"] == [0.0, 0.5, 0.0]
        assert (numbers["dormant"], numbers["dormant_changed"]) == (256, 0)
        assert len(numbers["losses"]) == len(numbers["accuracies"]) == 2
        assert numbers["losses"][1] < numbers["losses"][0]
        assert numbers["accuracies"][1] == numbers["test_accuracy"]
    assert report["comparison"]["largest_loss_difference"] < 1e-4


def test_files_are_pictures(small: tuple[Path, str, Any]) -> None:
    out, screen, _ = small
    assert {path.name for path in out.iterdir()} == FILES
    for name in FILES:
        assert name in screen
        assert name == "report.json" or (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_same_seed_same_numbers_another_seed_others(small: tuple[Path, str, Any], tmp_path: Path) -> None:
    again = run(tmp_path, "--epochs", "2", "--seed", "0")[2]
    assert without_times(again) == without_times(small[2])
    other = run(tmp_path, "--epochs", "2", "--seed", "1", "--framework", "torch")[2]
    assert other["frameworks"]["torch"]["losses"] != again["frameworks"]["torch"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_one_framework_alone(framework: str, tmp_path: Path, small: tuple[Path, str, Any]) -> None:
    status, screen, report = run(tmp_path, "--framework", framework, "--framework", framework, "--epochs", "2")
    assert status == 0
    assert report["comparison"] is None
    assert "difference at a step" not in screen
    assert without_times(report)["frameworks"][framework] == without_times(small[2])["frameworks"][framework]


@pytest.mark.parametrize("sparsity", [("1", "1", "1"), ("0.9", "0.99", "0")])
def test_any_sparsity_can_be_drawn(sparsity: tuple[str, ...], tmp_path: Path) -> None:
    status, _, report = run(tmp_path, "--epochs", "1", "--framework", "torch", "--sparsity", *sparsity)
    assert status == 0
    masked = [layer["masked"] for layer in report["layers"]]
    assert masked == [int(float(part) * size) for part, size in zip(sparsity, (2048, 512, 160), strict=True)]


def test_dormant_weights_that_move_break_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {kind: kind.step for kind in (torch_runner.TorchRunner, flax_runner.FlaxRunner)}

    def moving(runner: Any, x: Any, y: Any) -> float:
        loss = steps[type(runner)](runner, x, y)
        if isinstance(runner, torch_runner.TorchRunner):
            for layer in torch_runner._masked_layers(runner._network):
                if layer.dormant is not None:  # the last layer has none
                    layer.dormant.add_(1)
        else:
            for layer in runner._network.linears:
                layer.dormant[...] = layer.dormant[...] + 1
        return loss

    for kind in steps:
        monkeypatch.setattr(kind, "step", moving)
    status, _, report = run(tmp_path, "--epochs", "1")
    assert status == 1
    errors = capsys.readouterr().err
    for name, shown in (("torch", "PyTorch"), ("flax", "Flax")):
        changed = report["frameworks"][name]["dormant_changed"]
        assert changed > 250
        assert f"AdamW changed {changed} of 256 dormant weights in {shown}; freeze_masked promises none." in errors


def test_a_wrong_gradient_breaks_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = torch_runner.TorchRunner.gradients

    def wrong(runner: torch_runner.TorchRunner) -> Any:  # rounded as TF32 rounds: to 11 bits
        return tuple(
            type(layer)(*(np.round(part * 2.0**11 / abs(part).max()) * abs(part).max() / 2.0**11 for part in layer))
            for layer in right(runner)
        )

    monkeypatch.setattr(torch_runner.TorchRunner, "gradients", wrong)
    assert run(tmp_path, "--epochs", "1")[0] == 1
    errors = capsys.readouterr().err
    assert "The first step's gradients differ between the float64 spec and PyTorch by" in errors
    assert "The first step's gradients differ between the two frameworks by" in errors
    assert "and Flax by" not in errors


def test_accuracy_is_promised_for_the_defaults_only(small: tuple[Path, str, Any]) -> None:
    report = copy.deepcopy(small[2])
    report["frameworks"]["torch"]["test_accuracy"] = 0.95
    report["frameworks"]["flax"]["test_accuracy"] = float("nan")
    report["comparison"]["accuracy_points"] = 1.5
    broken = "\n".join(broken_promises(Settings(seed=3), report))
    assert "PyTorch reached a test accuracy of 95.00%; more than 95% is promised." in broken
    assert "Flax reached a test accuracy of nan%" in broken
    assert "The test accuracies differ by 1.50 points; at most 1 is promised." in broken
    assert broken_promises(Settings(epochs=2), report) == []
    assert broken_promises(Settings(sparsity=(0.9, 0.5, 0.0)), report) == []


def test_reference_is_the_float64_network() -> None:
    problem = make_problem(Settings(epochs=1, sparsity=(0.3, 0.5, 0.7), seed=5))
    network = torch_runner.TorchRunner(problem, Settings())._network.double()
    x = torch.from_numpy(problem.train_x[problem.batches[0, 0]]).double()
    y = torch.from_numpy(problem.train_y[problem.batches[0, 0]])
    flows: list[tuple[Any, Any]] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        output.retain_grad()
        flows.append((arguments[0].detach(), output))

    layers = list(network)[::3]
    for layer in layers:
        layer.register_forward_hook(keep)
    torch.nn.functional.cross_entropy(network(x), y).backward()
    for reference, layer, (inputs, output) in zip(first_step(problem), layers, flows, strict=True):
        size = output.grad.abs()
        np.testing.assert_allclose(reference.gradients.weight, layer.weight.grad, rtol=0, atol=1e-15)
        np.testing.assert_allclose(reference.gradients.bias, layer.bias.grad, rtol=0, atol=1e-15)
        np.testing.assert_allclose(reference.own_terms.weight, layer.mask * (size.T @ inputs.abs()), atol=1e-15)
        np.testing.assert_allclose(reference.own_terms.bias, size.sum(dim=0), atol=1e-15)
        assert np.all(reference.all_terms.weight >= reference.own_terms.weight)
        assert np.all(reference.all_terms.bias >= reference.own_terms.bias)


def test_difference_counts_what_should_be_zero() -> None:
    problem = make_problem(Settings(epochs=1))
    references = first_step(problem)
    exact = [reference.gradients for reference in references]
    assert largest_difference(exact, exact, references) == (0, 0, 0)
    leaked = [type(layer)(layer.weight.copy(), layer.bias) for layer in exact]
    leaked[1].weight[~problem.masks[1]] = 1e-30
    assert largest_difference(leaked, exact, references).bound_ratio == np.inf


def test_both_frameworks_start_from_and_see_the_same() -> None:
    settings = Settings(epochs=1, batch_size=300, sparsity=(0.3, 0.5, 0.7))
    problem = make_problem(settings)
    runners = [torch_runner.TorchRunner(problem, settings), flax_runner.FlaxRunner(problem, settings)]
    for runner in runners:
        for weight, layer in zip(runner.weights(), problem.layers, strict=True):
            np.testing.assert_array_equal(weight, layer.weight)
            assert np.all(layer.weight[~layer.mask] != 0)
        for batch in problem.batches[0]:
            runner.step(problem.train_x[batch], problem.train_y[batch])
    one, other = runners[0]._network, runners[1]._network
    for norm, twin in zip(list(one)[1::3], other.norms, strict=True):
        np.testing.assert_allclose(norm.running_mean, twin.mean[...], atol=1e-3)
        np.testing.assert_allclose(norm.running_var, twin.var[...], rtol=1e-4)


def test_flax_compiles_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(epochs=1, batch_size=101)
    problem = make_problem(settings)
    traces = []
    right = flax_runner._loss
    monkeypatch.setattr(flax_runner, "_loss", lambda *arguments: (traces.append(1), right(*arguments))[1])
    flax_runner.run(problem, settings, lambda *_: None)
    assert problem.batches.shape[1] > 1
    assert len(traces) == 1


def test_split_is_stratified_and_batches_are_whole() -> None:
    problem = make_problem(Settings(epochs=3, batch_size=100))
    assert (len(problem.train_y), len(problem.test_y)) == (1347, 450)
    shares = [np.bincount(digits, minlength=10) / len(digits) for digits in (problem.train_y, problem.test_y)]
    np.testing.assert_allclose(*shares, atol=2e-3)
    assert problem.batches.shape == (3, 13, 100)
    for epoch in problem.batches:
        assert len(np.unique(epoch)) == epoch.size
    assert problem.rates.shape == (39,)
    assert np.all(np.diff(problem.rates) < 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1; got 0: leave it out for 40"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'. See maskedlinear demo --help"),
        (["--sparsity", "0", "1"], "--sparsity needs one value for each of the 3 layers; got 2: write it as in"),
        (["--sparsity", "0", "50", "0"], "must be in [0, 1]; got 50: write 50 % as 0.5"),
        (["--sparsity", "0", "0.5", "nan"], "must be in [0, 1]; got nan"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--batch-size", "1348"], "--batch-size must be at most the number of training images, 1347; got 1348: leave"),
        (["--seed", "-1"], "--seed must be in [0, 2**32); got -1: choose a number"),
        (["--framework", "keras"], "argument --framework: invalid choice: 'keras'"),
        (["--out", __file__], "--out must be a folder; cannot make"),
        (["--out", __file__ + "/inside"], "--out must be a folder; cannot make"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("maskedlinear demo: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("modules", "options", "said"),
    [
        (["sklearn"], [], "scikit-learn, which is"),
        (["rich"], [], "rich, which is"),
        (["matplotlib"], [], "matplotlib, which is"),
        (["torch"], [], "torch, which is"),
        (["flax"], [], "flax, which is"),
        (["jax", "optax"], ["--framework", "flax"], "jax and optax, which are"),
    ],
)
def test_missing_packages_are_named(
    modules: list[str],
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", *options]) == 2
    assert capsys.readouterr().err == (
        f'maskedlinear demo needs {said} not installed. Install it with: pip install "maskedlinear[all]"\n'
    )


@pytest.mark.slow
def test_a_framework_that_is_not_asked_for_may_be_missing(tmp_path: Path) -> None:
    done = python(
        "import sys; sys.modules.update(jax=None, flax=None, optax=None)\n"
        "from maskedlinear.cli import main\n"
        f"sys.exit(main(['demo', '--epochs', '1', '--framework', 'torch', '--out', {str(tmp_path)!r}]))"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_imports_no_framework() -> None:
    done = python(
        "import sys, maskedlinear.cli, maskedlinear.demo\n"
        "assert maskedlinear.cli.main(['demo', '--epochs', '0']) == 2\n"
        "print(*{'torch', 'jax', 'flax', 'optax', 'matplotlib', 'rich', 'pytest'} & set(sys.modules))"
    )
    assert done.stdout == "\n"
    assert done.returncode == 0


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskedlinear {importlib.metadata.version('maskedlinear')}\n"
    assert main(["--help"]) == 0
    assert "conformance" in capsys.readouterr().out
    assert main(["demo", "--help"]) == 0
    assert "(default: 0 0.5 0)" in capsys.readouterr().out
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_conformance_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(maskedlinear_conformance.__main__, "main", lambda argv: (seen.append(list(argv)), 5)[1])
    assert main(["conformance", "--backend", "numpy", "-k", "value", "--help"]) == 5
    assert seen == [["--backend", "numpy", "-k", "value", "--help"]]
    done = python(
        "import sys; sys.modules.update(hypothesis=None)\nfrom maskedlinear.cli import main\nsys.exit(main(['conformance']))"
    )
    assert done.returncode == 2
    assert done.stderr == (
        "maskedlinear conformance: maskedlinear_conformance needs hypothesis, which is not installed. "
        'Install it with: pip install "maskedlinear[conformance]"\n'
    )
