"""Low-rank adapters of one model (LoRA, arXiv 2106.09685) and whose tokens they change; knows no sequences.

Rows of the plain model and of any of its adapters share one forward: every matrix is multiplied once for all of them,
and each adapter adds its update to its own tokens. The matrices are kept as the checkpoint has them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eft_serve.checkpoints.json_file import BrokenFileError
from eft_serve.checkpoints.lora import WEIGHTS, misfits, read_lora, summary, tensor_name
from eft_serve.engine.layout import Group
from eft_serve.engine.weights import input_major
from eft_serve.errors import CheckpointError, EngineError

Tokens = slice | Tensor  # of a forward; int64


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one matrix."""

    down: Tensor  # [rank, num_inputs]
    up: Tensor  # [num_outputs, rank], scaled

    @classmethod
    def join(cls, updates: Sequence[Update | None], num_outputs: Sequence[int]) -> Update:
        """The update of stacked matrices that have the same input; None leaves its matrix as it is."""
        given = [update for update in updates if update is not None]
        ups = [
            given[0].up.new_zeros(outputs, 0) if update is None else update.up
            for update, outputs in zip(updates, num_outputs, strict=True)
        ]
        return cls(torch.cat([update.down for update in given]), torch.block_diag(*ups)).stored()

    def stored(self, device: torch.device | None = None) -> Update:
        """A copy on this device, in the layout that is fastest to multiply."""
        return Update(input_major(self.down.to(device)), input_major(self.up.to(device)))

    def add(self, states: Tensor, out: Tensor, tokens: Tokens) -> None:
        """Change `out` [num_tokens, num_outputs] at these tokens, given `states` [num_tokens, num_inputs]."""
        reduced = linear(states[tokens], self.down)
        if isinstance(tokens, slice):
            out[tokens].addmm_(reduced, self.up.t())
        else:
            out.index_add_(0, tokens, linear(reduced, self.up))


class Adapters:
    """All adapters of a model.

    Args:
        updates: by adapter, by the name of the matrix's module.
    """

    def __init__(self, updates: Mapping[str, Mapping[str, Update]] | None = None) -> None:
        self._updates = dict(updates or {})
        self._attached: dict[nn.Module, dict[str, Update]] = {}  # by adapter
        self._selected: list[tuple[str, Tokens]] = []
        self._num_tokens = 0

    @classmethod
    def load(cls, directories: Mapping[str, Path], model: PreTrainedModel) -> Adapters:
        """Read PEFT directories, in the model's dtype.

        Raises:
            CheckpointError: one is broken, does not fit the model, or is of a kind that is not computed.
        """
        return cls({name: _read(name, directory, model) for name, directory in directories.items()})

    @property
    def names(self) -> list[str]:
        return list(self._updates)

    @contextmanager
    def merged(self, model: nn.Module, adapter: str | None) -> Iterator[None]:
        """Meanwhile the model computes with this adapter's updates in its matrices, as a merged checkpoint would.

        One matrix at a time: a second copy of a large model may not fit.
        """
        handles = []
        for name, update in self._updates[adapter].items() if adapter is not None else ():
            before, after = _merging(model.get_submodule(name), update)
            handles.append(model.get_submodule(name).register_forward_pre_hook(before))
            handles.append(model.get_submodule(name).register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """From now on each matrix adds the updates of the selected tokens to what it computes."""
        for name, module in model.named_modules():
            own = {adapter: each[name].stored(device) for adapter, each in self._updates.items() if name in each}
            if own:
                self._attached[module] = own
                # A hook would cost a forward without adapters several microseconds for each matrix.
                module.forward = self._adapted(module.forward, own)

    def _adapted(
        self, forward: Callable[[Tensor], Tensor], updates: Mapping[str, Update]
    ) -> Callable[[Tensor], Tensor]:
        def adapted(states: Tensor) -> Tensor:
            out = forward(states)
            if self._selected:
                self.add(updates, states.flatten(0, -2), out.view(-1, out.shape[-1]))
            return out

        return adapted

    def joined(self, modules: Sequence[nn.Linear]) -> dict[str, Update]:
        """By adapter, what it adds to the stacked matrices of modules with one input."""
        own = [self._attached.get(module, {}) for module in modules]
        sizes = [len(module.weight) for module in modules]
        changed = [name for name in self.names if any(name in each for each in own)]
        return {name: Update.join([each.get(name) for each in own], sizes) for name in changed}

    def select(self, groups: Sequence[Group]) -> None:
        """Say whose tokens are in the next forward, which begins with the first of these groups."""
        tokens: dict[str, list[int]] = defaultdict(list)
        for group in groups:
            start = group.start - groups[0].start
            for adapter in group.adapters:
                if adapter is not None:
                    tokens[adapter].extend(range(start, start + group.q_length))
                start += group.q_length
        self._num_tokens = groups[-1].stop - groups[0].start
        self._selected = [(adapter, _as_tokens(each, groups[0].tables.device)) for adapter, each in tokens.items()]

    def add(self, updates: Mapping[str, Update], states: Tensor, out: Tensor) -> Tensor:
        """Add to `out` [num_tokens, num_outputs], and return it, what each adapter adds to its tokens' `states`."""
        if self._selected and len(states) != self._num_tokens:
            raise EngineError(f"an adapted matrix got {len(states)} of {self._num_tokens} tokens, and which is unknown")
        for adapter, tokens in self._selected:
            if update := updates.get(adapter):
                update.add(states, out, tokens)
        return out


def _as_tokens(indices: list[int], device: torch.device) -> Tokens:
    if indices[-1] - indices[0] + 1 == len(indices):  # they are in ascending order
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)


def _read(name: str, directory: Path, model: PreTrainedModel) -> dict[str, Update]:
    try:
        lora = read_lora(directory)
        mistakes = misfits(lora, _matrices(model))
        if mistakes:
            raise CheckpointError(
                f"adapter {name}: {directory} does not fit {model.config._name_or_path}: {summary(mistakes)}; "
                "name the model that it was trained on"
            )
        tensors = load_file(directory / WEIGHTS)
    except (BrokenFileError, OSError, SafetensorError) as error:
        raise CheckpointError(f"adapter {name}: {error}") from error
    return {
        module: Update(
            down=tensors[tensor_name(module, "A")].to(model.dtype),
            up=(tensors[tensor_name(module, "B")].float() * lora.scaling).to(model.dtype),
        )
        for module in lora.modules
    }


def _matrices(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(num_inputs, num_outputs) by module, of all that may be adapted; not the head, which does not see every token."""
    head = model.get_output_embeddings()
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def _merging(module: nn.Module, update: Update) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that give a module its updated matrix before it computes, and its own back afterwards."""
    weight: Any = module.weight
    own = weight.data

    def before(*args: object) -> None:
        delta = update.up.float() @ update.down.float()
        weight.data = (own.float() + (delta.t() if isinstance(module, Conv1D) else delta)).to(own.dtype)

    def after(*args: object) -> None:
        weight.data = own

    return before, after
