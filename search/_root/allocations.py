"""Allocations in Python: made by an allocator, or read from a file, and checked against what else is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from evoprune.calibration import (
    ALL_TOKENS,
    TEXT,
    Progress,
    collect_statistics,
    default_window,
    loaded,
    silent,
    token_choice,
)
from evoprune.fitness.allocating import (
    Reader,
    allocate_by_formula,
    allocate_model,
    searched_budgets,
    statistics_needed,
)
from evoprune.fitness.allocators import ALLOCATORS, READ_A, READ_B, Allocator, configured
from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.compressors import at_bits, compressor_of
from evoprune.fitness.examples import read_side
from evoprune.fitness.mixed_precision import LEVELS, BitTarget, allocate_bits, check_allocates_bits
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import DEFAULT_SPARSITY, check_allocation, check_rule, mask_rule, needed_statistics
from evoprune.fitness.samples import Sequences
from evoprune.fitness.site_statistics import reading
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.allocation_formula import AllocationFormula, read_formula
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.records import MaskRule

# Windows of text B on which an allocator that tries things out compares losses.
LOSS_SEQUENCES = 8
SEARCHED = "searched"
UNIFORM = "uniform"
_MOST_THREADS = 1024


def allocate(
    model: str | LanguageModel = "reference",
    allocator: str | AllocationFormula = "owl",
    sparsity: float | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    budgets: Mapping[str, float] | Literal["searched"] | None = None,
    bits: float | None = None,
    bit_levels: str | Sequence[int] | None = None,
    pattern: str | None = None,
    compressor: str = "obq",
    metric: str | Criterion = "wanda",
    calibration: str = "corpus",
    calibration_sequences: int = TEXT.calibration_sequences,
    calibration_window: int | None = None,
    tokens: str | TokenChoice = ALL_TOKENS,
    loss_sequences: int = LOSS_SEQUENCES,
    seed: int = 0,
    progress: Progress = silent,
    **loading: Any,
) -> Allocation:
    """How much each matrix should lose, so that the whole model loses `sparsity`, or each group its own budget.

    With `bits`, how many bits the weights of each matrix should have.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model, which stays as it is.
        allocator: a name of `evoprune list allocators`, or a formula, as `read_formula` of
            `evoprune.metrics.allocation_formula` reads it from a run's ``export/formula.json``.
        sparsity: fraction of all prunable weights to remove, in [0, 1); 0.5 unless `budgets` is given. Beside budgets
            it says what all lose together: the matrices in no group lose the rest. Without it they stay dense.
        parameters: of the allocator, by name; `evoprune list allocators` shows them with their defaults.
        budgets: sparsity of each group of matrices, by component, such as ``vision_tower``, or by pattern of names,
            such as ``*.mlp.*``. A matrix that fits several is in the first. The allocator runs on each group by itself.
            ``searched`` tries out budgets of the components that together lose `sparsity`.
        bits: mean of them for a weight that stays, met as nearly as the levels can from below. Every matrix then loses
            `sparsity`, 0 unless it is given, or has the `pattern`; ``dp`` with ``sparsities`` chooses these too.
        bit_levels: that a matrix may have, 2 to 8 or 16, which leaves its weights whole; None is 2, 3, 4, 8 and 16.
        pattern: ``N:M``, beside bits in place of a sparsity.
        compressor: beside bits, without bits of its own: what makes the levels that ``dp`` compares.
        metric: the criterion whose scores an allocator such as ``owl`` reads; see `prune`.
        calibration: text of the statistics and outputs (its side A) and of the losses that some allocators compare
            (its side B).
        calibration_sequences, calibration_window, tokens: windows of text A; see `collect_statistics`.
        loss_sequences: windows of text B.
        seed: draws the windows.
        progress: told what runs and how far it is.
        loading: further arguments of `load_model`, where `model` is a name.

    Returns:
        An allocation for `prune`; `evoprune.metrics.allocation_file` writes it to a file.

    Raises:
        InvalidInput: something of the above does not exist or does not fit, or the budget cannot be reached.
    """
    formula = allocator if isinstance(allocator, AllocationFormula) else None
    if formula is not None and (parameters or budgets):
        raise InvalidInput("a formula has neither parameters nor budgets of groups: give a sparsity alone")
    asked = None if bits is None else BitTarget.of(bits, bit_levels)
    if asked is None and (bit_levels is not None or pattern is not None):
        raise InvalidInput("levels of bits and a pattern go with bits: say how many on average")
    if asked is not None and (formula is not None or budgets):
        raise InvalidInput("bits are shared out over all matrices by an allocator: leave out formulas and budgets")
    chosen = configured(str(allocator), parameters) if formula is None else None
    reads: Reader = reading(formula.reads) if formula is not None else cast(Allocator, chosen)
    criterion = load_metric(metric) if isinstance(metric, str) else metric
    searched = budgets == SEARCHED
    target = DEFAULT_SPARSITY if sparsity is None and (searched or not budgets) else sparsity
    rule = None
    if asked is not None:
        assert chosen is not None
        check_allocates_bits(str(allocator), chosen, asked)
        rule = mask_rule(criterion, bits_sparsity(sparsity, pattern), pattern, "row" if pattern is None else None)
    elif target is not None:
        MaskRule(target)
    token_choice(tokens)
    language_model = loaded(model, loading, progress)
    if rule is not None:
        check_rule(language_model, rule, compressor)
    text: dict[str, Any] = {"calibration": calibration, "calibration_sequences": calibration_sequences, "seed": seed}
    text["calibration_window"] = default_window(language_model, calibration_window)
    needs = statistics_needed(reads, criterion)
    if asked is not None:
        needs |= needed_statistics(criterion, compressor)
    statistics = collect_statistics(language_model, needs, tokens=tokens, progress=progress, **text) if needs else None

    def windows(side: str, count: int) -> Sequences:
        window = text["calibration_window"]
        return read_side(language_model, calibration, side, window=window, count=count, seed=seed)

    given: dict[str, Any] = {
        "criterion": criterion,
        "statistics": statistics,
        "calibration": windows("A", calibration_sequences) if reads.uses & READ_A else None,
        "search": windows("B", loss_sequences) if searched or reads.uses & READ_B else None,
        "progress": progress,
    }
    if formula is not None:
        assert target is not None
        found = allocate_by_formula(language_model, formula, target, **given)
        return replace(found, fingerprint=language_model.fingerprint)
    assert chosen is not None
    if asked is not None and rule is not None:
        found = allocate_bits(language_model, str(allocator), chosen, asked, rule, compressor=compressor, **given)
        return replace(found, fingerprint=language_model.fingerprint)
    if searched:
        assert target is not None
        budgets = searched_budgets(language_model, str(allocator), chosen, target, **given)
        target = None
    found = allocate_model(language_model, str(allocator), chosen, target, budgets=cast(Any, budgets), **given)
    return replace(found, fingerprint=language_model.fingerprint)


def bits_sparsity(sparsity: float | None, pattern: str | None) -> float | None:
    """The sparsity where weights get bits: nothing goes unless something says so."""
    return 0.0 if sparsity is None and pattern is None else sparsity


@dataclass(frozen=True)
class Provenance:
    """What a searched allocation says of the search, as far as its weights depend on it.

    Attributes:
        compressor: None if it does not say.
        threads: of torch, in the search's workers; None if nothing depends on them.

    Raises:
        InvalidInput: it says what cannot be.
    """

    compressor: str | None = None
    threads: int | None = None

    @classmethod
    def of(cls, allocation: Allocation | None) -> Provenance:
        """That of an allocation, if there is one."""
        if allocation is None or "compressor" not in allocation.parameters:
            return cls()
        compressor, threads = (allocation.parameters.get(name) for name in ("compressor", "threads"))
        compressor_of(str(compressor))
        if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
            raise InvalidInput(f"the allocation was searched with {str(threads)[:40]!r} threads: give a whole number")
        return cls(str(compressor), threads)


@dataclass(frozen=True)
class GivenAllocation:
    """The allocation that `prune` was asked for, with what else was said of the target.

    Raises:
        InvalidInput: things that do not go together, a name that does not exist, or a file that cannot be read: all
            that can be told without the model.
    """

    allocation: str | Path | Allocation | None
    parameters: Mapping[str, Any]
    sparsity: float | None
    pattern: str | None
    group: str | None
    budgets: Mapping[str, float] | Literal["searched"] = field(default_factory=dict)
    bits: BitTarget | None = None

    def __post_init__(self) -> None:
        if self.budgets and self.bits is not None:
            raise InvalidInput("bits are shared out over all matrices: leave out the budgets of groups")
        if self.budgets and self._named is None:
            raise InvalidInput("budgets of groups need an allocator, such as uniform or das; a file has its own")
        if self.allocation is None:
            if self.parameters:
                raise InvalidInput("parameters of an allocation need an allocation: name an allocator or a file")
            return
        if self.pattern is not None and not self.has_bits:
            raise InvalidInput("a pattern fixes the sparsity of every row: give an allocation or a pattern, not both")
        if self.group not in (None, "row"):
            raise InvalidInput(f"an allocation counts by row: leave out the group {self.group!r}")
        if self._named is not None:
            allocator = configured(self._named, self.parameters)
            if self.bits is not None:
                check_allocates_bits(self._named, allocator, self.bits)
        elif isinstance(self.allocation, Allocation):
            self._checked(self.allocation)
        elif _is_json(self.allocation):
            if self.parameters:
                raise InvalidInput("an allocation in a .json has its parameters in it: give none beside it")
            if self._read is not None:
                self._checked(self._read)
            elif self.bits is not None:
                raise InvalidInput("a formula has no bits: leave them out, or name an allocator such as dp")
        elif not names_file(self.allocation):
            configured(str(self.allocation))  # which says what name may be meant
        elif self.bits is not None:
            raise InvalidInput("a text of EvoPress has no bits: leave them out, or name an allocator such as dp")

    @property
    def _named(self) -> str | None:
        """The allocator's name, if it is one."""
        return str(self.allocation) if isinstance(self.allocation, str) and self.allocation in ALLOCATORS else None

    @property
    def reads_model(self) -> bool:
        """Whether an allocator or a formula has to look at more than the shapes of the model."""
        if self.allocation is None or isinstance(self.allocation, Allocation):
            return False
        if self._named is not None:
            return self._named != UNIFORM or self.budgets == SEARCHED or self.bits is not None
        return self._formula is not None

    @property
    def has_bits(self) -> bool:
        """Whether the matrices get bits of their own."""
        known = self.allocation if isinstance(self.allocation, Allocation) else self._read
        return (self._named is not None and self.bits is not None) or (known is not None and known.bits is not None)

    def rule(self, criterion: Criterion, compressor: str) -> MaskRule:
        """How much goes, as far as that is known before the allocation is; see `mask_rule`.

        Raises:
            InvalidInput: see there; or the matrices get bits, and the compressor has none.
        """
        if not self.has_bits:
            return mask_rule(criterion, self.sparsity, self.pattern, self.group, compressor)
        for level in LEVELS if self.bits is None else self.bits.levels:
            at_bits(compressor, level)
        return mask_rule(criterion, bits_sparsity(self.sparsity, self.pattern), self.pattern, None, compressor)

    @cached_property
    def provenance(self) -> Provenance:
        """What an `Allocation`, or a file that holds one, says of the search that found it."""
        return Provenance.of(self.allocation if isinstance(self.allocation, Allocation) else self._read)

    @cached_property
    def _read(self) -> Allocation | None:
        """The allocation in the file, if it is one of ours that holds one."""
        if self.allocation is None or isinstance(self.allocation, Allocation) or self._named is not None:
            return None
        known = _is_json(self.allocation) and self._formula is None
        return read_allocation(self.allocation) if known else None

    @cached_property
    def _formula(self) -> AllocationFormula | None:
        """The formula, if it is a file that holds one."""
        assert self.allocation is not None and not isinstance(self.allocation, Allocation)
        return read_formula(self.allocation) if _is_json(self.allocation) else None

    def resolved(
        self, language_model: LanguageModel, criterion: Criterion, compressor: str, text: dict[str, Any]
    ) -> Allocation | None:
        """The allocation for this model; None if none was asked for."""
        if self.allocation is None:
            return None
        if self._named is not None:
            asked: dict[str, Any] = {}
            if self.bits is not None:
                asked = {"bits": self.bits.mean, "bit_levels": self.bits.levels}
                asked |= {"pattern": self.pattern, "compressor": compressor}
            return allocate(
                language_model,
                self._named,
                self.sparsity,
                parameters=self.parameters,
                budgets=self.budgets,
                metric=criterion,
                **asked,
                **text,
            )
        if isinstance(self.allocation, Allocation):
            check_allocation(language_model, self.allocation)
            return self.allocation
        if self._formula is not None:
            return allocate(language_model, self._formula, self.sparsity, metric=criterion, **text)
        return self._checked(
            read_allocation(
                self.allocation,
                model=type(language_model.model).__name__,
                sites=[bound.site for bound in language_model.sites],
                sparsity=self.sparsity,
                step=_step(self.parameters),
            )
        )

    def _checked(self, allocation: Allocation) -> Allocation:
        if self.sparsity is not None and self.sparsity != allocation.sparsity:
            raise InvalidInput(
                f"the allocation's budget is a sparsity of {allocation.sparsity:g}, not {self.sparsity:g}: "
                f"give {allocation.sparsity:g} or none"
            )
        if self.bits is not None and (allocation.bits is None or allocation.bits.mean != self.bits.mean):
            has = "no bits" if allocation.bits is None else f"a mean of {allocation.bits.mean:g} bits"
            raise InvalidInput(
                f"the allocation has {has}, not {self.bits.mean:g}: leave out the bits, or name an allocator"
            )
        return allocation


def _is_json(allocation: str | Path) -> bool:
    return Path(allocation).suffix == ".json"


def names_file(allocation: str | Path) -> bool:
    """Whether a file is meant, there or not, rather than an allocator."""
    return isinstance(allocation, Path) or "/" in allocation or "." in allocation or Path(allocation).is_file()


def _step(parameters: Mapping[str, Any]) -> int | None:
    """The weights in a level of EvoPress's text, if they are given.

    Raises:
        InvalidInput: another parameter is, or this one is no whole number.
    """
    for name in parameters:
        if name != "step":
            raise InvalidInput(f"a file of EvoPress has no parameter {str(name)[:40]!r}; it has step")
    if "step" not in parameters:
        return None
    try:
        return int(parameters["step"])
    except (TypeError, ValueError):
        raise InvalidInput(f"step is {str(parameters['step'])[:40]!r}: give the weights in a level") from None
