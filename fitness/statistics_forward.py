"""Statistics of layer inputs and outputs, from forward passes with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.adapters.base import SiteModule
from evoprune.fitness.gram import inverse_diagonals
from evoprune.fitness.samples import TEXT_TOKEN, VISUAL_TOKENS, Batch, Sequences, forward_batches
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.records import LANGUAGE

# Norms over the tokens of some modalities.
MODALITY_NORMS: dict[str, tuple[int, ...]] = {"X_v": VISUAL_TOKENS, "X_l": (TEXT_TOKEN,)}

Results = dict[str, dict[str, Tensor]]  # site name -> terminal -> tensor


class ColumnSums:
    """Streamed statistics of the columns of a matrix whose rows arrive in batches.

    Args:
        width: number of columns.
        device: where the rows are.
        names: what to keep, out of ``ss l1 mean var max``.

    Sums are float64: the float32 sum of squares over 128 x 2048 tokens is wrong in its last bits.
    """

    def __init__(self, width: int, device: torch.device, names: frozenset[str]) -> None:
        # MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._names = names
        self._rows = 0
        self._sums = {name: torch.zeros(width, dtype=self._dtype, device=device) for name in names | {"mean"}}

    def add(self, rows: Tensor) -> None:
        """Take in `rows`, [n, width] of any float type."""
        wide = rows.to(self._dtype)
        if "ss" in self._names:
            self._sums["ss"] += wide.square().sum(0)
        if "l1" in self._names:
            self._sums["l1"] += wide.abs().sum(0)
        if "max" in self._names:
            self._sums["max"] = torch.maximum(self._sums["max"], wide.abs().amax(0))
        if self._names & {"mean", "var"}:
            self._add_moments(wide)
        self._rows += rows.shape[0]

    def _add_moments(self, wide: Tensor) -> None:
        """Chan, Golub and LeVeque 1979: merge two sets' means and sums of squared deviations."""
        mean = wide.mean(0)
        total = self._rows + wide.shape[0]
        shift = mean - self._sums["mean"]
        if "var" in self._names:
            self._sums["var"] += (wide - mean).square().sum(0)
            self._sums["var"] += shift.square() * (self._rows * wide.shape[0] / total)
        self._sums["mean"] += shift * (wide.shape[0] / total)

    def result(self, name: str, shares: int) -> Tensor:
        """One statistic, [width] float32: ``ss`` is the mean over `shares`, ``l1``, ``mean`` and ``var`` over rows."""
        divisor = {"ss": shares, "l1": self._rows, "var": self._rows}.get(name, 1)
        return (self._sums[name] / divisor).float()


class WandaSum:
    """The sum of squares as Wanda's reference code keeps it, bit for bit: a float32 running mean over sequences.

    Source: Sun et al. 2024, arXiv:2306.11695, `lib/layerwrapper.py` of its repository.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sequences = 0
        self._mean = torch.zeros(width, device=device)

    def add(self, rows: Tensor) -> None:
        """Take in one sequence, [tokens, width]."""
        self._mean *= self._sequences / (self._sequences + 1)
        self._sequences += 1
        # Transposed and through the norm, as there: another order of operations rounds differently.
        self._mean += torch.norm(rows.t().type(torch.float32), p=2, dim=1) ** 2 / self._sequences

    def result(self) -> Tensor:
        """[width] float32."""
        return self._mean


class InputSums:
    """All statistics of one distinct layer input.

    Args:
        width: number of input features.
        device: where the input is.
        names: terminals out of the ``X_*`` family, ``H``, ``Hinv`` and ``Hchol2``.
        wanda: keep ``X_ss`` as Wanda's reference code does; `add` must then get one sequence at a time.
    """

    def __init__(self, width: int, device: torch.device, names: frozenset[str], wanda: bool = False) -> None:
        self._names = names
        self._tokens = 0
        columns = {name.removeprefix("X_") for name in names - MODALITY_NORMS.keys() if name.startswith("X_")}
        self._parts = {name: ColumnSums(width, device, frozenset({"ss"})) for name in names & MODALITY_NORMS.keys()}
        self._wanda = WandaSum(width, device) if wanda and "ss" in columns else None
        if self._wanda:
            columns.remove("ss")
        self._columns = ColumnSums(width, device, frozenset(columns)) if columns else None
        needs_gram = not names.isdisjoint({"H", "Hinv", "Hchol2"})
        self._gram = torch.zeros(width, width, device=device) if needs_gram else None

    def add(self, rows: Tensor, modality: Tensor | None = None) -> None:
        """Take in `rows`, [tokens, width], and the [tokens] int64 modality of each, which norms of some alone need."""
        self._tokens += rows.shape[0]
        if self._wanda:
            self._wanda.add(rows)
        if self._columns:
            self._columns.add(rows)
        for name, part in self._parts.items():
            assert modality is not None
            part.add(rows[torch.isin(modality, modality.new_tensor(MODALITY_NORMS[name])).to(rows.device)])
        if self._gram is not None:
            narrow = rows.float()
            self._gram.addmm_(narrow.t(), narrow)

    def results(self, shares: int) -> dict[str, Tensor]:
        """Terminal -> [1, in] float32, and ``H`` [in, in]; to be called once.

        Args:
            shares: what sums of squares are divided by: sequences or rows.
        """
        found: dict[str, Tensor] = {}
        if self._wanda:
            found["X_ss"] = self._wanda.result()[None]
        for name in sorted(self._names - self._parts.keys()):
            if self._columns and name.startswith("X_") and name not in found:
                found[name] = self._columns.result(name.removeprefix("X_"), shares)[None]
        for name, part in self._parts.items():
            found[name] = part.result("ss", shares).sqrt()[None]
        if self._gram is not None:
            found["H"] = self._gram.div_(self._tokens)
            if not self._names.isdisjoint({"Hinv", "Hchol2"}):
                found["Hinv"], found["Hchol2"] = inverse_diagonals(found["H"], self._tokens / shares)
            self._gram = None
        return {name: tensor for name, tensor in found.items() if name in self._names}


class ForwardSums:
    """Collects the forward statistics of all sites while the model runs under `hooked`.

    Sites that read the very same tensor (q, k and v; gate and up) share one collection: `leaders` maps each site to
    the first that read it. `rows` counts the tokens that each site's statistics are of.

    Args:
        sites: the sites of the model.
        names: stored terminals with cost ``forward`` or ``hessian``, and ``H``.
        wanda: see `InputSums`.
    """

    def __init__(self, sites: Iterable[SiteModule], names: frozenset[str], wanda: bool = False) -> None:
        self._sites = tuple(sites)
        self._input_names = frozenset(name for name in names if not name.startswith("Y_"))
        self._output_names = frozenset(name.removeprefix("Y_") for name in names if name.startswith("Y_"))
        self._wanda = wanda
        self._inputs: dict[str, InputSums] = {}
        self._outputs: dict[str, ColumnSums] = {}
        self._live: list[tuple[Tensor, str]] = []  # inputs seen in the present block, and who read them first
        self._live_block = -1
        self._batch: Batch | None = None
        self.leaders: dict[str, str] = {}
        self.rows: dict[str, int] = dict.fromkeys((bound.site.name for bound in self._sites), 0)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen to every forward pass of the sites inside the block."""
        handles = [site.module.register_forward_hook(partial(self._hear, site)) for site in self._sites]
        try:
            yield
        finally:
            self._live.clear()
            for handle in handles:
                handle.remove()

    def expect(self, batch: Batch) -> None:
        """Announce what the next forward pass is given."""
        self._batch = batch

    def results(self, sequences: int) -> Results:
        """Site -> terminal -> tensor; input statistics under the leading site only. To be called once.

        Raises:
            InvalidInput: a site never ran.
        """
        if silent := [site.site.name for site in self._sites if site.site.name not in self.leaders]:
            raise InvalidInput(f"{silent[0]} never ran: calibrate on samples that hold what it reads, such as images")
        found: Results = {site.site.name: {} for site in self._sites}
        for name, inputs in self._inputs.items():
            found[name] |= inputs.results(self._shares(name, sequences))
        for name, outputs in self._outputs.items():
            for kept in sorted(self._output_names):
                found[name][f"Y_{kept}"] = outputs.result(kept, self._shares(name, sequences))[:, None]
        return found

    def _shares(self, name: str, sequences: int) -> int:
        """What the sums of squares of a site are divided by."""
        return sequences

    def _hear(self, bound: SiteModule, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        site, inputs, outputs = bound.site, args[0].detach(), output.detach()
        leader = self._leader(site.name, site.block, args[0])
        modality = None
        if site.component == LANGUAGE and self._batch is not None:
            modality = self._batch.kinds()
            if self._batch.keep is not None:
                inputs, outputs = self._batch.real(inputs), self._batch.real(outputs)
        self._add(bound, leader, inputs, outputs, modality)

    def _add(self, bound: SiteModule, leader: str, inputs: Tensor, outputs: Tensor, modality: Tensor | None) -> None:
        """Take in the rows of a site's inputs, if it is their leader, and of its outputs, and their modality."""
        site = bound.site
        self.rows[site.name] += outputs.numel() // site.out_features
        if self._input_names and leader == site.name:
            if leader not in self._inputs:
                self._inputs[leader] = InputSums(site.in_features, inputs.device, self._input_names, self._wanda)
            self._inputs[leader].add(inputs.reshape(-1, site.in_features), modality)
        if self._output_names:
            if site.name not in self._outputs:
                self._outputs[site.name] = ColumnSums(site.out_features, outputs.device, self._output_names)
            self._outputs[site.name].add(outputs.reshape(-1, site.out_features))

    def _leader(self, name: str, block: int, inputs: Tensor) -> str:
        if block != self._live_block:
            self._live.clear()
            self._live_block = block
        found = next((reader for tensor, reader in self._live if tensor is inputs), name)
        if found == name:
            self._live.append((inputs, name))
        if self.leaders.setdefault(name, found) != found:
            raise EvopruneError(f"{name} shares its input with other layers in one batch and not in another")
        return found


@torch.no_grad()
def forward_pass(
    model: nn.Module,
    sums: ForwardSums,
    calibration: Sequences,
    batch: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Run the calibration through the model's body while `sums` listens.

    Args:
        model: a transformers language model; its head is not run.
        sums: what listens.
        calibration: int64 [n, window], run `batch` at a time, or samples.
        batch: windows per forward pass.
        device: of the embeddings.
        advance: called with the number of sequences done since its last call.
    """
    body = getattr(model, "base_model", model)
    with sums.hooked():
        for given in forward_batches(calibration, batch, device):
            sums.expect(given)
            body(**given.inputs, use_cache=False)
            advance(given.rows)
