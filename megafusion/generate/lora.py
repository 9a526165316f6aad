"""LoRA adapters in a pipeline: loaded by name, merged into the model's weights with a strength each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from megafusion.errors import UserError
from megafusion.generate.peft_folder import CONFIG, Update, read_peft_folder
from megafusion.model.hub_names import hub_names
from megafusion.model.lora import lora_layers
from megafusion.model.transfusion import Transfusion
from megafusion.storage import expand_path
from megafusion.suggestions import nearest

Adapter = dict[str, list[tuple[slice, Update]]]
"""By the canonical name of a weight, the updates of its rows."""


@dataclass
class _Loaded:
    adapters: dict[str, Adapter] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    """Of the adapters that are active."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """The adapted weights as they were."""


class LoraPipeline:
    """The methods of a pipeline that load LoRA adapters and choose among them, named as in diffusers."""

    model: Transfusion

    @cached_property
    def _lora(self) -> _Loaded:
        return _Loaded()

    def load_lora_weights(self, path: Path | str, adapter_name: str | None = None) -> None:
        """Load an adapter that PEFT or a run with train.lora wrote, beside the active ones at strength 1.

        path: its folder, or a run. Raises UserError for one that is not supported or not of this model.
        """
        folder = Path(expand_path(path))
        if not (folder / CONFIG).is_file() and (folder / "lora" / CONFIG).is_file():
            folder = folder / "lora"
        name = f"default_{len(self._lora.adapters)}" if adapter_name is None else adapter_name
        if name in self._lora.adapters:
            raise UserError(f"adapter_name {name!r}: an adapter of that name is loaded; give another name")
        self._lora.adapters[name] = _fit(read_peft_folder(folder), self.model, folder)
        self._activate(self._lora.strengths | {name: 1.0})

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activate these adapters alone. adapter_weights: strength of each, or of all; 1 by default."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self._lora.adapters:
                known = nearest(str(name), list(self._lora.adapters)) or "none"
                raise UserError(f"adapter {name!r} is not loaded; loaded are {known}")
        given = 1.0 if adapter_weights is None else adapter_weights
        strengths = [given] * len(names) if isinstance(given, int | float) else list(given)
        if len(strengths) != len(names) or not all(
            isinstance(each, int | float) and isfinite(each) for each in strengths
        ):
            raise UserError(f"adapter_weights={given!r:.80}: give a number for each of {names}")
        self._activate(dict(zip(names, map(float, strengths), strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        return list(self._lora.strengths)

    def get_list_adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return list(self._lora.adapters)

    def unload_lora_weights(self) -> None:
        """Remove all adapters: the weights are bit for bit as before."""
        self._activate({})
        del self._lora

    @torch.no_grad()
    def _activate(self, strengths: dict[str, float]) -> None:
        loaded, weights = self._lora, self.model.weights()
        loaded.strengths = strengths
        for name in {name for adapter in loaded.adapters.values() for name in adapter}:
            weight = weights[name]
            original = loaded.originals.setdefault(name, weight.clone())
            total = original.to(weight.device, torch.float32, copy=True)
            for adapter, strength in strengths.items():
                for rows, update in loaded.adapters[adapter].get(name, ()):
                    a, b = (factor.to(total) for factor in update[:2])
                    total[rows] += strength * update.scale * (b @ a)
            weight.copy_(total)


def _fit(updates: dict[str, Update], model: Transfusion, folder: Path) -> Adapter:
    """The updates on the model's weights. UserError for a layer or a shape that the model does not have."""
    rows: dict[str, tuple[str, slice, int]] = {}  # by their name: our weight, its rows, its inputs
    for layer, linear in lora_layers(model).items():
        weight, start = f"{layer}.weight", 0
        (theirs,) = hub_names([weight]).values()
        for name, size in zip(theirs, getattr(linear, "sizes", (linear.out_features,)), strict=True):
            rows[name.removesuffix(".weight")] = weight, slice(start, start + size), linear.in_features
            start += size
    found: Adapter = {}
    for name, update in updates.items():
        if name not in rows:
            raise UserError(
                f"{folder}: adapts {name}, which is not a linear layer of the model's blocks; the nearest is "
                f"{nearest(name, list(rows), 1)}"
            )
        weight, own, num_inputs = rows[name]
        num_outputs, rank = own.stop - own.start, len(update.a)
        shapes = [list(factor.shape) for factor in update[:2]]
        if shapes != [[rank, num_inputs], [num_outputs, rank]]:
            raise UserError(
                f"{folder}: {name} has A {shapes[0]} and B {shapes[1]}, but the model's layer has "
                f"{num_inputs} inputs and {num_outputs} outputs; load it into the model that it adapts"
            )
        found.setdefault(weight, []).append((own, update))
    return found
