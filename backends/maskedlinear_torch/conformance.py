"""The PyTorch backend, as the conformance suite sees it: :class:`maskedlinear.backends.Backend` for torch."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torch.utils.checkpoint import checkpoint

from maskedlinear import masks
from maskedlinear.backends import DISTRIBUTED, LAYERS
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import _conformance_distributed, masked_linear, sparse_linear
from maskedlinear_torch._conformance_distributed import DistributedTorchLayer
from maskedlinear_torch._conformance_layers import Placed, TorchLayer, as_numpy, made, values_of
from maskedlinear_torch._products import DevicePattern
from maskedlinear_torch._sparse import product

__all__ = ["TorchBackend"]

Bias = Tensor | None
Call = Callable[..., Tensor]

_OF_SPARSE_LAYERS = ("layer", "save", "files", "conversion", "other readers")


class TorchBackend:
    """``masked_linear`` and ``sparse_linear``, and their layers. See :mod:`maskedlinear.backends`."""

    name = "torch"
    formats = ("dense", "sparse")

    def __init__(self, format: str = "dense") -> None:
        self.format = format
        self._compiled_derivative = cache(self._compile_derivative)

    def versions(self) -> Mapping[str, str]:
        """Return the versions of torch and, where it is built for one, CUDA."""
        cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
        return {"torch": torch.__version__, **cuda}

    def devices(self) -> Sequence[str]:
        """Return the CPU, and CUDA where there is a device."""
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def device_name(self, device: str) -> str:
        """Return the GPU's name, or the machine's architecture."""
        return torch.cuda.get_device_name() if device == "cuda" else platform.machine()

    def dtypes(self, device: str) -> Sequence[str]:
        """Return the dtypes of the layer."""
        return ("float64", "float32", "bfloat16", "float16")

    def unsupported(self) -> Mapping[str, str]:
        """Return what torch does not have."""
        unsupported = {"scan": "torch has no stable scan", "read-only": "torch has no read-only tensors"}
        unsupported["devices"] = "of torch each device has a process of its own"
        unsupported["compiled program"] = "torch has no program of all processes to count in"
        if not torch.distributed.is_available():
            unsupported |= dict.fromkeys(DISTRIBUTED, "this torch is built without torch.distributed")
        if not shutil.which("g++"):
            for name in ("compile", "compile of derivatives", "compile of the hessian"):
                unsupported[name] = "torch.compile needs a C++ compiler, and there is none here"
        if self.format == "sparse":
            unsupported["vmap over the mask"] = "a pattern decides how many values there are"
            for name in ("distributed masks", "distributed pruning"):
                unsupported[name] = "the sparse form has live connections only"
            dense_only = (name for name in LAYERS if name not in _OF_SPARSE_LAYERS)
            unsupported |= dict.fromkeys(dense_only, "the sparse form has live connections only")
        return unsupported

    def expected_failures(self, device: str) -> Mapping[str, str]:
        """Return nothing: no law is known to break."""
        return {}

    @contextmanager
    def strict_precision(self) -> Iterator[None]:
        """Turn TF32 and reductions in half precision off."""
        matmul = torch.backends.cuda.matmul
        precision = torch.get_float32_matmul_precision()
        half, brain = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
        try:
            torch.set_float32_matmul_precision("highest")
            matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            matmul.allow_fp16_reduced_precision_reduction = half
            matmul.allow_bf16_reduced_precision_reduction = brain

    def asarray(self, values: NDArray[Any], dtype: str, device: str, layout: str = "contiguous") -> Tensor:
        """Return ``values`` as a tensor."""
        kind = torch.bool if values.dtype == bool else getattr(torch, dtype)
        tensor = torch.tensor(np.asarray(values)).to(device=device, dtype=kind)
        if layout == "transposed":
            return tensor.permute(*range(tensor.dim())[::-1]).contiguous().permute(*range(tensor.dim())[::-1])
        if layout == "strided":
            return tensor.repeat_interleave(2, -1)[..., ::2]
        return tensor[:1].expand(tensor.shape) if layout == "broadcast" else tensor

    def asnumpy(self, array: Tensor) -> NDArray[Any]:
        """Return a copy of ``array`` in float64, or as it is if boolean."""
        return as_numpy(array)

    def masked_linear(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
        """Return ``y``."""
        return self.op(x, weight, self._prepared(mask), bias)

    def op(self, x: Tensor, weight: Tensor, mask: Any, bias: Bias) -> Tensor:
        """Return ``y`` by the rules; of the sparse form, of the weights at the connections of the pattern ``mask``."""
        if isinstance(mask, SparsityPattern):
            return sparse_linear(x, values_of(weight, mask), mask, bias)
        return masked_linear(x, weight, mask, bias)

    def _prepared(self, mask: Tensor) -> Any:
        """Return the mask; of the sparse form its pattern, which no transform can look for."""
        return mask if self.format == "dense" else SparsityPattern.from_mask(mask.cpu().numpy())

    def vjp(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor, wrt: Sequence[str]
    ) -> Sequence[Tensor]:
        """Return what ``torch.autograd.grad`` gives, as a training loop's ``backward`` does."""
        return self.through(_as_it_is, x, weight, mask, bias, g, wrt)[1]

    def through(
        self,
        transform: Callable[[Call], Call],
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Bias,
        g: Tensor,
        wrt: Sequence[str] = ("x", "weight", "bias"),
    ) -> tuple[Tensor, list[Tensor]]:
        """Return y by what ``transform`` makes of the function, and the gradients of those of ``wrt`` that exist."""
        return _gradients(transform(self.op), x, weight, self._prepared(mask), bias, g, wrt)

    def jvp(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Bias,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what ``torch.func.jvp`` gives."""
        return _jvp(self.op, x, weight, self._prepared(mask), bias, dx, dweight, dbias)

    def hvp(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Bias,
        g: Tensor,
        dx: Tensor,
        dweight: Tensor,
        dbias: Tensor | None,
        dg: Tensor,
        mode: str,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Differentiate the gradients once more: by ``create_graph``, or by ``torch.func.jvp`` of ``torch.func.vjp``."""
        mask = self._prepared(mask)
        if mode == "forward over reverse":
            return _hvp(self.op, mode, x, weight, mask, bias, g, dx, dweight, dbias, dg)
        given = {"x": x, "weight": weight, "bias": bias, "g": g}
        moving = {name: array.detach().requires_grad_() for name, array in given.items() if array is not None}
        *inputs, along_g = moving.values()
        y = self.op(moving["x"], moving["weight"], mask, moving.get("bias"))
        first = [*torch.autograd.grad(y, inputs, along_g, create_graph=True), y]
        directions = [array for array in (dx, dweight, dbias, dg) if array is not None]
        second = torch.autograd.grad(first, list(moving.values()), directions, materialize_grads=True)
        found = dict(zip(moving, second, strict=True))
        return found["x"], found["weight"], found.get("bias"), found["g"]

    def jvp_of_jvp(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Bias,
        tangent1: Sequence[Tensor | None],
        tangent2: Sequence[Tensor | None],
    ) -> Tensor:
        """Return what ``torch.func.jvp`` of ``torch.func.jvp`` gives."""
        some, mask = [array for array in (x, weight, bias) if array is not None], self._prepared(mask)

        def layer(x: Tensor, weight: Tensor, bias: Bias = None) -> Tensor:
            return self.op(x, weight, mask, bias)

        def tangent(*moving: Tensor) -> Tensor:
            return torch.func.jvp(layer, moving, tuple(tangent1[: len(some)]))[1]  # type: ignore[no-any-return]

        return torch.func.jvp(tangent, tuple(some), tuple(tangent2[: len(some)]))[1]  # type: ignore[no-any-return]

    def autodiff_vjp(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients that autograd makes of the plain expression."""

        def plain(x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
            return F.linear(x, torch.where(mask, weight, 0), bias)

        y, gradients = _gradients(plain, x, weight, mask, bias, g)
        return _all((y, *gradients))[1:]

    def dense(self, x: Tensor, weight: Tensor, bias: Bias) -> Tensor:
        """Return ``torch.nn.functional.linear``."""
        return F.linear(x, weight, bias)

    def vmap(
        self, axes: Sequence[int | None], x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return ``torch.func.vmap`` of value and ``torch.func.vjp``."""
        return _all(torch.func.vmap(self._by_func, tuple(axes))(x, weight, self._prepared(mask), bias, g))

    def vmap_derivative(self, derivative: str, axes: Sequence[int | None], *arrays: Tensor) -> Sequence[Tensor]:
        """Return ``torch.func.vmap`` of the derivatives that ``torch.func`` makes."""
        mapped = torch.func.vmap(partial(_derivative, self.op, derivative), tuple(axes))
        return mapped(*arrays[:2], self._prepared(arrays[2]), *arrays[3:])

    def compile_derivative(self, derivative: str, *arrays: Tensor) -> Sequence[Tensor]:
        """Return the derivatives that ``torch.func`` makes, compiled by the default compiler.

        Compiled Hessians have ended the process before now (https://github.com/pytorch/pytorch/issues/190856), so that they
        run in one of their own.
        """
        if derivative == "hessian":
            sent = [None if array is None else self.asnumpy(array) for array in arrays]
            dtype, device = str(arrays[0].dtype).removeprefix("torch."), arrays[0].device.type
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found = process.submit(_compiled_hessian, type(self), self.format, dtype, device, sent).result()
            return [self.asarray(array, dtype, device) for array in found]
        return self._compiled(derivative, *arrays)

    def _compiled(self, derivative: str, *arrays: Tensor) -> Sequence[Tensor]:
        x, weight, mask, bias, *more = arrays
        prepared = self._prepared(mask)
        fixed = mask if self.format == "dense" else Placed.of(prepared, x.device)
        call = self._compiled_derivative(derivative, self.traceable(weight, prepared, bias))
        return call(x, weight, fixed, bias, *more)

    def _compile_derivative(self, derivative: str, op: Call) -> Callable[..., Sequence[Tensor]]:
        compiled: Callable[..., Sequence[Tensor]] = torch.compile(partial(_derivative, op, derivative), fullgraph=True)
        return compiled

    def traceable(self, weight: Tensor, mask: Any, bias: Bias) -> Call:
        """Return the function without what cannot be compiled; always the same one."""
        return masked_linear if self.format == "dense" else _by_places

    def transforms(self) -> Sequence[str]:
        """Return the transforms; ``compile`` is inductor's, ``aot_eager`` the same without its kernels."""
        return ("compile", "aot_eager", "checkpoint", "torch.func", "inference_mode")

    def transformed(
        self, transform: str, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return value and gradients through ``transform``."""
        if transform == "torch.func":
            return _all(self._by_func(x, weight, self._prepared(mask), bias, g))
        ways: dict[str, Callable[[Call], Call]] = {
            "checkpoint": lambda call: partial(checkpoint, call, use_reentrant=False),
        }
        if transform in ("compile", "aot_eager"):
            ways[transform] = partial(self.compiled, self._compilers[transform])
        y, gradients = self.through(ways.get(transform, _as_it_is), x, weight, mask, bias, g)
        if transform == "inference_mode":
            with torch.inference_mode():
                y = self.masked_linear(x, weight, mask, bias)
        return _all((y, *gradients))

    @cached_property
    def _compilers(self) -> dict[str, Callable[[Call], Call]]:
        config: Any = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its older name
        setattr(config, limit, max(getattr(config, limit), 64))  # one program for each shape and dtype
        return {
            name: cache(partial(torch.compile, fullgraph=True, backend=backend))
            for name, backend in (("compile", "inductor"), ("aot_eager", "aot_eager"))
        }

    def compiled(self, compiler: Callable[[Call], Call], _: Call) -> Call:
        """Return the function compiled; of the sparse form the pattern is made before, because its size is data."""
        if self.format == "dense":
            return compiler(masked_linear)

        def sparse(x: Tensor, weight: Tensor, mask: SparsityPattern, bias: Bias) -> Tensor:
            return compiler(product)(x, values_of(weight, mask), DevicePattern.of(mask, x.device), mask.shape[1], bias)

        return sparse

    def _by_func(self, x: Tensor, weight: Tensor, mask: Any, bias: Bias, g: Tensor) -> tuple[Tensor, ...]:
        return _vjp(self.op, x, weight, mask, bias, g)

    def autocast(
        self, dtype: str, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return value and gradients with the forward pass under ``torch.autocast``."""
        y, gradients = self.through(
            torch.autocast(x.device.type, dtype=getattr(torch, dtype)), x, weight, mask, bias, g
        )
        return _all((y, *gradients))

    def layer(self, weight: Tensor, mask: Tensor, bias: Bias) -> TorchLayer:
        """Return a ``MaskedLinear`` or a ``SparseLinear``."""
        return made(weight, self._prepared(mask), bias)

    def join(self, rank: int, size: int, devices: int, folder: Path) -> None:
        """Make this process one of a gloo group."""
        _conformance_distributed.join(rank, size, folder)

    def placements(self, kind: str) -> Sequence[str]:
        """Return data parallelism, FSDP2 and the two plans of tensor parallelism."""
        return _conformance_distributed.PLACEMENTS

    def distributed_layer(self, placement: str, weight: Tensor, mask: Tensor, bias: Bias) -> DistributedTorchLayer:
        """Return a ``MaskedLinear`` or a ``SparseLinear`` that all processes share."""
        return _conformance_distributed.distributed_layer(placement, weight, self._prepared(mask), bias)

    def random_mask(
        self, shape: tuple[int, int], num_zeros: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Tensor:
        """Return ``masks.random`` as a tensor."""
        return torch.asarray(masks.random(shape, num_zeros=num_zeros, seed=seed, shard=shard)).to(device)

    def bernoulli_mask(
        self, shape: tuple[int, int], threshold: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Tensor:
        """Return ``masks.bernoulli`` as a tensor."""
        return torch.asarray(masks.bernoulli(shape, threshold=threshold, seed=seed, shard=shard)).to(device)


def _compiled_hessian(
    kind: type[TorchBackend], format: str, dtype: str, device: str, arrays: Sequence[Any]
) -> Sequence[NDArray[Any]]:
    backend = kind(format)
    with backend.strict_precision():
        sent: list[Any] = [None if array is None else backend.asarray(array, dtype, device) for array in arrays]
        return [as_numpy(array) for array in backend._compiled("hessian", *sent)]


def _by_places(x: Tensor, weight: Tensor, mask: Placed, bias: Bias) -> Tensor:
    return product(x, mask.values(weight), mask.indices, weight.shape[1], bias)


def _derivative(op: Call, derivative: str, *arrays: Any) -> tuple[Any, ...]:
    functions: dict[str, Callable[..., tuple[Any, ...]]] = {"vjp": _vjp, "jvp": _jvp, "hessian": _hessian}
    return functions[derivative](op, *arrays) if derivative in functions else _hvp(op, derivative, *arrays)


def _vjp(op: Call, x: Tensor, weight: Tensor, mask: Any, bias: Bias, g: Tensor) -> tuple[Tensor, ...]:
    moving = [array for array in (x, weight, bias) if array is not None]

    def layer(x: Tensor, weight: Tensor, bias: Bias = None) -> Tensor:
        return op(x, weight, mask, bias)

    y, pullback = torch.func.vjp(layer, *moving)  # type: ignore[misc]
    return (y, *pullback(g))


def _hessian(op: Call, x: Tensor, weight: Tensor, mask: Any, bias: Bias, g: Tensor) -> tuple[Tensor, ...]:
    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (op(x, weight, mask, bias) * g).sum()

    (of_x, mixed), (other, of_weight) = torch.func.hessian(loss, (0, 1))(x, weight)
    return of_x, mixed, other, of_weight


def _jvp(
    op: Call,
    x: Tensor,
    weight: Tensor,
    mask: Any,
    bias: Bias,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs: dict[str, Any] = {"x": x, "weight": weight, "bias": bias}
    tangents = {name: along for name, along in zip(inputs, (dx, dweight, dbias), strict=True) if along is not None}
    if not tangents:
        return op(x, weight, mask, bias), torch.zeros_like(x @ weight.mT)

    def layer(moving: dict[str, Tensor]) -> Tensor:
        return op(**(inputs | {"mask": mask} | moving))

    return tuple(torch.func.jvp(layer, ({name: inputs[name] for name in tangents},), (tangents,)))


def _hvp(
    op: Call, mode: str, x: Tensor, weight: Tensor, mask: Any, bias: Bias, g: Tensor, *directions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the derivative of ``torch.func.vjp`` by ``torch.func.jvp``, or by itself."""
    given = {"x": x, "weight": weight, "bias": bias, "g": g}
    primals = {name: array for name, array in given.items() if array is not None}
    along = {name: array for name, array in zip(given, directions, strict=True) if array is not None}

    def gradients(moving: dict[str, Tensor]) -> dict[str, Tensor]:
        def layer(inputs: dict[str, Tensor]) -> Tensor:
            return op(inputs["x"], inputs["weight"], mask, inputs.get("bias"))

        inputs = {name: array for name, array in moving.items() if name != "g"}
        y, pullback = torch.func.vjp(layer, inputs)  # type: ignore[misc]
        return {**pullback(moving["g"])[0], "g": y}

    if mode == "forward over reverse":
        found = torch.func.jvp(gradients, (primals,), (along,))[1]
    else:
        found = torch.func.vjp(gradients, primals)[1](along)[0]
    return found["x"], found["weight"], found.get("bias"), found["g"]


def _as_it_is(call: Call) -> Call:
    return call


def _gradients(
    call: Call,
    x: Tensor,
    weight: Tensor,
    mask: Any,
    bias: Bias,
    g: Tensor,
    wrt: Sequence[str] = ("x", "weight", "bias"),
) -> tuple[Tensor, list[Tensor]]:
    """Return y, and the gradients of those of ``wrt`` that exist."""
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: array.detach().requires_grad_(name in wrt) for name, array in given.items()}
    y = call(leaves["x"], leaves["weight"], mask, leaves.get("bias"))
    return y, list(torch.autograd.grad(y, [leaves[name] for name in wrt if name in leaves], g))


def _all(found: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ``(y, dx, dW, db)``, which may be without the last."""
    return found[0], found[1], found[2], found[3] if len(found) > 3 else None
