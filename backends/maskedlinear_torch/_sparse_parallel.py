"""Tensor parallelism of sparse layers: plans that share out connections, as torch's own share out dense weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._ranks import Ranks, check_alike
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import Cut, contiguous_stride

if distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ParallelStyle
else:
    ParallelStyle = object  # type: ignore[assignment,misc]

__all__ = ["SparseColwiseParallel", "SparseRowwiseParallel"]


class _SparseParallel(ParallelStyle):
    """What the two plans have in common."""

    dim: Literal[0, 1]

    def __init__(self, *, input_layouts: Any = None, output_layouts: Any = None, use_local_output: bool = True) -> None:
        super().__init__()
        whole, part = Replicate(), Shard(-1)
        self.input_layouts = (input_layouts or (part if self.dim else whole),)
        self.output_layouts = (output_layouts or (whole if self.dim else part),)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if not isinstance(module, SparseLinear):
            raise TypeError(
                f"{type(self).__name__} is a plan for SparseLinear; got {type(module).__name__}: for nn.Linear and "
                f"MaskedLinear there is torch's {'RowwiseParallel' if self.dim else 'ColwiseParallel'}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"a layer is shared out over a device mesh of one dimension; got {device_mesh.ndim}: pass "
                'one dimension of it, as mesh["tp"]'
            )
        if any(is_sharded(parameter) for parameter in module.parameters()):
            raise ValueError(
                "a layer is shared out once, and its parameters are DTensors already: tensor parallelism comes before "
                "fully_shard"
            )
        check_alike(
            "the pattern",
            {"the layer": module.pattern.places},
            Ranks((device_mesh.get_group(),), device_mesh.device_type),
        )
        return distribute_module(module, device_mesh, self._share_out, self._inputs, self._outputs)  # type: ignore[arg-type]

    def _share_out(self, name: str, module: nn.Module, mesh: Any) -> None:
        if not isinstance(module, SparseLinear):
            return
        source = {"src_data_rank": self.src_data_rank} if hasattr(ParallelStyle, "src_data_rank") else {}
        cut, values = Cut(module.pattern, self.dim, mesh), module.weight_values
        alike: Any = distribute_tensor(values.detach(), mesh, [Replicate()], **source)
        parameter = nn.Parameter(cut.shared_out(alike.to_local()), requires_grad=values.requires_grad)
        vars(parameter).update(vars(values))
        module.register_parameter("weight_values", parameter)
        if (bias := module.bias) is not None:
            layout = Replicate() if self.dim else Shard(0)
            own = nn.Parameter(distribute_tensor(bias.detach(), mesh, [layout], **source), bias.requires_grad)
            vars(own).update(vars(bias))
            module.register_parameter("bias", own)
        module._cut = cut
        module._output_layouts = self.output_layouts if self.dim else ()
        module._place()

    def _inputs(self, module: SparseLinear, inputs: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
        x = inputs[0]
        if is_sharded(x):
            return inputs
        layout, sizes = self.input_layouts[0], dict[str, Any]()
        if isinstance(layout, Shard) and layout.dim in (-1, x.dim() - 1):  # which may be parts of different sizes
            shape = torch.Size((*x.shape[:-1], module.in_features))
            sizes = {"shape": shape, "stride": contiguous_stride(shape)}
        return DTensor.from_local(x, mesh, self.input_layouts, run_check=False, **sizes), *inputs[1:]

    def _outputs(self, module: nn.Module, y: Any, mesh: Any) -> Tensor:
        y = y.redistribute(placements=self.output_layouts)
        return y.to_local() if self.use_local_output else y  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """Say what the plan was made with."""
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, output_layouts={self.output_layouts}, "
            f"use_local_output={self.use_local_output})"
        )


class SparseColwiseParallel(_SparseParallel):
    """Share out a :class:`SparseLinear` by its outputs: each process computes some of them, and has their rows whole.

    What ``torch.distributed.tensor.parallel.ColwiseParallel`` is to ``nn.Linear``, with the same arguments::

        parallelize_module(model, mesh, {"0": SparseColwiseParallel(), "2": SparseRowwiseParallel()})

    The layer's ``weight_values`` become a new parameter, a DTensor of shape ``(processes, length)``, a row a process;
    outputs are shared out as ``torch.chunk`` does, and each process has as many connections as its outputs have. Every
    process knows the whole pattern. ``state_dict`` has the values in the whole layer's order, shape ``(nnz,)``, as a DTensor
    cut evenly, so that states go from any number of processes to any other; it, ``rewire`` and loading gather one layer's
    values at a time, and all processes must call them. What an optimizer keeps has the parameter's own shape.

    Args:
        input_layouts: of x, if it is no DTensor; ``Replicate()`` if ``None``.
        output_layouts: of y; ``Shard(-1)`` if ``None``.
        use_local_output: whether y is this process' tensor, or a DTensor.

    Raises:
        TypeError: if the module is no ``SparseLinear``.
        ValueError: if processes have different patterns, the mesh has more than one dimension, or the layer is shared out
            already.
    """

    dim = 0


class SparseRowwiseParallel(_SparseParallel):
    """Share out a :class:`SparseLinear` by its inputs: each process has the connections of some; their outputs are summed.

    What ``torch.distributed.tensor.parallel.RowwiseParallel`` is to ``nn.Linear``, with the same arguments. All else is as
    in :class:`SparseColwiseParallel`; every process has the bias.

    Args:
        input_layouts: of x, if it is no DTensor; ``Shard(-1)`` if ``None``.
        output_layouts: of y; ``Replicate()`` if ``None``.
        use_local_output: whether y is this process' tensor, or a DTensor.

    Raises:
        TypeError: if the module is no ``SparseLinear``.
        ValueError: if processes have different patterns, the mesh has more than one dimension, or the layer is shared out
            already.
    """

    dim = 1
