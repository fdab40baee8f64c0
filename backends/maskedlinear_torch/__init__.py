"""The PyTorch backend: the op, the layer, the optimizer guard. Users import it as ``maskedlinear.torch``."""

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    raise ImportError(
        f"maskedlinear.torch needs torch >= 2.6, the first release whose torch.load is safe by default "
        f'(CVE-2025-32434); found {torch.__version__}. Upgrade with: pip install -U "maskedlinear[torch]"'
    )

from maskedlinear_torch._activations import Activations, record_activations
from maskedlinear_torch._check_masks import check_masks
from maskedlinear_torch._constrain import constrain
from maskedlinear_torch._dense_training import StraightThrough, TopKAST
from maskedlinear_torch._distributed_checkpoint import atomic_writer, load_patterns
from maskedlinear_torch._export import onnx_translations, operator_decompositions
from maskedlinear_torch._flow_scores import fisher_scores, grasp_scores, movement_scores, obd_scores, synflow_prune
from maskedlinear_torch._functional import masked_linear
from maskedlinear_torch._import_masks import import_masks
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._models import compress, expand, get_forms
from maskedlinear_torch._optim import freeze_masked
from maskedlinear_torch._over_time import ScheduledPruning, ScheduledRegrowth, lottery_rounds, rewind_model
from maskedlinear_torch._pack import pack, unpack
from maskedlinear_torch._packed_layer import PackedLinear
from maskedlinear_torch._pathways import PathwayNetwork
from maskedlinear_torch._recurrent import SparseGRUCell, SparseLSTMCell, SparseRNNCell
from maskedlinear_torch._regrow import dense_gradients, regrow_model
from maskedlinear_torch._shrink import shrink
from maskedlinear_torch._sparse import sparse_linear
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_parallel import SparseColwiseParallel, SparseRowwiseParallel
from maskedlinear_torch._updates import prune_with_updates
from maskedlinear_torch._weights import register_axes
from maskedlinear_torch._whole import get_masks, mask_model, prune_model, set_masks, summary, unmask_model

__all__ = [
    "Activations",
    "MaskedLinear",
    "PackedLinear",
    "PathwayNetwork",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseColwiseParallel",
    "SparseGRUCell",
    "SparseLSTMCell",
    "SparseLinear",
    "SparseRNNCell",
    "SparseRowwiseParallel",
    "StraightThrough",
    "TopKAST",
    "atomic_writer",
    "check_masks",
    "compress",
    "constrain",
    "dense_gradients",
    "expand",
    "fisher_scores",
    "freeze_masked",
    "get_forms",
    "get_masks",
    "grasp_scores",
    "import_masks",
    "load_patterns",
    "lottery_rounds",
    "mask_model",
    "masked_linear",
    "movement_scores",
    "obd_scores",
    "onnx_translations",
    "operator_decompositions",
    "pack",
    "prune_model",
    "prune_with_updates",
    "record_activations",
    "register_axes",
    "regrow_model",
    "rewind_model",
    "set_masks",
    "shrink",
    "sparse_linear",
    "summary",
    "synflow_prune",
    "unmask_model",
    "unpack",
]
