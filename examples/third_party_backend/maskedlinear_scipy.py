"""An example of a backend in a distribution of its own: live connections only, as a SciPy CSR matrix."""

from __future__ import annotations

import platform
from importlib.metadata import version

import numpy as np
from scipy.sparse import csr_array

from maskedlinear import masks
from maskedlinear.backends import CAPABILITIES, LAYOUTS
from maskedlinear.reference import laid_out

HAS = ("jvp", "masks", "bernoulli masks", *LAYOUTS)


class ScipyBackend:
    """The masked linear layer as sparse products. See ``maskedlinear.backends.Backend`` for what each method is."""

    name = "scipy"
    formats = ("csr",)

    def __init__(self, format="csr"):
        self.format = format

    def versions(self):
        return {"scipy": version("scipy"), "numpy": np.__version__}

    def devices(self):
        return ("cpu",)

    def device_name(self, device):
        return platform.machine()

    def dtypes(self, device):
        return ("float64", "float32")

    def unsupported(self):
        why = "SciPy has products, and nothing that differentiates them"
        return {name: why for name in CAPABILITIES if name not in HAS}

    def expected_failures(self, device):
        return {}

    def strict_precision(self):
        return np.errstate(invalid="ignore")

    def asarray(self, values, dtype, device, layout="contiguous"):
        return laid_out(np.array(values, dtype=bool if values.dtype == bool else dtype), layout)

    def asnumpy(self, array):
        return np.array(array, dtype=None if array.dtype == bool else np.float64)

    def masked_linear(self, x, weight, mask, bias):
        y = self._product(x, self._sparse(weight, mask))
        return y if bias is None else y + bias

    def vjp(self, x, weight, mask, bias, g, wrt):
        found = []
        for name in wrt:
            if name == "x":
                found.append(self._product(g, self._sparse(weight, mask).T.tocsr()))
            elif name == "weight":
                rows, columns = np.nonzero(mask)
                dense = np.zeros_like(weight)
                dense[rows, columns] = np.einsum("bk,bk->k", self._flat(g)[:, rows], self._flat(x)[:, columns])
                found.append(dense)
            else:
                found.append(self._flat(g).sum(axis=0))
        return found

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        y = self.masked_linear(x, weight, mask, bias)
        dy = np.zeros_like(y)
        for moving, fixed in ((dx, weight), (x, dweight)):
            if moving is not None and fixed is not None:
                dy = dy + self.masked_linear(moving, fixed, mask, None)
        return y, dy if dbias is None else dy + dbias

    def random_mask(self, shape, num_zeros, seed, shard, device):
        return masks.random(shape, num_zeros=num_zeros, seed=seed, shard=shard)

    def bernoulli_mask(self, shape, threshold, seed, shard, device):
        return masks.bernoulli(shape, threshold=threshold, seed=seed, shard=shard)

    def _sparse(self, weight, mask):
        rows, columns = np.nonzero(mask)
        return csr_array((weight[rows, columns], (rows, columns)), shape=mask.shape)

    def _product(self, x, sparse):
        return (sparse @ self._flat(x).T).T.reshape(*x.shape[:-1], sparse.shape[0])

    def _flat(self, array):
        return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])
