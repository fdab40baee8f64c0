"""The callbacks in the real Lightning and the real ``transformers.Trainer``: bit for bit what a plain loop makes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages, when they are imported
    import lightning.pytorch as pl
    from transformers import Trainer, TrainingArguments

    import maskedlinear.lightning as in_lightning
    import maskedlinear.transformers as in_transformers
from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    ScheduledPruning,
    ScheduledRegrowth,
    compress,
    freeze_masked,
    get_masks,
    mask_model,
    prune_model,
    set_masks,
    summary,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' own: few workers, no logger, ...

STEPS, BATCH = 12, 4
X = torch.randn(STEPS * BATCH, 8, generator=torch.Generator().manual_seed(0))


class Data(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"x": X[place]}


class Network(pl.LightningModule):
    """One module for every loop."""

    def __init__(self, sparsity: float = 0.0, form: Any = "dense") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = mask_model(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
        prune_model(self.layers, sparsity, scope="layer")
        self.layers = compress(self.layers, form)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x).square().mean()}

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self(**batch)["loss"]

    def configure_optimizers(self) -> Any:
        return made(self)


def made(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, eps=1e-8)


def plain(model: Network, schedules: list[Any], accumulate: int = 1, steps: int = STEPS) -> Network:
    optimizer = made(model)
    if any(isinstance(mask, torch.Tensor) for mask in get_masks(model).values()):
        freeze_masked(optimizer, model)
    for number in range(steps // accumulate):
        optimizer.zero_grad()
        for schedule in schedules:
            if isinstance(schedule, ScheduledRegrowth):
                schedule.optimizer = optimizer
                context = schedule.recording()
                context.__enter__()
        for part in range(accumulate):
            place = (number * accumulate + part) * BATCH
            (model(X[place : place + BATCH])["loss"] / accumulate).backward()
        if schedules and isinstance(schedules[-1], ScheduledRegrowth):
            context.__exit__(None, None, None)
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    return model


def in_pl(model: Network, schedules: list[Any], where: Path, accumulate: int = 1, **options: Any) -> Network:
    trainer = pl.Trainer(
        max_epochs=options.pop("epochs", 1),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=where,
        accumulate_grad_batches=accumulate,
        callbacks=[in_lightning.MaskedTraining(*schedules)],
    )
    trainer.fit(model, DataLoader(Data(), batch_size=BATCH), **options)
    if "sparsity" in trainer.callback_metrics:
        assert trainer.callback_metrics["sparsity"].item() == pytest.approx(summary(model).sparsity)
    return model


def in_hf(model: Network, schedules: list[Any], where: Path, accumulate: int = 1, **options: Any) -> Network:
    arguments = TrainingArguments(
        str(where),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        learning_rate=0.05,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy=options.pop("save", "no"),
        save_steps=options.pop("save_steps", 500),
        remove_unused_columns=False,
        optim="adamw_torch",
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> None:
            return None

    optimizers = (made(model), None)
    trainer = InOrder(
        model,
        arguments,
        train_dataset=Data(),
        callbacks=[in_transformers.MaskedTraining(*schedules)],
        optimizers=optimizers,
    )
    trainer.train(**options)
    assert any("sparsity" in entry for entry in trainer.state.log_history) or not schedules
    return model


LOOPS = {"lightning": in_pl, "transformers": in_hf}


def same(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pruning_is_that_of_a_plain_loop(loop: str, accumulate: int, tmp_path: Path) -> None:
    start, schedule = Network(), CubicSchedule(0.8, begin=1, end=5, every=2)
    models = []
    for train in (plain, lambda *a, **k: LOOPS[loop](*a, tmp_path, **k)):
        model = copy.deepcopy(start)
        pruner = ScheduledPruning(model, schedule, scope="layer")
        models.append(train(model, [pruner], accumulate=accumulate))
        assert pruner.steps == STEPS // accumulate
    same(*models)
    assert summary(models[1]).sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_regrowth_is_that_of_a_plain_loop(loop: str, form: Any, growth: Any, tmp_path: Path) -> None:
    start = Network(0.5, form)
    models = []
    for train in (plain, lambda *a, **k: LOOPS[loop](*a, tmp_path, **k)):
        model = copy.deepcopy(start)
        models.append(train(model, [ScheduledRegrowth(model, every=3, end=10, growth=growth)]))
    same(*models)
    assert any(
        not torch.equal(start.state_dict()[name], tensor)
        for name, tensor in models[0].state_dict().items()
        if name.endswith(("mask", "indices"))
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_masked_weights_stay_without_any_schedule(loop: str, tmp_path: Path) -> None:
    model = Network(0.5)
    before, masks = copy.deepcopy(model), get_masks(model)
    LOOPS[loop](model, [], tmp_path)
    for name, mask in masks.items():
        one, other = (part.get_submodule(name).weight for part in (model, before))
        assert torch.equal(one[~mask], other[~mask])
        assert (one != other)[mask].any()


def test_training_goes_on_from_a_checkpoint_in_transformers(tmp_path: Path) -> None:
    schedule = CubicSchedule(0.8, begin=1, end=11, every=2)
    whole, resumed = Network(), Network()
    in_hf(whole, [ScheduledPruning(whole, schedule, scope="layer")], tmp_path, save="steps", save_steps=6)
    pruner = ScheduledPruning(resumed, schedule, scope="layer")
    in_hf(resumed, [pruner], tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    same(whole, resumed)


def test_training_goes_on_from_a_checkpoint_in_lightning(tmp_path: Path) -> None:
    schedule = CubicSchedule(0.8, begin=1, end=20, every=2)
    whole, first, resumed = Network(), Network(), Network()
    in_pl(whole, [ScheduledPruning(whole, schedule, scope="layer")], tmp_path, epochs=2)
    half = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[in_lightning.MaskedTraining(ScheduledPruning(first, schedule, scope="layer"))],
    )
    half.fit(first, DataLoader(Data(), batch_size=BATCH))
    half.save_checkpoint(tmp_path / "half.ckpt")
    in_pl(
        resumed,
        [ScheduledPruning(resumed, schedule, scope="layer")],
        tmp_path,
        epochs=2,
        ckpt_path=tmp_path / "half.ckpt",
    )
    same(whole, resumed)


def test_what_is_no_schedule_or_has_no_optimizer_is_refused(tmp_path: Path) -> None:
    for callback in (in_lightning.MaskedTraining, in_transformers.MaskedTraining):
        with pytest.raises(TypeError, match="takes ScheduledPruning and ScheduledRegrowth objects; got CubicSchedule"):
            callback(CubicSchedule(0.5, begin=0, end=1))  # type: ignore[arg-type]

    class Two(Network):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            return [torch.optim.SGD([parameter]) for parameter in self.layers[0].parameters()]

    model = Two(0.5)
    with pytest.raises(ValueError, match="and the trainer has 2: make the ScheduledRegrowth with the one"):
        in_pl(model, [ScheduledRegrowth(model, every=3, end=10)], tmp_path)


@pytest.mark.parametrize("loop", LOOPS)
def test_scores_find_the_gradients_of_their_step(loop: str, tmp_path: Path) -> None:
    models = []
    for train in (plain, lambda *a, **k: LOOPS[loop](*a, tmp_path, **k)):
        model = Network(0.0)
        schedule = CubicSchedule(0.8, begin=0, end=6, every=3)
        train(model, [ScheduledPruning(model, schedule, score="snip", scope="layer")])
        models.append(model)
    same(*models)
    assert summary(models[0]).sparsity == pytest.approx(0.8, abs=0.05)


def test_a_best_checkpoint_with_the_masks_of_an_earlier_step_is_reported() -> None:
    model = Network(0.5)
    callback = in_transformers.MaskedTraining(ScheduledPruning(model, CubicSchedule(0.9, begin=0, end=1)))
    arguments: Any = (None, SimpleNamespace(global_step=1, log_history=[]), None)
    callback.on_train_begin(*arguments, model=model, optimizer=torch.optim.SGD(model.parameters()))
    before = get_masks(model)
    callback.on_optimizer_step(*arguments, model=model)
    callback.on_train_end(*arguments, model=model)  # which is silent
    set_masks(model, before)
    with pytest.warns(
        UserWarning, match=r"masks of an earlier step: sparsity 0\.5, where the schedule has come to 0\.8958"
    ):
        callback.on_train_end(*arguments, model=model)
