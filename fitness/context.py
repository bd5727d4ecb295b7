"""What a worker has to know to score candidates: a JSON recipe, never live objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from evoprune.fitness.parcels import require
from evoprune.metrics.allocation_file import from_json
from evoprune.metrics.records import Group, MaskRule


@dataclass(frozen=True)
class EvaluationContext:
    """The model, the texts and the measure of one search. Everything here is part of a run's identity.

    Attributes:
        model: ``reference``, a folder or a Hub id; with `revision` for the latter.
        dtype, device: as `load_model` takes them.
        trust_remote_code: the user's own flag.
        data: source of texts B and C; `calibration` that of text A.
        seed: draws the windows of texts A and B; text C is fixed.
        window: tokens in a window of texts B and C.
        rungs: windows of text B seen up to each rung, increasing: later rungs contain the earlier.
        final_windows: further windows of text B, as far as it has them, on which finalists are compared.
        heldout_windows: windows of text C; None takes all.
        calibration_sequences, calibration_window: text A.
        statistics: names that candidates may read.
        objective: name of the measure.
        top_k: on text B the KL is over so many of the dense model's most likely tokens; None takes all. Text C and
            trainings always have all.
        sparsity, pattern, group: the mask rule.
        allocation: the document of an `Allocation`, if matrices lose different fractions; the mask rule is then its
            budget, by row.
        compressor: of a metric search: what becomes of the weights that a mask keeps.
        threads: torch threads on a CPU.
        places: where `model`, `data` and `calibration` are on a cluster's nodes; see `pack_inputs`. No part of the
            identity.
    """

    model: str = "reference"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    data: str = "corpus"
    seed: int = 0
    window: int = 256
    rungs: tuple[int, ...] = (4, 16, 64)
    final_windows: int = 0
    heldout_windows: int | None = None
    calibration: str = "corpus"
    calibration_sequences: int = 128
    calibration_window: int = 256
    statistics: tuple[str, ...] = ()
    objective: str = "kl"
    top_k: int | None = None
    sparsity: float | None = 0.6
    pattern: tuple[int, int] | None = None
    group: Group = "row"
    allocation: Mapping[str, Any] | None = None
    compressor: str = "mask"
    threads: int = 1
    places: Mapping[str, str] = field(default_factory=dict)

    def place(self, source: str) -> str:
        """What to read for a model or a text on this node: `source` itself, or the parcel that holds it."""
        if source not in self.places:
            return source
        name, _, inside = self.places[source].partition("/")
        return str(require(name) / inside)

    @property
    def rule(self) -> MaskRule:
        """How many weights go."""
        return MaskRule(self.sparsity, self.pattern, self.group)

    @property
    def own(self) -> dict[str, float]:
        """Sparsity of each matrix by site name, in [0, 1]; empty if all have the rule's."""
        return {} if self.allocation is None else from_json(self.allocation).by_name()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EvaluationContext:
        """The context that `to_json` wrote."""
        known = {field.name for field in fields(cls)}
        chosen: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        for name in ("rungs", "statistics", "pattern"):
            if chosen.get(name) is not None:
                chosen[name] = tuple(chosen[name])
        return cls(**chosen)
