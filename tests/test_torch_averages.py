"""Averages of masked models: what torch and Lightning average is the network that acts, and masks follow the model's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages, when they are imported
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
    from transformers import Trainer, TrainingArguments

    import maskedlinear.lightning as in_lightning
    import maskedlinear.transformers as in_transformers
from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    MaskedLinear,
    ScheduledPruning,
    ScheduledRegrowth,
    SparseLinear,
    check_masks,
    compress,
    freeze_masked,
    get_masks,
    mask_model,
    prune_model,
    set_masks,
    summary,
)

DECAY = 0.9
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def network(sparsity: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    prune_model(model, sparsity, scope="layer")
    return model  # type: ignore[return-value]


def train(model: nn.Module, steps: int) -> Iterator[int]:
    """Train; after each step of the optimizer the body of the caller's loop runs."""
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model)
    for step in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        yield step


class Reference:
    """An average of what acts: the parameters of the plain model with zeros, averaged by hand in float64."""

    def __init__(self, model: nn.Module, ema: bool) -> None:
        self.ema, self.count, self.values = ema, 0, [parameter.double() for parameter in self.acting(model)]

    @staticmethod
    def acting(model: nn.Module) -> list[Tensor]:
        return [
            torch.where(layer.mask, parameter, 0) if name == "weight" else parameter.detach().clone()
            for layer in model.modules()
            if isinstance(layer, MaskedLinear)
            for name, parameter in layer.named_parameters()
        ]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        share = 1.0 if self.count == 0 else 1 - DECAY if self.ema else 1 / (self.count + 1)
        self.values = [
            old + share * (new.double() - old) for old, new in zip(self.values, self.acting(model), strict=True)
        ]
        self.count += 1

    def outputs(self) -> Tensor:
        first, first_bias, last, last_bias = (value.float() for value in self.values)
        return torch.tanh(X @ first.mT + first_bias) @ last.mT + last_bias

    def mask(self, masks: dict[str, Tensor]) -> None:
        self.values[0] = torch.where(masks["0"], self.values[0], 0)
        self.values[2] = torch.where(masks["2"], self.values[2], 0)


def averaged(model: nn.Module, ema: bool, use_buffers: bool) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY) if ema else None, use_buffers=use_buffers)


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("ema", "use_buffers"), [(True, False), (True, True), (False, False)])
def test_an_average_is_that_of_the_weights_that_act(ema: bool, use_buffers: bool) -> None:
    model = network()
    prune_model(model, 0.5)
    average, reference = averaged(model, ema, use_buffers), Reference(model, ema)
    with silence():
        for _ in train(model, 100):
            average.update_parameters(model)
            reference.update(model)
        torch.testing.assert_close(average(X), reference.outputs())
        assert summary(average).sparsity == pytest.approx(0.5, abs=0.01)
        assert check_masks(average, X).ok
        for layer in (average.module[0], average.module[2]):
            assert not layer.weight[~layer.mask].any()


@pytest.mark.parametrize(("ema", "use_buffers"), [(True, False), (True, True), (False, False)])
def test_masks_follow_by_hand_when_the_model_is_pruned_meanwhile(ema: bool, use_buffers: bool) -> None:
    model = network()
    average, reference = averaged(model, ema, use_buffers), Reference(model, ema)
    with silence():
        for step in train(model, 100):
            if step == 50:
                prune_model(model, 0.5)
                set_masks(average, get_masks(model))
                reference.mask(get_masks(model))
            average.update_parameters(model)
            reference.update(model)
        torch.testing.assert_close(average(X), reference.outputs())
    assert summary(average).sparsity == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(mask, get_masks(average)[f"module.{name}"]) for name, mask in get_masks(model).items())


def test_the_mean_of_masks_is_an_error_of_torch_and_copying_them_is_the_way_round() -> None:
    model = network(0.5)
    average = averaged(model, ema=False, use_buffers=True)
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match=r"[Bb]ool"):
        average.update_parameters(model)
    average = averaged(model, ema=False, use_buffers=False)
    average.update_parameters(model)
    prune_model(model, 0.8)
    average.update_parameters(model)
    set_masks(average, get_masks(model))
    assert summary(average).sparsity == summary(model).sparsity


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_masks_pass_every_wrapping(wrap: Any) -> None:
    for model in (network(), MaskedLinear(8, 4)):
        average = AveragedModel(wrap(model))
        prune_model(model, 0.5)
        set_masks(average, get_masks(model))
        assert summary(average).sparsity == 0.5
        set_masks(model, {name: ~mask for name, mask in get_masks(average).items()})
        for one, other in zip(get_masks(model).values(), get_masks(average).values(), strict=True):
            assert torch.equal(one, ~other)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_schedule_brings_the_masks_to_averages(use_buffers: bool) -> None:
    model = network()
    average, reference = averaged(model, True, use_buffers), Reference(model, True)
    plain = copy.deepcopy(model)
    schedule = CubicSchedule(0.8, begin=5, end=30, every=5)
    pruner = ScheduledPruning(model, schedule, averages=[average, plain], scope="layer")
    with silence():
        for _ in train(model, 40):
            if pruner.step():
                reference.mask(get_masks(model))
            average.update_parameters(model)
            reference.update(model)
            for name, mask in get_masks(model).items():
                assert torch.equal(get_masks(average)[f"module.{name}"], mask)
                assert torch.equal(get_masks(plain)[name], mask)
        torch.testing.assert_close(average(X), reference.outputs())
    assert summary(model).sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_connections_move_in_averages_too(form: Any, use_buffers: bool) -> None:
    model = compress(network(0.5), form)
    average = averaged(model, True, use_buffers)
    regrowth = ScheduledRegrowth(model, every=5, end=40, growth="random", averages=[average])
    moved, expected = 0, {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if form == "dense":
        freeze_masked(optimizer, model)
    with silence():
        for _ in range(30):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
            moved += regrowth.step()
            for name, layer in model.named_children():
                if name != "1":
                    pattern = layer.mask if form == "dense" else torch.from_numpy(layer.pattern.to_mask())
                    old = torch.where(pattern, expected.get(name, layer.weight.detach()), 0)
                    share = 1.0 if name not in expected else 1 - DECAY
                    expected[name] = old + share * (layer.weight.detach() - old)
            average.update_parameters(model)
        y = X @ expected["0"].mT + average.module[0].bias
        torch.testing.assert_close(average(X), torch.tanh(y) @ expected["2"].mT + average.module[2].bias)
    assert moved > 0
    assert summary(average).sparsity == summary(model).sparsity


def test_an_average_of_sparse_layers_is_that_of_their_values() -> None:
    model = compress(network(0.5), "sparse")
    average = averaged(model, True, use_buffers=True)
    dense = averaged(network(0.5), True, use_buffers=True)
    twin = copy.deepcopy(dense.module)
    for _ in range(20):
        with torch.no_grad():
            for sparse, layer in zip(model.children(), twin.children(), strict=True):
                if isinstance(sparse, SparseLinear):
                    sparse.weight_values.mul_(0.9)
                    layer.weight[layer.mask] = sparse.weight_values
        average.update_parameters(model)
        dense.update_parameters(twin)
    torch.testing.assert_close(average(X), dense(X))
    assert average.module[0].pattern == model[0].pattern


def test_an_average_that_goes_through_two_states_side_by_side_takes_each_for_its_own() -> None:
    model = nn.Sequential(MaskedLinear(6, 6, bias=False), MaskedLinear(6, 6, bias=False))
    average, before = copy.deepcopy(model), [layer.weight.detach().clone() for layer in model]  # as timm's ModelEmaV2
    prune_model(model, 0.5)
    assert list(average.state_dict()) == list(model.state_dict())
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mean.copy_(0.5 * mean + 0.5 * value)
    for mean, old, layer in zip(average, before, model, strict=True):
        assert torch.equal(mean.weight, 0.5 * old + 0.5 * layer.weight)
    set_masks(average, get_masks(model))
    assert summary(average).sparsity == 0.5


def test_a_copy_whose_mask_would_erase_what_has_grown_warns() -> None:
    model = network(0.5)
    average = copy.deepcopy(model)
    assert check_masks(average, X).ok, "whose gradients do not make it a trained model"
    set_masks(model, {name: ~mask for name, mask in get_masks(model).items()})
    with torch.no_grad():  # somebody's own average, of parameters alone
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 0.1)
    with pytest.warns(UserWarning, match="values under the mask of MaskedLinear.* are set back to 0"):
        average(X)
    with silence():
        average(X)
        set_masks(average, get_masks(model))
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(parameter.data, 0.1)
        average(X)


def test_a_copy_that_is_trained_or_loaded_does_not_warn() -> None:
    model = network(0.5)
    with silence():
        for fused in (False, True):
            trained = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
            for _ in range(3):
                trained(X).square().mean().backward()
                optimizer.step()
            copy.deepcopy(trained).eval()(X)
            target = copy.deepcopy(model)
            target.load_state_dict(trained.state_dict())
            target(X)
            target.load_state_dict(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).state_dict())
            target.eval().double()(X.double())
        twice = copy.deepcopy(copy.deepcopy(model))
        twice(X)
        twice[0].reset_parameters()  # type: ignore[operator]
        twice.eval()(X)


class Network(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.validated = network(), []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layers(batch).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, _: int) -> None:
        assert all(not layer.weight[~layer.mask].any() for layer in self.layers if isinstance(layer, MaskedLinear))
        self.validated.append(self.layers(X))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def in_pl(model: Network, callbacks: list[Any], where: Path) -> None:
    trainer = pl.Trainer(
        max_epochs=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=where,
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(X, batch_size=4), DataLoader(X[:4]))  # type: ignore[arg-type]


def by_hand(ema: bool, schedule: CubicSchedule) -> list[Tensor]:
    """Return the outputs of the average at each validation, and at the end."""
    model = network()
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model)
    average, validated = Reference(model, ema), []
    for step in range(20):
        optimizer.zero_grad()
        model(X[4 * (step % 10) : 4 * (step % 10) + 4]).square().mean().backward()
        optimizer.step()
        if schedule.due(step):
            prune_model(model, schedule(step), scope="layer")
            average.mask(get_masks(model))
        average.update(model)
        if step % 10 in (3, 7):
            validated += [average.outputs()] * 4
    return [*validated, average.outputs()]


SCHEDULE = CubicSchedule(0.8, begin=2, end=15, every=3)


@pytest.mark.filterwarnings("ignore")  # the trainer's own: few workers, no logger, ...
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("averaged_first", [False, True])
def test_lightning_averages_what_acts(ema: bool, averaged_first: bool, tmp_path: Path) -> None:
    model = Network()
    averaging = EMAWeightAveraging(decay=DECAY) if ema else WeightAveraging(use_buffers=False)
    pruner = ScheduledPruning(model.layers, SCHEDULE, scope="layer")
    callbacks = [in_lightning.MaskedTraining(pruner), averaging]
    in_pl(model, callbacks[::-1] if averaged_first else callbacks, tmp_path)
    assert summary(averaging._average_model).sparsity == summary(model).sparsity == pytest.approx(0.8, abs=0.01)
    assert check_masks(model.layers, X).ok
    outputs = [*model.validated, model.layers(X)]
    if not averaged_first:  # else what is pruned was averaged once more
        for y, expected in zip(outputs, by_hand(ema, SCHEDULE), strict=True):
            torch.testing.assert_close(y, expected)
    torch.testing.assert_close(averaging._average_model.module.layers(X), outputs[-1])


@pytest.mark.filterwarnings("ignore")
def test_an_average_that_lightning_keeps_elsewhere_is_an_error(tmp_path: Path) -> None:
    class Elsewhere(WeightAveraging):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            self.average = vars(self).pop("_average_model")

    with pytest.raises(RuntimeError, match=r"that a Elsewhere keeps, .* and pass averages=\[average\]"):
        in_pl(Network(), [in_lightning.MaskedTraining(), Elsewhere()], tmp_path)


class Averaging(pl.Callback):
    """Somebody's own average of parameters alone."""

    def __init__(self, average: nn.Module) -> None:
        self.average = average

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for mean, parameter in zip(self.average.parameters(), pl_module.parameters(), strict=True):
            mean.lerp_(parameter, 1 - DECAY)


@pytest.mark.filterwarnings("ignore")
def test_lightning_brings_the_masks_to_averages_that_are_named(tmp_path: Path) -> None:
    model = Network()
    average = copy.deepcopy(model)
    pruner = ScheduledPruning(model.layers, SCHEDULE, scope="layer")
    in_pl(model, [in_lightning.MaskedTraining(pruner, averages=[average]), Averaging(average)], tmp_path)
    assert summary(average).sparsity == pytest.approx(0.8, abs=0.01)
    for name, mask in get_masks(model).items():
        assert torch.equal(get_masks(average)[name], mask)


@pytest.mark.filterwarnings("ignore")
def test_transformers_brings_the_masks_to_averages_that_are_named(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.layers(x).square().mean()}

    model = Model()
    average = averaged(model, True, use_buffers=False)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    pruner = ScheduledPruning(model.layers, SCHEDULE, scope="layer")
    callback = in_transformers.MaskedTraining(pruner, averages=[average])
    Trainer(model, arguments, train_dataset=[{"x": x} for x in X], callbacks=[callback]).train()  # type: ignore[arg-type]
    assert summary(average).sparsity == pytest.approx(0.8, abs=0.01)
    for name, mask in get_masks(model).items():
        assert torch.equal(get_masks(average)[f"module.{name}"], mask)


def test_what_is_no_average_is_refused() -> None:
    for callback in (in_lightning.MaskedTraining, in_transformers.MaskedTraining):
        with pytest.raises(TypeError, match=r"averages are modules; got str: pass averages=\[average\]"):
            callback(averages=["average"])  # type: ignore[list-item]
    model = network()
    pruner = ScheduledPruning(model, CubicSchedule(0.5, begin=0, end=1), averages=[nn.Linear(8, 4)])
    with pytest.raises(ValueError, match="got one in which 0 is a NoneType, where the model has a MaskedLinear"):
        pruner.step()
    regrowth = ScheduledRegrowth(model, every=1, end=3, growth="random", averages=[compress(network(), "sparse")])
    assert regrowth.step() == 0
    with pytest.raises(ValueError, match="got one in which 0 is a SparseLinear, where the model has a MaskedLinear"):
        regrowth.step()
