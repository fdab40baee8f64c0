"""``PathwayNetwork``: the whole network of a hierarchy, a sparse layer for each of its wirings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear.masks import LayeredWiring, Wiring
from maskedlinear.models import check_hierarchy
from maskedlinear_torch._constrain import constrain
from maskedlinear_torch._sparse_layer import SparseLinear

__all__ = ["PathwayBlock", "PathwayNetwork"]


class PathwayBlock(nn.Module):
    """One level of a :class:`PathwayNetwork`: its connections, and what follows them on the nodes that are new on it.

    Attributes:
        linear: the connections, a :class:`SparseLinear` without bias, for ``wiring.edges(block.linear)``.
        bias: of the new nodes, shape ``(new,)``; ``None`` with batch normalisation, which has its own.
        norm: their ``nn.BatchNorm1d``, or ``None``.
        activation: a module.
        dropout: ``nn.Dropout``.
    """

    new: Tensor

    def __init__(
        self, wiring: Wiring, activation: Callable[[], nn.Module], batch_norm: bool, dropout: float, **options: Any
    ) -> None:
        super().__init__()
        self.linear = SparseLinear(len(wiring.inputs), len(wiring.outputs), False, pattern=wiring.pattern, **options)
        with torch.no_grad():
            first = wiring.initial_values(self.linear.weight_values)
            self.linear.weight_values.copy_(torch.from_numpy(first))
        if wiring.fixed is not None or wiring.signs is not None:
            constrain(self.linear, wiring)
        new = torch.from_numpy((~wiring.passed_on).nonzero()[0]).to(options.get("device"))
        self.register_buffer("new", new, persistent=False)
        self.norm = nn.BatchNorm1d(len(new), **options) if batch_norm else None
        self.bias = None if batch_norm else nn.Parameter(torch.zeros(len(new), **options))
        self.activation, self.dropout = activation(), nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """Return the nodes of this level: shape ``(..., in)`` to ``(..., out)``; what is passed on is as it came."""
        nodes: Tensor = self.linear(input)
        own = nodes if len(self.new) == nodes.shape[-1] else nodes[..., self.new]
        if self.bias is not None:
            own = own + self.bias
        elif self.norm is not None:
            own = self.norm(own.reshape(-1, len(self.new))).reshape(own.shape)
        own = self.dropout(self.activation(own))
        return own if len(self.new) == nodes.shape[-1] else nodes.to(own.dtype).index_copy(-1, self.new, own)


class PathwayNetwork(nn.Module):
    """A network whose units are the nodes of a hierarchy, as P-NET and BINN have them, with a value for each connection.

    Each wiring becomes a block: its connections (:class:`SparseLinear`), then batch normalisation or a bias, the activation
    and dropout. These act on the nodes that are new on a level; what is passed on from the level before reaches the next
    one unchanged, so a node means the same wherever it is read. Its connections are fixed at 1 and signs are kept
    (:func:`constrain`), under every optimizer. A dense ``nn.Linear`` reads the last level.

    Every value has a name: ``layers[k].edges(network.blocks[k].linear)``.

    Args:
        layers: a :class:`maskedlinear.masks.LayeredWiring`, whose weights are the first values where it has some.
        n_outputs: how many outputs the head has.
        activation: makes the activation of each block, as ``nn.ReLU``.
        batch_norm: whether blocks normalise over the batch, in place of a bias.
        dropout: the probability with which a new node is dropped, while training.
        every_level: give each level a head of its own (P-NET's deep supervision, BINN's ensemble): outputs are then of shape
            ``(..., levels, n_outputs)``, from the genes' side on; P-NET takes the mean of their sigmoids, BINN the sum.
        device: where the parameters are.
        dtype: their dtype.

    Attributes:
        blocks: the :class:`PathwayBlock` of each wiring.
        heads: the head of the last level, or of every one.

    Shapes:
        input ``(..., genes)``; output ``(..., n_outputs)``.

    Raises:
        TypeError: if ``layers`` is no ``LayeredWiring``.
        ValueError: if ``n_outputs`` is below 1, or ``dropout`` outside [0, 1].

    Example:
        >>> from maskedlinear.masks import LayeredWiring
        >>> layers = LayeredWiring.from_edges([("tp53", "apoptosis"), ("apoptosis", "fate"), ("brca1", "fate")])
        >>> network = PathwayNetwork(layers)
        >>> network(torch.ones(5, 2)).shape
        torch.Size([5, 1])
        >>> [round(weight) for node, to, weight in layers[0].edges(network.blocks[0].linear) if node == to]
        [1]
    """

    def __init__(
        self,
        layers: LayeredWiring,
        n_outputs: int = 1,
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        batch_norm: bool = False,
        dropout: float = 0.0,
        every_level: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hierarchy(layers, n_outputs, dropout)
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.every_level = every_level
        self.blocks = nn.ModuleList(
            PathwayBlock(wiring, activation, batch_norm, dropout, **options) for wiring in layers
        )
        sizes = layers.sizes[1:] if every_level else layers.sizes[-1:]
        self.heads = nn.ModuleList(nn.Linear(size, n_outputs, **options) for size in sizes)

    def levels(self, input: Tensor) -> list[Tensor]:
        """Return the nodes of each level: the input, and what each block makes of the one before."""
        found = [input]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs, without a sigmoid or softmax."""
        nodes = self.levels(input)
        if not self.every_level:
            last: Tensor = self.heads[-1](nodes[-1])
            return last
        return torch.stack([head(level) for head, level in zip(self.heads, nodes[1:], strict=True)], dim=-2)
