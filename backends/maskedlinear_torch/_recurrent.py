"""Recurrent cells whose weights are sparse layers: torch's own cells have dense matrices inside, which cannot be exchanged.

A masked ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` needs nothing of this: its weights are +0 under their masks, and the fused
kernels read them as they are. Here a graph of 1 % costs 1 %, in memory and in each step.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask, child_name

__all__ = ["SparseGRUCell", "SparseLSTMCell", "SparseRNNCell"]


class _SparseCell(nn.Module):
    """What the cells share: two layers with an output for each gate of each hidden node."""

    gates: ClassVar[int]
    dense_type: ClassVar[type[nn.RNNCellBase]]

    input_layer: nn.Linear | SparseLinear
    recurrent_layer: nn.Linear | SparseLinear

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        recurrent: Any,
        inputs: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        size = hidden_size * self.gates
        pattern = self._pattern("recurrent", recurrent, hidden_size)
        self.recurrent_layer = SparseLinear(hidden_size, size, pattern=pattern, **options)
        if inputs is None:
            self.input_layer = nn.Linear(input_size, size, **options)
        else:
            self.input_layer = SparseLinear(
                input_size, size, pattern=self._pattern("inputs", inputs, input_size), **options
            )

    @classmethod
    def from_cell(cls, cell: nn.RNNCellBase) -> Self:
        """Return the sparse cell of one of torch's, masked or with zeros: its recurrent connections are what is live.

        What is live is taken from the cell's masks where it has any, else from values other than 0. The input's weights
        become sparse where they are masked, and stay dense otherwise. Values are copied; outputs are the same.

        Raises:
            TypeError: if ``cell`` is of another kind.
        """
        if not isinstance(cell, cls.dense_type):
            raise TypeError(f"{cls.__name__}.from_cell takes a {cls.dense_type.__name__}; got {type(cell).__name__}")
        recurrent = _mask(cell, "weight_hh")
        if recurrent is None:
            recurrent = cell.weight_hh.detach() != 0
        first: Any = cell.weight_ih
        made = cls(
            cell.input_size,
            cell.hidden_size,
            cell.bias,
            recurrent=recurrent,
            inputs=_mask(cell, "weight_ih"),
            device=first.device,
            dtype=first.dtype,
            **cls._options_of(cell),
        )
        with torch.no_grad():
            for name, layer in (("ih", made.input_layer), ("hh", made.recurrent_layer)):
                weight = getattr(cell, f"weight_{name}")
                if isinstance(layer, SparseLinear):
                    pattern = layer.pattern
                    rows, columns = (torch.from_numpy(n.astype(np.int64)) for n in (pattern.rows, pattern.indices))
                    layer.weight_values.copy_(weight[rows.to(weight.device), columns.to(weight.device)])
                else:
                    layer.weight.copy_(weight)
                if layer.bias is not None:
                    layer.bias.copy_(getattr(cell, f"bias_{name}"))
        return made.train(cell.training)

    def to_cell(self) -> nn.RNNCellBase:
        """Return torch's own cell with the same outputs: dense matrices, +0 where there is no connection."""
        first = next(self.parameters())
        layers = {"ih": self.input_layer, "hh": self.recurrent_layer}
        cell = self.dense_type(
            self.input_size,
            self.hidden_size,
            layers["hh"].bias is not None,
            device=first.device,
            dtype=first.dtype,
            **self._options_of(self),
        )
        with torch.no_grad():
            for name, layer in layers.items():
                getattr(cell, f"weight_{name}").copy_(layer.weight)
                if layer.bias is not None:
                    getattr(cell, f"bias_{name}").copy_(layer.bias)
        return cell.train(self.training)

    @staticmethod
    def _options_of(cell: nn.Module) -> dict[str, Any]:
        return {}

    def _pattern(self, name: str, given: Any, inputs: int) -> SparsityPattern:
        """Return the pattern for all gates: a graph of the hidden nodes is that of each gate."""
        pattern = given if isinstance(given, SparsityPattern) else SparsityPattern.from_mask(given)
        whole = (self.hidden_size * self.gates, inputs)
        if pattern.shape == whole:
            return pattern
        if pattern.shape == (self.hidden_size, inputs):
            starts = [gate * pattern.nnz + pattern.indptr[1:].astype(np.int64) for gate in range(self.gates)]
            return SparsityPattern(np.concatenate([[0], *starts]), np.tile(pattern.indices, self.gates), inputs)
        each = f"(hidden, {name}) = {(self.hidden_size, inputs)}, the same for each gate"
        more = f", or {whole}, gate after gate" if self.gates > 1 else ""
        raise ValueError(f"{name} must be a mask or a pattern of shape {each}{more}; got {pattern.shape}")

    def forward(self, input: Tensor, state: Any = None) -> Any:
        """Return the next state."""
        return self._step(self.input_layer(input), self._start(input) if state is None else state)

    def over_time(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the hidden state after each step, and the last state: the input's products of all steps are one product.

        Args:
            inputs: shape ``(time, ..., inputs)``, one step at least.
            state: before the first step; zeros if ``None``.
        """
        products = self.input_layer(inputs)
        state = self._start(inputs[0]) if state is None else state
        hidden = []
        for product in products:
            state = self._step(product, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(hidden), state

    def _start(self, x: Tensor) -> Any:
        return x.new_zeros((*x.shape[:-1], self.hidden_size))

    def _step(self, products: Tensor, state: Any) -> Any:
        """Return the next state, from the input's products for each gate and the state."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what ``repr`` shows of the cell itself."""
        return f"{self.input_size}, {self.hidden_size}"


class SparseRNNCell(_SparseCell):
    """An ``nn.RNNCell`` over a graph: ``h' = (1 - leak) h + leak * f(W_ih x + b_ih + W_hh h + b_hh)``, W_hh sparse.

    Row i of ``recurrent`` says which nodes reach node i: an edge u to v of a graph is ``mask[v, u]``. Each connection has
    one trainable value in ``recurrent_layer``, a :class:`SparseLinear`, that the model functions know.

    >>> import numpy as np, torch
    >>> graph = np.random.default_rng(0).random((100, 100)) < 0.05
    >>> cell = SparseRNNCell(3, 100, recurrent=graph, leak=0.2)
    >>> state = None
    >>> for x in torch.randn(7, 4, 3):  # 7 steps, a batch of 4
    ...     state = cell(x, state)
    >>> state.shape
    torch.Size([4, 100])

    Args:
        input_size: the number of inputs.
        hidden_size: the number of hidden nodes.
        bias: whether both layers have a bias, as in torch's cell.
        nonlinearity: f: ``"tanh"`` or ``"relu"``.
        leak: the share of the new state in a step, ``dt / tau`` of a rate network, in (0, 1]; 1 is torch's own cell.
        recurrent: which hidden nodes reach which: a mask or a :class:`maskedlinear.pattern.SparsityPattern` of shape
            ``(hidden, hidden)``.
        inputs: which inputs reach which hidden nodes, shape ``(hidden, inputs)``; all of them, in an ``nn.Linear``, if
            ``None``.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.

    Shapes:
        x ``(..., inputs)``, state ``(..., hidden)``, zeros if ``None``; returns the next state ``(..., hidden)``.

    Raises:
        ValueError: if a pattern has another shape, ``leak`` is outside (0, 1], or ``nonlinearity`` is neither of the two.
    """

    gates = 1
    dense_type = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        *,
        recurrent: Any,
        inputs: Any = None,
        leak: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu'; got {nonlinearity!r}")
        if not 0 < leak <= 1:
            raise ValueError(f"leak is the share of the new state and must be in (0, 1]; got {leak}")
        super().__init__(input_size, hidden_size, bias, recurrent=recurrent, inputs=inputs, device=device, dtype=dtype)
        self.nonlinearity: Literal["tanh", "relu"] = nonlinearity
        self.leak = leak

    def _step(self, products: Tensor, state: Tensor) -> Tensor:
        total = products + self.recurrent_layer(state)
        new = torch.tanh(total) if self.nonlinearity == "tanh" else torch.relu(total)
        return new if self.leak == 1 else torch.lerp(state, new, self.leak)

    def to_cell(self) -> nn.RNNCellBase:
        """Return torch's own cell with the same outputs; an error if the state leaks, which that cannot."""
        if self.leak != 1:
            raise ValueError(f"torch's RNNCell has no leak, so it must be 1; got {self.leak}")
        return super().to_cell()

    @staticmethod
    def _options_of(cell: nn.Module) -> dict[str, Any]:
        return {"nonlinearity": cell.nonlinearity}


class SparseGRUCell(_SparseCell):
    """An ``nn.GRUCell`` whose recurrent weights are sparse; gates in torch's order, reset, update, new.

    Arguments and shapes are those of :class:`SparseRNNCell`; ``recurrent`` of shape ``(hidden, hidden)`` is the graph of
    each gate, of shape ``(3 * hidden, hidden)`` one for each.
    """

    gates = 3
    dense_type = nn.GRUCell

    def _step(self, products: Tensor, state: Tensor) -> Tensor:
        reset, update, new = products.chunk(3, -1)
        own_reset, own_update, own_new = self.recurrent_layer(state).chunk(3, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        return torch.lerp(candidate, state, torch.sigmoid(update + own_update))


class SparseLSTMCell(_SparseCell):
    """An ``nn.LSTMCell`` whose recurrent weights are sparse; gates in torch's order, input, forget, cell, output.

    Arguments and shapes are those of :class:`SparseRNNCell`, but that the state is a pair ``(h, c)``; ``recurrent`` of shape
    ``(hidden, hidden)`` is the graph of each gate, of shape ``(4 * hidden, hidden)`` one for each.
    """

    gates = 4
    dense_type = nn.LSTMCell

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = super()._start(x)
        return zeros, zeros

    def _step(self, products: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, cell = state
        enter, forget, new, leave = (products + self.recurrent_layer(hidden)).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(cell), cell


def _mask(cell: nn.Module, name: str) -> Tensor | None:
    """Return the mask of a cell's own weight, if it has one."""
    child = cell._modules.get(child_name(name))
    return child.mask if isinstance(child, WeightMask) else None
