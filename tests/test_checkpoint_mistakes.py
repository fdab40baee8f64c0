"""What users do with files that goes wrong: it is told, with what to do, and nothing is lost without a word."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from torch import nn
from torch.nn.utils import prune

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray
from maskedlinear.flax import MaskedDense, MaskedLinear, get_masks, param_masks, prune_model, set_masks
from maskedlinear.flax import mask_model as mask_flax
from maskedlinear.hub import MaskedModelHubMixin
from maskedlinear.jax import apply_masks, freeze_masked
from maskedlinear.torch import import_masks, mask_model


class ConvNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3,), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.conv(x))


def trained(optimizer: Any, **more: Any) -> ConvNet:
    model = mask_flax(ConvNet())
    prune_model(model, 0.5)
    state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    given = {"masks": param_masks(model)} if more else {}
    state.update(model, nnx.grad(lambda model: (model(jnp.ones((2, 5, 2))) ** 2).sum())(model), **given)
    return model


def test_numbers_under_a_mask_that_act_are_told_before_a_file_lacks_them(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", jnp.ones((2, 5, 2))
    model = trained(optax.adamw(0.1))  # moves what is under the masks; only the MaskedLinear selects it away
    assert isinstance(model.head, MaskedLinear)
    assert not isinstance(model.conv, MaskedLinear)
    with pytest.warns(UserWarning, match=r"under the masks of conv\.kernel take part .*freeze_masked") as told:
        checkpoint.save(model, path)
    assert told[0].filename == __file__
    set_masks(model, get_masks(model))
    checkpoint.save(model, path)  # no warning
    np.testing.assert_array_equal(checkpoint.load_into(ConvNet(), path)(x), model(x))
    checkpoint.save(trained(freeze_masked(optax.adamw(0.1)), masks=True), path)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return MaskedDense(3)(linen.Conv(4, (3,))(x))


@pytest.mark.parametrize("keep_dormant", [True, False])
def test_numbers_under_the_masks_of_linen_are_told_where_they_act(tmp_path: Path, keep_dormant: bool) -> None:
    path, net, x = tmp_path / "a.safetensors", LinenNet(), jnp.ones((2, 5, 2))
    variables = mask_flax(net.init(jax.random.key(0), x), keep_dormant=keep_dormant)
    variables = prune_model(variables, 0.5)
    checkpoint.save(variables, path)  # no warning
    moved = {**variables, "params": jax.tree.map(lambda array: array + 1, variables["params"])}  # as without a guard
    for dormant in (False, True):
        with pytest.warns(UserWarning, match=r"under the masks of Conv_0\.kernel take part .*freeze_masked") as told:
            checkpoint.save(moved, path, dormant=dormant)
        assert [one.filename for one in told] == [__file__]
    moved = set_masks(moved, get_masks(moved))
    checkpoint.save(moved, path)  # no warning
    np.testing.assert_array_equal(net.apply(checkpoint.load_into(variables, path), x), net.apply(moved, x))


def test_numbers_under_the_masks_of_a_tree_are_told_if_a_file_lacks_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    params, masks = {"a": jnp.ones((3, 3), jnp.bfloat16), "b": jnp.ones(2)}, {"a": jnp.eye(3, dtype=bool), "b": None}
    for tree in (params, {name: np.asarray(leaf) for name, leaf in params.items()}, nnx.State(params)):
        given = masks if isinstance(tree, dict) else nnx.State(masks)
        with pytest.warns(
            UserWarning, match="under the masks of a are not in the file.* dormant=True keeps them"
        ) as told:
            checkpoint.save(tree, path, masks=given)
        assert [one.filename for one in told] == [__file__]
        checkpoint.save(tree, path, masks=given, dormant=True)  # no warning
        loaded, _ = checkpoint.load_into(params, path)
        np.testing.assert_array_equal(loaded["a"], params["a"])
    checkpoint.save(apply_masks(params, masks), path, masks=masks)  # no warning


def test_a_state_or_a_part_of_pytorch_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = mask_model(nn.Linear(4, 3))
    state = model.state_dict()
    with pytest.raises(TypeError, match=r"save the model, or checkpoint\.read\(state\)"):
        checkpoint.save(state, path)
    with pytest.raises(TypeError, match="load into the model"):
        checkpoint.load_into(state, path)
    for part in (model.weight, torch.optim.SGD(model.parameters())):
        with pytest.raises(
            TypeError, match=rf"takes the model, a torch\.nn\.Module, itself; got {type(part).__name__}"
        ):
            checkpoint.save(part, path)
    assert not path.exists()
    checkpoint.save(checkpoint.read(state), path)
    assert isinstance(checkpoint.load(path)["weight"], MaskedArray)
    checkpoint.load_into(mask_model(nn.Linear(4, 3)), path)


class MaskedLayers(nn.Module, MaskedModelHubMixin):
    def __init__(self) -> None:
        super().__init__()
        self.pruned = nn.Linear(4, 3)
        self.other = CustomizedLinear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.pruned(x))  # type: ignore[no-any-return]


class CustomizedLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.eye(outputs, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def test_masks_of_other_libraries_are_told_when_a_live_model_is_saved(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", MaskedLayers()
    prune.l1_unstructured(model.pruned, "weight", 0.5)
    for save in (
        lambda: checkpoint.save(model, path),
        lambda: model.save_pretrained(tmp_path / "folder"),
    ):
        with pytest.warns(UserWarning, match=r"masks pruned\.weight, other\.weight, .*import_masks\(model\)"):
            save()
    again = MaskedLayers()
    prune.l1_unstructured(again.pruned, "weight", 0.5)
    x = torch.randn(3, 4)
    torch.testing.assert_close(checkpoint.load_into(again, path)(x), model(x), rtol=0, atol=0)  # nothing was lost
    import_masks(model)
    checkpoint.save(model, path)  # no warning
    assert {name for name, array in checkpoint.load(path).items() if isinstance(array, MaskedArray)} == {
        "pruned.weight",
        "other.weight",
    }


def test_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder: make it before a\.safetensors is saved there"):
        checkpoint.save({"a": np.ones(2)}, tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"):
        checkpoint.save({"a": np.ones(2)}, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_files_of_others_are_told_apart_from_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.read reads other formats"):
        checkpoint.load(path)
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="cut off: it has 3 bytes"):
        checkpoint.load(path)
    path.write_bytes(b"\x80\x04}.")  # torch warns of such pickles
    with warnings.catch_warnings(action="error"), pytest.raises(CheckpointError):
        checkpoint.read(path)


def test_an_optimizer_of_other_parameters_is_told_how_to_make_it(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", nn.Linear(4, 3)
    checkpoint.save(model, path, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(CheckpointError, match=r"make it, of this model's parameters as they are now, .* same order"):
        checkpoint.load_into(model, path, optimizer=torch.optim.SGD(nn.Linear(4, 3).parameters()))
    model.register_buffer("optimizer/structure", torch.ones(2))
    with pytest.raises(
        ValueError, match="optimizer/structure is the name of an array of the model and of one of the opt"
    ):
        checkpoint.save(model, path, optimizer=torch.optim.SGD(model.parameters()))


def test_an_optimizer_of_nnx_that_refuses_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rngs = tmp_path / "a.safetensors", nnx.Rngs(0)
    for _ in range(2):  # what is saved, and what is loaded into
        model = nnx.Linear(3, 2, rngs=rngs)
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        if not path.exists():
            checkpoint.save(model, path, optimizer=optimizer)
    before = jnp.array(model.kernel[...])

    def refuse(*_: Any) -> None:
        raise ValueError("no such optimizer")

    with monkeypatch.context() as patched:
        patched.setattr(nnx, "update", refuse)
        with pytest.raises(ValueError, match="no such optimizer"):
            checkpoint.load_into(model, path, optimizer=optimizer)
    np.testing.assert_array_equal(model.kernel[...], before)
    checkpoint.load_into(model, path, optimizer=optimizer)
    assert not np.array_equal(model.kernel[...], before)


def test_an_array_of_another_framework_that_only_has_another_name_is_turned(tmp_path: Path) -> None:
    path, layer = tmp_path / "a.safetensors", nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    checkpoint.save(layer, path)
    arrays = checkpoint.load(
        path
    )  # its kernel, (in, out), is square, so that no shape tells it from a weight, (out, in)
    checkpoint.save({"weight": arrays["kernel"], "bias": arrays["bias"]}, path)
    loaded = checkpoint.load_into(nn.Linear(4, 4), path)
    np.testing.assert_array_equal(loaded.weight.detach().numpy(), np.asarray(layer.kernel[...]).T)


def test_a_plain_file_does_not_open_the_masks_of_a_pruned_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4))
    checkpoint.write_dense(
        {k: checkpoint.PlainArray.of(v.numpy()) for k, v in plain.state_dict().items()}, tmp_path / "p.safetensors"
    )
    model = mask_model(nn.Sequential(nn.Linear(6, 4)))
    checkpoint.load_into(model, tmp_path / "p.safetensors")  # nothing is masked yet
    assert torch.equal(model[0].weight, plain[0].weight)  # type: ignore[index]
    mask = torch.rand(4, 6) < 0.5
    model[0].set_mask(mask)  # type: ignore[index, operator]
    with pytest.raises(CheckpointError, match="says nothing of masks, and 0 would lose theirs"):
        checkpoint.load_into(model, tmp_path / "p.safetensors")
    assert torch.equal(model[0].mask, mask)  # type: ignore[index, arg-type]
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    checkpoint.write_dense(
        {"kernel": checkpoint.PlainArray.of(linear.kernel[...]), "bias": checkpoint.PlainArray.of(linear.bias[...])},  # type: ignore[index]
        tmp_path / "k.safetensors",
    )
    masked = MaskedLinear(6, 4, mask=mask.numpy().T, rngs=nnx.Rngs(1))
    with pytest.raises(CheckpointError, match="says nothing of masks"):
        checkpoint.load_into(masked, tmp_path / "k.safetensors")
    assert np.array_equal(masked.mask[...], mask.numpy().T)
