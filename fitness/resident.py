"""The site weights of a resident model: overwritten by masked ones, brought back from a memory-mapped file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.models import LanguageModel
from evoprune.metrics.errors import AuditFailed


class ResidentWeights:
    """Writes into the model's own weights; the dense ones lie in a file that all workers of a node share.

    Args:
        language_model: dense when it is handed over.
        dense: safetensors file with the dense [out, in] weight of every site, by site name, in the model's dtype.
    """

    def __init__(self, language_model: LanguageModel, dense: Path) -> None:
        self.language_model = language_model
        self._dense = dense
        self._biases = {
            bound.site.name: bias.clone() for bound in language_model.sites if (bias := bound.bias()) is not None
        }
        self._checksum = self._resident_checksum()

    def dense(self, name: str) -> Tensor:
        """[out, in] dense weight of the site `name`, mapped from the file: read only."""
        # Opened anew each time: a mapping kept open would count every page ever read as this worker's memory.
        with safe_open(self._dense, framework="pt") as file:
            return file.get_tensor(name)

    @torch.no_grad()
    def write(self, bound: SiteModule, keep: Tensor) -> None:
        """Overwrite the weight of a site by its dense weight where `keep` says so, by zero elsewhere.

        Args:
            bound: of this model.
            keep: [out, in] bool on the model's device.
        """
        target = bound.weight()
        dense = self.dense(bound.site.name).to(target.device)
        # A product would keep a NaN and turn removed negative weights into -0.
        torch.where(keep, dense, torch.zeros((), dtype=dense.dtype, device=dense.device), out=target)

    @torch.no_grad()
    def write_weight(self, bound: SiteModule, weight: Tensor) -> None:
        """Overwrite the weight of a site by `weight`, [out, in] in the model's dtype, on any device."""
        bound.weight().copy_(weight)

    @torch.no_grad()
    def write_dense(self, bound: SiteModule) -> None:
        """Overwrite the weight of a site by its dense weight."""
        bound.weight().copy_(self.dense(bound.site.name))

    @torch.no_grad()
    def empty(self, bound: SiteModule) -> None:
        """Take away the weight and the bias of a site."""
        bound.weight().zero_()
        if (bias := bound.bias()) is not None:
            bias.zero_()

    @torch.no_grad()
    def write_bias(self, bound: SiteModule) -> None:
        """Bring the bias of a site back, if it has one."""
        if (bias := bound.bias()) is not None:
            bias.copy_(self._biases[bound.site.name])

    def restore(self) -> None:
        """Write the dense weights back.

        Raises:
            AuditFailed: the restored model differs from the one that was handed over.
        """
        for bound in self.language_model.sites:
            self.write_dense(bound)
            self.write_bias(bound)
        if self._resident_checksum() != self._checksum:
            raise AuditFailed("the restored model differs from the loaded one: memory or the dense weight file changed")

    def _resident_checksum(self) -> tuple[float, ...]:
        """Two float64 sums per weight and bias, equal for equal ones."""
        sums: list[float] = []
        for bound in self.language_model.sites:
            for tensor in (bound.weight(), bound.bias()):
                if tensor is not None:
                    wide = tensor.double()
                    sums += [wide.sum().item(), wide.square().sum().item()]
        return tuple(sums)
