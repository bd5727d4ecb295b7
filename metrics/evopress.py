"""The texts that EvoPress reads and writes: a level for each matrix, or what is dropped of each block.

Source: EvoPress, arXiv:2410.14649; the formats of its released code; allocation chapter, sections 2.2 and 5.6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from evoprune.metrics.allocation import Allocation, SiteSparsity, check_matrices, exact_sparsity, repair
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site, is_attention, removed_count, split_site

EVOPRESS = "evopress"
"""What an allocation from such a text names as its allocator."""

DROPS = {(False, False): "none", (True, False): "attn", (False, True): "mlp", (True, True): "attn+mlp"}
"""The line of a block by whether its attention and its MLP are gone."""

_LINE = re.compile(r"\s*([\w.\-/]+)\s*:\s*([+-]?\d{1,12})\s*")


def to_evopress(allocation: Allocation, step: int = 1) -> str:
    """The text of an allocation: depth lines, where attentions and MLPs only go as a whole; else a level a matrix.

    A depth line is ``none``, ``attn``, ``mlp`` or ``attn+mlp``, one for each block in order. The others are
    ``module: level``, where a matrix at level l loses sparsity * weights + l * `step` weights. EvoPress reads them
    beside a database that was built with the same sparsity and step. Levels are rounded to whole ones, so that only a
    step of 1 keeps every allocation exactly.

    Raises:
        InvalidInput: the step is not at least 1, or the allocation has bits.
    """
    _check_step(step)
    if allocation.bits is not None:
        raise InvalidInput("EvoPress's text holds no bits beside sparsities: write the allocation to a .json")
    if (lines := _depth_lines(allocation)) is not None:
        return "".join(f"{line}\n" for line in lines)
    levels = []
    for site in allocation.sites:
        offset = site.removed - removed_count(allocation.sparsity, site.weights)
        levels.append(f"{site.name}: {(2 * offset + step) // (2 * step)}\n")
    return "".join(levels)


def from_evopress(
    text: str, *, model: str | None, sites: Sequence[Site] | None, sparsity: float | None, step: int | None
) -> Allocation:
    """The allocation of a profile that EvoPress found.

    Args:
        text: depth lines, or lines ``module: level``; see `to_evopress`.
        model, sites: the model, by class name and matrices in model order.
        sparsity: the budget; of depth lines, which say what goes, there is none to give.
        step: weights in a level; as the budget.

    Raises:
        InvalidInput: it is no such text, or of another model, needs what is not given, or has what is given; a level
            leads outside [0, 1], or the levels do not add up to the budget.
    """
    rows = [line.strip() for line in text.splitlines() if line.strip()]
    if rows and all(row in DROPS.values() for row in rows):
        if model is None or sites is None:
            raise InvalidInput("EvoPress's depth lines do not say of which model they are: name one")
        if step is not None:
            raise InvalidInput("EvoPress's depth lines have no levels: leave out the step")
        return _from_depth_lines(rows, model, sites)
    levels = evopress_levels(text)
    if sparsity is None or step is None or model is None or sites is None:
        raise InvalidInput(
            "EvoPress's text holds neither its budget nor the weights in a level: give both, such as "
            "--sparsity 0.7 --allocation-set step=1000000"
        )
    return _from_levels(levels, model, sites, sparsity, step)


def evopress_levels(text: str) -> dict[str, int]:
    """Level by module path.

    Raises:
        InvalidInput: a line is not ``module: level``, or names a module again; says which.
    """
    levels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise InvalidInput(
                f"line {number} is {line.strip()[:60]!r}: give lines such as model.layers.0.mlp.up_proj: -2, or only "
                "none, attn, mlp and attn+mlp, or a .json"
            )
        if match[1] in levels:
            raise InvalidInput(f"line {number} names {match[1][:120]} again: give each matrix one level")
        levels[match[1]] = int(match[2])
    if not levels:
        raise InvalidInput("it holds no allocation: give a .json of evoprune, or what EvoPress writes")
    return levels


def _from_levels(
    levels: Mapping[str, int], model: str, sites: Sequence[Site], sparsity: float, step: int
) -> Allocation:
    """Matrices at a sparsity of 1 are gone; the others are repaired by the few columns that no level is whole of."""
    _check_step(step)
    if not 0 <= sparsity < 1:
        raise InvalidInput(f"the budget is {sparsity}, outside [0, 1): give the fraction of weights to remove")
    check_matrices(model, dict.fromkeys(levels), model, sites)
    requested, removed = [], 0
    for site in sites:
        level, base = levels[site.name], removed_count(sparsity, site.weights)
        lost = base + level * step
        if not 0 <= lost <= site.weights:
            raise InvalidInput(
                f"level {level} of {site.name} is a sparsity of {lost / site.weights:.4g}, outside [0, 1]: its "
                f"{site.weights:,} weights have levels from {-(base // step)} to {(site.weights - base) // step} at "
                f"{step:,} weights a level"
            )
        columns, odd = divmod(lost, site.out_features)
        requested.append(lost / site.weights if odd else exact_sparsity(columns, site.in_features))
        removed += lost
    weights = sum(site.weights for site in sites)
    # A column of each matrix is lost in rounding, no more.
    if abs(removed - sparsity * weights) > sum(site.out_features for site in sites):
        raise InvalidInput(
            f"its levels remove {removed / weights:.4f} of all weights, not the budget of {sparsity:g}: "
            f"give --sparsity {removed / weights:.4f}"
        )
    stay = [at for at, share in enumerate(requested) if share < 1]
    left = sum(sites[at].weights for at in stay)
    target = exact_sparsity(max(removed_count(sparsity, weights) - (weights - left), 0), left) if stay else 0.0
    repaired = repair([requested[at] for at in stay], [sites[at] for at in stay], target)
    for at, share in zip(stay, repaired, strict=True):
        requested[at] = share
    return Allocation(model, sparsity, _with_shares(sites, requested), EVOPRESS, {"step": step})


def _from_depth_lines(rows: Sequence[str], model: str, sites: Sequence[Site]) -> Allocation:
    """What the lines drop, and no more; the budget is what that removes."""
    if len(rows) != sites[0].n_blocks:
        raise InvalidInput(
            f"the allocation is of another model: it has {len(rows)} depth lines, and this one has "
            f"{sites[0].n_blocks} blocks"
        )
    gone = {line: parts for parts, line in DROPS.items()}
    shares = [float(gone[rows[site.block]][0 if is_attention(site.kind) else 1]) for site in sites]
    entries = _with_shares(sites, shares)
    weights = sum(site.weights for site in sites)
    removed = sum(entry.removed for entry in entries)
    if removed == weights:
        raise InvalidInput("its depth lines drop every attention and every MLP: leave one")
    return Allocation(model, removed / weights, entries, EVOPRESS)


def _depth_lines(allocation: Allocation) -> list[str] | None:
    """A line for each block; None where a matrix stays in part, or blocks are not those of one stack."""
    parts: dict[tuple[int, bool], set[float]] = {}
    stacks = set()
    for site in allocation.sites:
        kind, block = split_site(site.name)
        stacks.add(site.name.removesuffix(f"{block}.{kind}"))
        parts.setdefault((block, is_attention(kind)), set()).add(site.sparsity)
    if len(stacks) > 1 or not all(shares in ({0.0}, {1.0}) for shares in parts.values()):
        return None
    blocks = sorted({block for block, _ in parts})
    gone = {part for part, shares in parts.items() if shares == {1.0}}
    if not gone or blocks != list(range(len(blocks))):
        return None
    return [DROPS[(block, True) in gone, (block, False) in gone] for block in blocks]


def _with_shares(sites: Sequence[Site], shares: Sequence[float]) -> tuple[SiteSparsity, ...]:
    return tuple(
        SiteSparsity(site.name, (site.out_features, site.in_features), share)
        for site, share in zip(sites, shares, strict=True)
    )


def _check_step(step: int) -> None:
    if step < 1:
        raise InvalidInput(f"a level of {step} weights cannot be: give a step of at least 1")
