"""The demo's network in PyTorch: what is particular to the framework, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskedlinear.demo.problem import Float32, Problem
from maskedlinear.demo.settings import BATCH_NORM_EPSILON, BATCH_NORM_KEEP, Settings
from maskedlinear.demo.training import Gradients, Run, train
from maskedlinear.torch import MaskedLinear, freeze_masked

__all__ = ["TorchRunner", "run"]


class TorchRunner:
    """The network and AdamW in PyTorch on the CPU, behind ``Runner``."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        optimizer = settings.optimizer
        torch.manual_seed(settings.seed)  # nothing is drawn that lasts: the weights are the problem's
        self._network = _network(problem)
        self._optimizer = freeze_masked(
            torch.optim.AdamW(
                self._network.parameters(),
                lr=optimizer.peak_rate,
                betas=(optimizer.beta1, optimizer.beta2),
                eps=optimizer.epsilon,
                weight_decay=optimizer.weight_decay,
                fused=True,
            ),
            self._network,
        )
        self._rates: Iterator[float] = iter(problem.rates.tolist())

    def step(self, x: Float32, y: NDArray[np.int64]) -> float:
        """See ``Runner``."""
        self._network.train()
        self._optimizer.param_groups[0]["lr"] = next(self._rates)
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._network(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def gradients(self) -> tuple[Gradients, ...]:
        """See ``Runner``."""
        return tuple(
            Gradients(_gradient(layer.weight), _gradient(layer.bias)) for layer in _masked_layers(self._network)
        )

    @torch.no_grad()
    def evaluate(self, x: Float32) -> NDArray[np.int64]:
        """See ``Runner``."""
        self._network.eval()
        digits: NDArray[np.int64] = self._network(torch.from_numpy(x)).argmax(dim=1).numpy()
        return digits

    def weights(self) -> tuple[Float32, ...]:
        """See ``Runner``."""
        return tuple(layer.full_weight.numpy() for layer in _masked_layers(self._network))

    def sparsity(self) -> tuple[float, ...]:
        """See ``Runner``."""
        return tuple(layer.sparsity for layer in _masked_layers(self._network))


def run(problem: Problem, settings: Settings, on_epoch: Callable[[float, float], None]) -> Run:
    """Train the network in PyTorch; see :func:`maskedlinear.demo.training.train`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain nothing here, and wait for each other when the machine is busy
    try:
        return train(TorchRunner(problem, settings), problem, on_epoch)
    finally:
        torch.set_num_threads(threads)


class _BatchNorm(nn.BatchNorm1d):
    """Keeps the biased variance of the batches, as Flax does; PyTorch's own, the unbiased one, changes a digit at times."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(dim=0), self.momentum)
            self.running_var.lerp_(x.var(dim=0, correction=0), self.momentum)
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def _network(problem: Problem) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for mask, weight, bias, shift in problem.layers:
        n_out, n_in = mask.shape
        layer = MaskedLinear(n_in, n_out, mask=mask)
        norm = _BatchNorm(n_out, eps=BATCH_NORM_EPSILON, momentum=1 - BATCH_NORM_KEEP)  # of what is new
        # What a state has under the mask becomes dormant.
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        with torch.no_grad():
            norm.bias.copy_(torch.from_numpy(shift))
        blocks += [layer, norm, nn.ReLU()]
    return nn.Sequential(*blocks)


def _masked_layers(network: nn.Module) -> list[MaskedLinear]:
    return [module for module in network.modules() if isinstance(module, MaskedLinear)]


def _gradient(parameter: Tensor) -> Float32:
    assert parameter.grad is not None
    gradient: Float32 = parameter.grad.numpy().copy()
    return gradient
