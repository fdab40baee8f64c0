"""Ways out for the sparse form's operators, which nothing outside this library knows: standard ones in their place.

``torch.export`` keeps :func:`spmm` and :func:`sddmm` as they are, so that a program stays fast and can be trained. An
exporter, or a process without this library, needs operators of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from maskedlinear._extras import missing_framework
from maskedlinear_torch._products import DevicePattern, sddmm_expression, spmm_expression

__all__ = ["onnx_translations", "operator_decompositions"]

_DENSE = 1 << 28  # entries of the largest matrix that is put together unless one is asked for: 1 GiB of float32


def operator_decompositions() -> dict[Any, Callable[..., Tensor]]:
    """Return what the sparse form's operators are in those of torch alone, for ``ExportedProgram.run_decompositions``::

        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
        torch.export.save(program.run_decompositions(operator_decompositions()), "model.pt2")

    A process that loads the program, or what AOTInductor makes of it, then needs torch only. Without it, ``import
    maskedlinear.torch`` comes before loading, and the products are the library's own, which take less time: in torch's
    operators they gather connections × batch numbers at once. Besides, ``run_decompositions`` takes apart what torch itself
    counts as composite.
    """

    def spmm(values: Tensor, right: Tensor, *rest: Any) -> Tensor:
        return spmm_expression(values, right, DevicePattern(*rest[:5]), rest[5])

    def sddmm(left: Tensor, right: Tensor, *rest: Tensor) -> Tensor:
        return sddmm_expression(left, right, DevicePattern(*rest))

    return {torch.ops.maskedlinear.spmm.default: spmm, torch.ops.maskedlinear.sddmm.default: sddmm}


def onnx_translations(form: Literal["dense", "sparse"] | None = None) -> dict[Any, Callable[..., Any]]:
    """Return what the sparse form's operators are in standard ONNX (opset 18), for ``custom_translation_table``::

        torch.onnx.export(model, (x,), "model.onnx", dynamo=True, dynamic_shapes=({0: Dim("batch")},),
                          custom_translation_table=onnx_translations())

    The file holds two numbers a connection, its value and its input, in either form. What a runtime makes of them:

    - ``"dense"``: the whole matrix, put together of constants, which onnxruntime does once, on loading; then it
      multiplies as in a dense layer. The fastest at nearly every density, and memory that of the dense layer.
    - ``"sparse"``: it gathers connections × batch numbers at every call, and adds them up. For matrices that do not fit
      into memory, and for one row at a time where one in a hundred weights is there, or fewer.

    Infinity or NaN in x reaches, in the dense form only, what it is not connected to. Layers without a sparse form
    (``MaskedLinear``, any other module) need no translation, and the table leaves them alone.

    Args:
        form: how a layer is computed; ``None`` is ``"dense"`` for matrices of up to 2²⁸ entries, ``"sparse"`` beyond.

    Raises:
        ValueError: if ``form`` is none of these.
        ModuleNotFoundError: if onnxscript, which torch's exporter needs, is not installed: it is in the extra ``onnx``.
    """
    if form not in (None, "dense", "sparse"):
        raise ValueError(f"form must be 'dense', 'sparse' or None, which chooses by size; got {form!r}")
    try:
        from onnx.helper import make_tensor
        from onnxscript import opset18
    except ModuleNotFoundError as error:
        raise missing_framework(error, "onnx_translations", "onnx", "onnx", "onnxscript") from error

    op: Any = opset18  # its types know the numbers of one node at a time

    def ints(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    def full(shape: Any, like: Any, number: int = 0) -> Any:
        # Not an Expand, of which torch's optimizer makes an array in the file, and of all that is computed with it.
        return op.ConstantOfShape(shape, value=make_tensor("value", int(like.dtype), [1], [number]))

    def rows_of(indptr: Any, nnz: int) -> Any:
        """The row of each connection, (nnz,): how many rows have ended before it."""
        ends, ones = op.Slice(indptr, ints(1), ints(-1), ints(0)), full(ints(indptr.shape[0] - 2), indptr, 1)
        marks = op.ScatterElements(full(ints(nnz + 1), indptr), ends, ones, axis=0, reduction="add")
        return op.Slice(op.CumSum(marks, op.Constant(value_int=0)), ints(0), ints(nnz), ints(0))

    def matrix(values: Any, rows: Any, indices: Any, shape: tuple[int, int]) -> Any:
        """W, put together: (out, in)."""
        width = full(ints(1), indices, shape[1])
        if shape[0] * shape[1] >= 1 << 31:
            rows, indices, width = (op.Cast(one, to=_INT64) for one in (rows, indices, width))
        places = op.Add(op.Mul(rows, width), indices)
        flat = op.ScatterElements(full(ints(shape[0] * shape[1]), values), places, values, axis=0)
        return op.Reshape(flat, ints(*shape))

    def spmm(
        values: Any, right: Any, indptr: Any, indices: Any, starts: Any, outputs: Any, order: Any, transposed: bool
    ) -> Any:
        nnz, out, in_ = indices.shape[0], indptr.shape[0] - 1, starts.shape[0] - 1
        if nnz and (form == "dense" or (form is None and out * in_ <= _DENSE)):
            whole = matrix(values, rows_of(indptr, nnz), indices, (out, in_))
            return op.MatMul(op.Transpose(whole, perm=[1, 0]) if transposed else whole, right)
        batch = op.Slice(op.Shape(right), ints(1), ints(2), ints(0))
        nothing = full(op.Concat(ints(in_ if transposed else out), batch, axis=0), right)
        if not nnz:
            return nothing
        rows = rows_of(indptr, nnz)
        of, across = (indices, rows) if transposed else (rows, indices)
        gathered = op.Mul(op.Gather(right, across, axis=0), op.Unsqueeze(values, ints(1)))
        places = op.Expand(op.Unsqueeze(of, ints(1)), op.Shape(gathered))
        return op.ScatterElements(nothing, places, gathered, axis=0, reduction="add")

    def sddmm(left: Any, right: Any, indptr: Any, indices: Any, starts: Any, outputs: Any, order: Any) -> Any:
        rows = rows_of(indptr, indices.shape[0])
        products = op.Mul(op.Gather(left, rows, axis=0), op.Gather(right, indices, axis=0))
        return op.ReduceSum(products, ints(1), keepdims=0)

    return {torch.ops.maskedlinear.spmm.default: spmm, torch.ops.maskedlinear.sddmm.default: sddmm}


_INT64 = 7  # onnx.TensorProto.INT64
