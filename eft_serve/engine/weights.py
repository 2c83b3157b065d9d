"""How matrices lie in memory; knows no model in particular.

A CPU's matrix product with few rows reads a matrix fastest when the weights of one input are adjacent: a head of
256 × 32,000 took 3.2 / 9.4 / 14.4 ms for 1 / 8 / 32 rows as `nn.Linear` stores it, and 1.5 / 6.4 / 11.4 ms this way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_PACKED_FOR_ROWS = 16


def input_major(weight: Tensor) -> Tensor:
    """The same [num_outputs, num_inputs] matrix; on a CPU with the weights of one input next to one another."""
    if weight.device.type != "cpu" or weight.dim() != 2:
        return weight
    return weight.t().contiguous().t()


@torch.no_grad()
def store_input_major(model: nn.Module) -> None:
    """Store every module's weight matrix in this way. An embedding that shares its matrix keeps its own copy."""
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        stored = nn.Parameter(input_major(weight.data), requires_grad=False)
        if id(weight) in embeddings:
            module.weight = stored
        else:
            weight.data = stored.data


class PackedHead:
    """A large matrix, packed as oneDNN's kernels read it, for products with several rows on a CPU.

    The head above then takes 2.9 / 4.5 / 10.0 ms. One row alone is faster unpacked, so both are kept.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight  # [num_outputs, num_inputs]
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether this module is a plain float32 matrix on a CPU, and this build of torch can pack it."""
        return (
            type(module) is nn.Linear
            and module.bias is None
            and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and torch.backends.mkldnn.is_available()
        )

    def __call__(self, states: Tensor) -> Tensor:
        """[num_rows, num_outputs] of [num_rows, num_inputs]."""
        if len(states) == 1:
            return linear(states, self._weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._packed, None, "none", [], "")
        return out
