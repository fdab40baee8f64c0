"""Both forms leave PyTorch: by ``torch.export``, AOTInductor, ONNX, and through the quantiser."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forked import TORCH
from helpers import python
from maskedlinear import masks
from maskedlinear.torch import (
    MaskedLinear,
    SparseLinear,
    compress,
    expand,
    mask_model,
    onnx_translations,
    operator_decompositions,
    prune_model,
    unmask_model,
)
from maskedlinear_torch import _export
from maskedlinear_torch._products import DevicePattern

IN = 128
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
# torch's own, while it exports and quantises
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
]


def masked_model() -> nn.Sequential:
    """A pruned model after a step of an optimizer that counts no edits, ready for inference."""
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(IN, 96), nn.ReLU(), nn.Linear(96, 5, bias=False)))
    prune_model(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, IN)).square().sum().backward()
    optimizer.step()
    return model.eval()  # type: ignore[no-any-return]


def sparse_model() -> nn.Module:
    model = compress(masked_model(), "sparse")
    assert isinstance(model[0], SparseLinear)
    return model


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(4, IN),), dynamic_shapes=({0: torch.export.Dim("batch")},))


class Products(nn.Module):
    """The products that no layer has in its forward pass: the transposed one, and the sampled one of adapters."""

    def __init__(self) -> None:
        super().__init__()
        layer = sparse_model()[0]  # type: ignore[index]
        self.values, self.pattern = layer.weight_values.detach(), DevicePattern.of(layer.pattern, torch.device("cpu"))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        back = torch.ops.maskedlinear.spmm(self.values, left, *self.pattern, True)
        return back, torch.ops.maskedlinear.sddmm(left, right, *self.pattern)


# ONNX


def to_onnx(model: nn.Module, path: Path, *, dynamo: bool = True, table: Any = None) -> Any:
    import onnx

    if dynamo:
        shapes: dict[str, Any] = {
            "dynamic_shapes": ({0: torch.export.Dim("batch")},),
            "custom_translation_table": table,
        }
    else:
        shapes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (torch.randn(4, IN),), path, dynamo=dynamo, verbose=False, external_data=False, **shapes)
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path).graph


def check_onnx(path: Path, model: nn.Module) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 33):
        x = torch.randn(batch, IN)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach())


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_has_plain_weights_of_the_masked_form(tmp_path: Path, dynamo: bool) -> None:
    from onnx import numpy_helper

    model = masked_model()
    graph = to_onnx(model, tmp_path / "model.onnx", dynamo=dynamo)
    assert {node.op_type for node in graph.node} <= {"Gemm", "Relu", "MatMul", "Transpose"}
    weight = next(numpy_helper.to_array(array) for array in graph.initializer if list(array.dims) == [96, IN])
    np.testing.assert_array_equal(weight, model[0].weight.detach())
    assert (weight == 0).mean() > 0.8
    check_onnx(tmp_path / "model.onnx", model)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_onnx_of_the_sparse_form_is_small_and_standard(tmp_path: Path, form: Any) -> None:
    model = sparse_model()
    graph = to_onnx(model, tmp_path / "model.onnx", table=onnx_translations(form))
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert ("Gather" in {node.op_type for node in graph.node}) == (form == "sparse")
    connections = sum(layer.weight_values.numel() for layer in model if isinstance(layer, SparseLinear))
    size = sum(array.ByteSize() for array in graph.initializer)
    assert size < 8 * connections + 12 * (96 + 5) + 1000  # values and int32 indices; of rows starts and the bias
    assert size < 4 * 96 * IN / 3
    check_onnx(tmp_path / "model.onnx", model)


def test_onnx_gathers_where_a_matrix_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_export, "_DENSE", 96 * IN - 1)
    graph = to_onnx(sparse_model(), tmp_path / "model.onnx", table=onnx_translations())
    ops = [node.op_type for node in graph.node]
    assert (ops.count("Gather"), ops.count("MatMul")) == (1, 1)  # the second layer is below that


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_onnx_of_the_other_products(tmp_path: Path, form: Any) -> None:
    import onnxruntime

    model, sides = Products().eval(), (torch.randn(96, 3), torch.randn(IN, 3))
    table = onnx_translations(form)
    torch.onnx.export(model, sides, tmp_path / "model.onnx", dynamo=True, verbose=False, custom_translation_table=table)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, {name: side.numpy() for name, side in zip(names, sides, strict=True)})
    for one, other in zip(found, model(*sides), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other)


def test_onnx_of_a_layer_without_connections_of_empty_rows_and_of_one_row(tmp_path: Path) -> None:
    nothing = MaskedLinear(IN, 4, mask=np.zeros((4, IN)))
    few = np.zeros((6, 4))
    few[1, 2] = few[3, :] = 1  # the first row and the last are empty
    model = nn.Sequential(nothing, MaskedLinear(4, 6, mask=few), MaskedLinear(6, 1, mask=np.ones((1, 6)))).eval()
    with torch.no_grad():
        nothing.bias.copy_(torch.arange(4.0))
    model = compress(model, "sparse")
    for form in ("dense", "sparse"):
        to_onnx(model, tmp_path / "model.onnx", table=onnx_translations(form))  # type: ignore[arg-type]
        check_onnx(tmp_path / "model.onnx", model)


def test_what_onnx_translations_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"form must be 'dense', 'sparse' or None.*; got 'csr'"):
        onnx_translations("csr")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript, .* pip install \"maskedlinear\[onnx\]\""):
        onnx_translations()


# torch.export and AOTInductor


READ = """
import sys, torch
x, y = torch.load("data.pt")
def check(name, load):
    program = load(name)
    for batch in (1, 2, len(x)):
        torch.testing.assert_close(program(x[:batch]), y[name][:batch])
def exported(name): return torch.export.load(name).module()
compiled = torch._inductor.aoti_load_package
"""


def read_elsewhere(path: Path, model: nn.Module, names: list[str], code: str) -> None:
    """Compare what programs of files say in another process, which runs ``code``, with what the model does."""
    x = torch.randn(7, IN)
    torch.save((x, dict.fromkeys(names, model(x).detach())), path / "data.pt")
    result = python(READ + code, path, imported=TORCH)
    assert result.returncode == 0, result.stderr


def test_exported_programs_in_another_process(tmp_path: Path) -> None:
    masked, sparse = exported(masked_model()), exported(sparse_model())
    plain = sparse.run_decompositions(operator_decompositions())
    assert any("maskedlinear" in str(node.target) for node in sparse.graph.nodes)
    assert not any("maskedlinear" in str(node.target) for node in plain.graph.nodes)
    programs = {"masked.pt2": masked, "sparse.pt2": sparse, "plain.pt2": plain}
    for name, program in programs.items():
        torch.export.save(program, tmp_path / name)
    code = """
check("masked.pt2", exported), check("plain.pt2", exported)
assert not [name for name in sys.modules if name.startswith("maskedlinear")]
import maskedlinear.torch
check("sparse.pt2", exported)
"""
    read_elsewhere(tmp_path, masked_model(), list(programs), code)


def test_an_exported_sparse_program_is_smaller_and_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    masked = nn.Sequential(MaskedLinear(IN, 1024, mask=masks.random((1024, IN), sparsity=0.95, seed=0)))
    sparse, sizes = compress(copy.deepcopy(masked), "sparse"), []
    for model in (masked, sparse):
        torch.export.save(exported(model), tmp_path / "model.pt2")
        sizes.append((tmp_path / "model.pt2").stat().st_size)
    assert sizes[1] < sizes[0] / 3
    program, x = exported(sparse).module(), torch.randn(4, IN)
    gradients = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for model in (program, sparse)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_decompositions_of_the_other_products() -> None:
    model, sides = Products(), (torch.randn(96, 3), torch.randn(IN, 3))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, sides, dynamic_shapes=({1: batch}, {1: batch}))
    plain = program.run_decompositions(operator_decompositions())
    assert not any("maskedlinear" in str(node.target) for node in plain.graph.nodes)
    wide = torch.randn(96, 5), torch.randn(IN, 5)
    torch.testing.assert_close(plain.module()(*wide), model(*wide))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="AOTInductor compiles C++, and there is no compiler")
def test_aot_inductor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(IN, 4096, mask=masks.random((4096, IN), sparsity=0.95, seed=0))).eval()
    sparse = exported(compress(copy.deepcopy(model), "sparse"))
    plain = sparse.run_decompositions(operator_decompositions())
    programs = {"masked.pt2": exported(model), "plain.pt2": plain, "sparse.pt2": sparse}
    for name, program in programs.items():
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / name))
    code = """
check("masked.pt2", compiled), check("plain.pt2", compiled)
assert not [name for name in sys.modules if name.startswith("maskedlinear")]
import maskedlinear.torch
check("sparse.pt2", compiled)
"""
    read_elsewhere(tmp_path, model, list(programs), code)
    sizes = [(tmp_path / name).stat().st_size for name in programs]
    assert max(sizes[1:]) < sizes[0]


# Quantisers


def test_a_quantiser_takes_plain_layers_only() -> None:
    """It goes by exact types, and says nothing of what it leaves alone: ``unmask_model`` comes first."""
    model, x = masked_model(), torch.randn(4, IN)
    y = model(x)
    for kept in (model, sparse_model()):
        untouched = torch.ao.quantization.quantize_dynamic(kept, {nn.Linear}, dtype=torch.qint8)
        assert [type(layer) for layer in untouched] == [type(layer) for layer in kept]
    for plain in (unmask_model(copy.deepcopy(model)), unmask_model(expand(sparse_model()))):
        small = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
        assert isinstance(small[0], torch.ao.nn.quantized.dynamic.Linear)
        assert not small[0].weight().int_repr()[~model[0].mask].any()  # +0 is 0 in int8
        assert small[0].weight().int_repr()[model[0].mask].any()
        torch.testing.assert_close(small(x), y, atol=0.05, rtol=0.05)


def pruned() -> Any:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))).eval()
    prune_model(model, 0.9, scope="layer")
    return model


@torch.no_grad()
def test_torchao_takes_an_unmasked_model_and_keeps_zeros() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package, when it is imported
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x = pruned(), torch.randn(8, 64)
    y = model(x)
    live = [layer.mask.clone() for layer in (model[0], model[2])]
    for plain in (unmask_model(copy.deepcopy(model)), unmask_model(expand(compress(copy.deepcopy(model), "sparse")))):
        quantize_(plain, Int8WeightOnlyConfig())
        for layer, mask in zip((plain[0], plain[2]), live, strict=True):
            assert type(layer.weight) is not nn.Parameter
            assert not layer.weight.dequantize()[~mask].any()
        torch.testing.assert_close(plain(x), y, rtol=0, atol=0.02 * float(y.abs().max()))
    sparse = compress(copy.deepcopy(model), "sparse")
    quantize_(sparse, Int8WeightOnlyConfig())  # which passes over it
    torch.testing.assert_close(sparse(x), y)
    quantize_(model, Int8WeightOnlyConfig())  # without unmask_model: an error, and no wrong outputs
    with pytest.raises(NotImplementedError, match="where"):
        model(x)
