"""The PyTorch backend, as the conformance suite sees it: :class:`maskedlinear.backends.Backend` for torch."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torch.utils.checkpoint import checkpoint

from maskedlinear import masks
from maskedlinear.pattern import Pattern
from maskedlinear_torch import MaskedLinear, SparseLinear, _functional, freeze_masked, masked_linear, sparse_linear
from maskedlinear_torch._products import Indices
from maskedlinear_torch._sparse import product

__all__ = ["TorchBackend"]

Bias = Tensor | None


class TorchBackend:
    """The dense form in eager mode, and the sparse one. See :mod:`maskedlinear.backends`."""

    name = "torch"
    formats = ("dense", "sparse")

    def __init__(self, format: str = "dense") -> None:
        self.format = format

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

    def lacks(self) -> Mapping[str, str]:
        """Return what torch does not have."""
        lacks = {"scan": "torch has no stable scan", "read-only": "torch has no read-only tensors"}
        if not shutil.which("g++"):
            lacks["compile"] = "torch.compile needs a C++ compiler, and there is none here"
        if self.format == "sparse":
            lacks["vmap over the mask"] = "a pattern decides how many values there are"
            lacks |= dict.fromkeys(("dormant weights", "freeze_masked"), "the sparse form has live connections only")
        return lacks

    def expected_failures(self, device: str) -> Mapping[str, str]:
        """Return nothing: no law is known to break."""
        return {}

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Turn TF32 and reductions in half precision off, and have small layers take the rules of large ones.

        They take the plain expression, which law 2 compares the rules with.
        """
        matmul, small = torch.backends.cuda.matmul, _functional._SMALL
        precision = torch.get_float32_matmul_precision()
        half, brain = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
        try:
            _functional._SMALL = 0
            torch.set_float32_matmul_precision("highest")
            matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            _functional._SMALL = small
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
        host = array.detach().cpu()
        return np.array(host.numpy() if host.dtype is torch.bool else host.double().numpy())

    def masked_linear(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
        """Return ``y``; of the sparse form, with the mask's pattern and the weights at its connections."""
        if self.format == "dense":
            return masked_linear(x, weight, mask, bias)
        pattern = self._prepared(mask)
        return sparse_linear(x, _values(weight, pattern), pattern, bias)

    def _prepared(self, mask: Any) -> Any:
        """Return the mask; of the sparse form its pattern, which no transform can look for."""
        if self.format == "dense" or isinstance(mask, Pattern):
            return mask
        return Pattern.from_mask(mask.cpu().numpy())

    def vjp(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor, wrt: Sequence[str]
    ) -> Sequence[Tensor]:
        """Return what ``torch.autograd.grad`` gives, as a training loop's ``backward`` does."""
        return _gradients(self.masked_linear, x, weight, mask, bias, g, wrt)[1]

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
        inputs, mask = {"x": x, "weight": weight, "bias": bias}, self._prepared(mask)
        tangents = {
            name: tangent for name, tangent in zip(inputs, (dx, dweight, dbias), strict=True) if tangent is not None
        }
        if not tangents:
            return self.masked_linear(x, weight, mask, bias), torch.zeros_like(x @ weight.mT)
        primals: dict[str, Tensor] = {name: array for name in tangents if (array := inputs[name]) is not None}

        def layer(moving: dict[str, Tensor]) -> Tensor:
            return self.masked_linear(**(inputs | {"mask": mask} | moving))  # type: ignore[arg-type]

        return tuple(torch.func.jvp(layer, (primals,), (tangents,)))

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
        given = {"x": x, "weight": weight, "bias": bias, "g": g}
        directions = {"x": dx, "weight": dweight, "bias": dbias, "g": dg}
        names = [name for name, array in given.items() if array is not None]
        mask = self._prepared(mask)
        if mode == "reverse over reverse":
            moving = {name: given[name].detach().requires_grad_() for name in names}  # type: ignore[union-attr]
            y = self.masked_linear(moving["x"], moving["weight"], mask, moving.get("bias"))
            first = [*torch.autograd.grad(y, [moving[n] for n in names[:-1]], moving["g"], create_graph=True), y]
            second = torch.autograd.grad(
                first, [moving[n] for n in names], [directions[n] for n in names], materialize_grads=True
            )
            found = dict(zip(names, second, strict=True))
        else:

            def gradients(moving: dict[str, Tensor]) -> dict[str, Tensor]:
                def layer(inputs: dict[str, Tensor]) -> Tensor:
                    return self.masked_linear(inputs["x"], inputs["weight"], mask, inputs.get("bias"))

                y, pullback = torch.func.vjp(layer, {name: moving[name] for name in names[:-1]})  # type: ignore[misc]
                return {**pullback(moving["g"])[0], "g": y}

            primals = {name: given[name] for name in names}
            found = torch.func.jvp(gradients, (primals,), ({name: directions[name] for name in names},))[1]
        return found["x"], found["weight"], found.get("bias"), found["g"]

    def expression(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients that autograd makes of the plain expression."""

        def plain(x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
            return F.linear(x, torch.where(mask, weight, 0), bias)

        return _all(_gradients(plain, x, weight, mask, bias, g)[1])

    def dense(self, x: Tensor, weight: Tensor, bias: Bias) -> Tensor:
        """Return ``torch.nn.functional.linear``."""
        return F.linear(x, weight, bias)

    def vmap(
        self, axes: Sequence[int | None], x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``torch.func.vmap`` of value and ``torch.func.vjp``."""
        return tuple(torch.func.vmap(self._by_func, tuple(axes))(x, weight, self._prepared(mask), bias, g))  # type: ignore[return-value]

    def transforms(self) -> Sequence[str]:
        """Return the transforms; ``compile`` is inductor's, ``aot_eager`` the same without its kernels."""
        return ("compile", "aot_eager", "checkpoint", "torch.func", "inference_mode")

    def transformed(
        self, transform: str, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return value and gradients through ``transform``."""
        mask = self._prepared(mask)
        if transform == "torch.func":
            found = self._by_func(x, weight, mask, bias, g)
            y, gradients = found[0], list(found[1:])
        elif transform == "inference_mode":
            with torch.inference_mode():
                y = self.masked_linear(x, weight, mask, bias)
            gradients = _gradients(self.masked_linear, x, weight, mask, bias, g)[1]
        elif transform == "checkpoint":

            def kept(*arguments: Any) -> Tensor:
                return checkpoint(self.masked_linear, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

            y, gradients = _gradients(kept, x, weight, mask, bias, g)
        else:
            y, gradients = _gradients(partial(self._through, self._compiled[transform]), x, weight, mask, bias, g)
        return (y, *_all(gradients))

    @cached_property
    def _compiled(self) -> dict[str, Callable[..., Tensor]]:
        config: Any = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its older name
        setattr(config, limit, max(getattr(config, limit), 64))  # one program for each shape and dtype
        layer: Callable[..., Tensor] = masked_linear if self.format == "dense" else product
        return {
            name: torch.compile(layer, fullgraph=True, backend=backend)
            for name, backend in (("compile", "inductor"), ("aot_eager", "aot_eager"))
        }

    def _through(self, compiled: Callable[..., Tensor], x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
        """Call what was compiled, the pattern being made before: its size is data."""
        if self.format == "dense":
            return compiled(x, weight, mask, bias)
        pattern = self._prepared(mask)
        return compiled(x, _values(weight, pattern), Indices.of(pattern, x.device), pattern.shape[1], bias)

    def _by_func(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor) -> tuple[Tensor, ...]:
        moving = [array for array in (x, weight, bias) if array is not None]

        def layer(x: Tensor, weight: Tensor, bias: Bias = None) -> Tensor:
            return self.masked_linear(x, weight, mask, bias)

        y, pullback = torch.func.vjp(layer, *moving)  # type: ignore[misc]
        return (y, *pullback(g))

    def autocast(
        self, dtype: str, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return value and gradients with the forward pass under ``torch.autocast``."""

        def cast(*arguments: Any) -> Tensor:
            with torch.autocast(x.device.type, dtype=getattr(torch, dtype)):
                return self.masked_linear(*arguments)

        y, gradients = _gradients(cast, x, weight, mask, bias, g)
        return (y, *_all(gradients))

    def layer(self, weight: Tensor, mask: Tensor, bias: Bias) -> TorchLayer:
        """Return a ``MaskedLinear`` or a ``SparseLinear``."""
        out, in_ = weight.shape
        if self.format == "sparse":
            pattern = self._prepared(mask)
            sparse = SparseLinear(in_, out, bias is not None, pattern, device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                sparse.values.copy_(_values(weight, pattern))
                if bias is not None and sparse.bias is not None:
                    sparse.bias.copy_(bias)
            return SparseTorchLayer(self, sparse)
        module = MaskedLinear(in_, out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        module.set_mask(mask)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
        return TorchLayer(self, module)

    def random_mask(
        self, shape: tuple[int, int], num_zeros: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Tensor:
        """Return ``masks.random`` as a tensor."""
        return torch.asarray(masks.random(shape, num_zeros=num_zeros, seed=seed, shard=shard)).to(device)


class TorchLayer:
    """A ``MaskedLinear`` as :class:`maskedlinear.backends.Layer`."""

    optimizers = ("sgd with momentum", "adamw")

    def __init__(self, backend: TorchBackend, module: Any) -> None:
        self._backend, self._module = backend, module

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``y``."""
        y: Tensor = self._module(x)
        return y

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what ``backward`` leaves in ``.grad``."""
        x = x.detach().requires_grad_()
        self._module.zero_grad()
        self(x).backward(g)
        bias = self._module.bias
        return _grad(x), _grad(self._module.weight), None if bias is None else _grad(bias)

    def set_mask(self, mask: Any) -> None:
        """Call ``set_mask``."""
        self._module.set_mask(mask)

    def set_weight(self, weight: Tensor) -> None:
        """Write into the parameter."""
        with torch.no_grad():
            self._module.weight.copy_(weight)

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays."""
        weight, mask, bias = self._module.weight, self._module.mask, self._module.bias
        send = self._backend.asnumpy
        return send(weight), send(mask), None if bias is None else send(bias)

    def save(self, path: Path) -> None:
        """Save the ``state_dict``."""
        torch.save(self._module.state_dict(), path / "state.pt")

    def load(self, path: Path) -> None:
        """Load it."""
        self._module.load_state_dict(torch.load(path / "state.pt"))

    def guarded(self, optimizer: str) -> Callable[[Tensor, Tensor], None]:
        """Return a step of SGD with momentum and weight decay, or of AdamW."""
        parameters = self._module.parameters()
        made: torch.optim.Optimizer
        if optimizer == "adamw":
            made = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        else:
            made = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        freeze_masked(made, self._module)

        def step(x: Tensor, g: Tensor) -> None:
            made.zero_grad()
            self(x).backward(g)
            made.step()

        return step


class SparseTorchLayer(TorchLayer):
    """A ``SparseLinear`` as :class:`maskedlinear.backends.Layer`."""

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what ``backward`` leaves in ``.grad``, the values' laid out as a matrix."""
        x = x.detach().requires_grad_()
        self._module.zero_grad()
        self(x).backward(g)
        bias = self._module.bias
        return _grad(x), self._matrix(_grad(self._module.values)), None if bias is None else _grad(bias)

    def set_weight(self, weight: Tensor) -> None:
        """Write the live ones into the parameter."""
        with torch.no_grad():
            self._module.values.copy_(_values(weight, self._module.pattern))

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays, the values laid out as a matrix."""
        bias, send = self._module.bias, self._backend.asnumpy
        mask = self._module.pattern.to_mask()
        return send(self._matrix(self._module.values)), mask, None if bias is None else send(bias)

    def _matrix(self, values: Tensor) -> Tensor:
        pattern = self._module.pattern
        matrix = values.detach().new_zeros(pattern.shape)
        matrix[torch.tensor(pattern.rows, dtype=torch.int64), torch.tensor(pattern.indices, dtype=torch.int64)] = (
            values.detach()
        )
        return matrix


def _values(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return the weights at the connections, in the pattern's order."""
    flat = pattern.rows.astype(np.int64) * pattern.shape[1] + pattern.indices
    return weight.reshape(-1).index_select(0, torch.tensor(flat, device=weight.device))


def _gradients(
    layer: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Bias,
    g: Tensor,
    wrt: Sequence[str] = ("x", "weight", "bias"),
) -> tuple[Tensor, list[Tensor]]:
    """Return y, and the gradients of those of ``wrt`` that exist."""
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: array.detach().requires_grad_(name in wrt) for name, array in given.items()}
    y = layer(leaves["x"], leaves["weight"], mask, leaves.get("bias"))
    return y, list(torch.autograd.grad(y, [leaves[name] for name in wrt if name in leaves], g))


def _all(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return gradients[0], gradients[1], gradients[2] if len(gradients) > 2 else None


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.clone()
