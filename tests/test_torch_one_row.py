"""One row of x through a sparse layer without gradients: MKL reads memory by what it is told, so that is looked at first."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers import python
from maskedlinear import kernels, masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import SparseLinear

OUT, IN = 20, 40
WITH_AND_WITHOUT = pytest.mark.parametrize("with_kernels", [True, False])


@pytest.fixture
def layer() -> SparseLinear:
    made = SparseLinear(IN, OUT, pattern=SparsityPattern.from_mask(masks.random((OUT, IN), sparsity=0.8, seed=0)))
    with torch.no_grad():
        made(torch.ones(1, IN))  # the matrix is made
    return made


def without_kernels(monkeypatch: pytest.MonkeyPatch, with_kernels: bool) -> None:
    if not with_kernels:
        monkeypatch.setattr(kernels, "is_available", lambda: False)


def numbers(layer: SparseLinear, live: int) -> Tensor:
    """Return values of which the layer's are ``live`` apart from each other."""
    return torch.randn(layer.weight_values.numel() * live, generator=torch.Generator().manual_seed(0))


ELSEWHERE: dict[str, Callable[[SparseLinear], Tensor]] = {
    "every other": lambda layer: numbers(layer, 2)[::2],
    "from the end": lambda layer: numbers(layer, 1).flip(0),
    "negated": lambda layer: torch._neg_view(numbers(layer, 1)),
    "one for all": lambda layer: numbers(layer, 1)[:1].expand(layer.weight_values.numel()),
}


@WITH_AND_WITHOUT
@pytest.mark.parametrize("lies", ELSEWHERE)
def test_values_that_lie_otherwise_from_the_same_place_on(
    lies: str, with_kernels: bool, layer: SparseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, with_kernels)
    values, x = ELSEWHERE[lies](layer), torch.randn(1, IN)
    with torch.no_grad():
        layer.weight_values.data = (
            values.as_strided((values.numel(),), (1,)) if values.stride() != (0,) else values.clone()
        )
        layer(x)
        layer.weight_values.data = values
        dense = torch.zeros(OUT * IN).index_put((torch.tensor(layer.pattern.places),), values).reshape(OUT, IN)
        torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("count", [1, 5, 159, 161, 320])
def test_another_number_of_values_is_refused(
    count: int, with_kernels: bool, layer: SparseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, with_kernels)
    told = re.escape(f"values must have one entry for each of the pattern's 160 connections; got shape ({count},)")
    with torch.no_grad():
        with pytest.raises(ValueError, match=told):
            torch.func.functional_call(layer, {"weight_values": torch.ones(count)}, (torch.ones(1, IN),))
        layer.weight_values.data = torch.ones(320)[:count]
        for fresh in (layer, SparseLinear(IN, OUT, pattern=layer.pattern)):
            fresh.weight_values.data = torch.ones(320)[:count]
            with pytest.raises(ValueError, match=told):
                fresh(torch.ones(1, IN))


@WITH_AND_WITHOUT
@pytest.mark.parametrize("shape", [(1,), (OUT + 1,), (OUT, 1), (1, OUT)])
def test_a_bias_of_another_shape_is_refused(
    shape: tuple[int, ...], with_kernels: bool, layer: SparseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, with_kernels)
    layer.bias = nn.Parameter(torch.ones(shape))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=re.escape(f"bias must have shape (out,) = (20,); got {shape}")),
    ):
        layer(torch.ones(1, IN))


@WITH_AND_WITHOUT
@pytest.mark.parametrize("name", ["weight_values", "bias"])
def test_memory_that_was_freed_is_not_read(
    name: str, with_kernels: bool, layer: SparseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, with_kernels)
    getattr(layer, name).untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"storage|not allocated"):
        layer(torch.ones(1, IN))


@WITH_AND_WITHOUT
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("is_made", [True, False])
@pytest.mark.parametrize("name", ["indices", "indptr"])
def test_indices_that_were_written_over_lead_nowhere(
    name: str, is_made: bool, rows: int, with_kernels: bool, layer: SparseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, with_kernels)
    if not is_made:
        layer = SparseLinear(IN, OUT, pattern=layer.pattern)
    for wrong in (2**30, -(2**30), -1, 1000):
        with torch.no_grad():
            getattr(layer, name)[1:].fill_(wrong)
            if with_kernels and kernels.is_available():
                assert layer(torch.ones(rows, IN)).shape == (rows, OUT)  # an index beyond its end is taken for the last
            else:
                with pytest.raises(RuntimeError, match="is not satisfied"):
                    layer(torch.ones(rows, IN))


@WITH_AND_WITHOUT
def test_indices_that_were_written_to_and_are_right_are_taken(
    with_kernels: bool, layer: SparseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, with_kernels)
    x = torch.randn(1, IN)
    with torch.no_grad():
        before = layer(x)
        layer.indices.copy_(layer.indices.clone())
        torch.testing.assert_close(layer(x), before)


FORKED = """
import os, signal, warnings
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "2"
warnings.simplefilter("ignore")
import torch
from maskedlinear import masks
from maskedlinear.torch import SparseLinear
layers = [SparseLinear(16, 16, mask=masks.random((16, 16), sparsity=0.5, seed=seed)) for seed in range(2)]
torch.ones(500, 500) @ torch.ones(500, 500)  # a pool has threads now, which stay in the parent
x = torch.randn({rows}, 16)
def products():
    found = []
    for layer in layers:
        with torch.no_grad():
            found.append(layer(x))
        y = layer(x.clone().requires_grad_())
        y.sum().backward()
        found += [y.detach(), layer.weight_values.grad]
    return found
with torch.no_grad():
    layers[0](x)
child = os.fork()
if not child:
    signal.alarm(60)
    torch.save(products(), {file!r})
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for one, other in zip(products(), torch.load({file!r}) if not status else [], strict=True):
    torch.testing.assert_close(one, other)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@WITH_AND_WITHOUT
@pytest.mark.parametrize("rows", [1, 3])
def test_a_forked_child_waits_for_no_thread_of_the_parent(
    rows: int, with_kernels: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_kernels:
        monkeypatch.setenv("MASKEDLINEAR_KERNELS", "0")
    done = python(FORKED.format(rows=rows, file=f"{tmp_path}/found.pt"))
    assert not done.returncode, done.stderr


COMPILES = """
import os, signal, threading
import torch
from maskedlinear import masks
from maskedlinear.kernels import _engine
from maskedlinear.torch import SparseLinear
layer, x = SparseLinear(64, 64, mask=masks.random((64, 64), sparsity=0.7, seed=0)), torch.ones(33, 64)
wants, begun = [("spmm", "float64", 16), ("sddmm", "float64", 16), ("sddmm", "float32", 16)], threading.Event()
def work():
    begun.set()
    for want in wants:
        _engine.address(*want)
thread = threading.Thread(target=work)
thread.start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    layer(x)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(
    not hasattr(os, "fork") or not kernels.is_available(), reason="there is no fork, or there are no kernels"
)
def test_a_child_that_is_forked_while_a_thread_compiles_compiles_too() -> None:
    done = python("import warnings; warnings.simplefilter('ignore')\n" + COMPILES)
    assert not done.returncode, done.stderr
