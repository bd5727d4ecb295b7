"""The note of a run's study, in Markdown, which the dashboard renders."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from evoprune.fitness.part_merges import read_block
from evoprune.metrics.emit import latex, to_text
from evoprune.metrics.expression import Expression
from evoprune.search.candidate import Candidate
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.config_sections import SearchConfig
from evoprune.search.kinds import kind_of
from evoprune.search.mask_words import metric_counts
from evoprune.search.objective_words import over_most_likely
from evoprune.search.policy_search import PolicySearch
from evoprune.search.pooled_search import PooledSearch
from evoprune.search.removal import PLAIN
from evoprune.search.tables import WINNERS, heldout_caption, heldout_rows, target_text
from evoprune.search.tables_front import front_caption, front_head, front_rows, span
from evoprune.search.tables_policy import found_text
from evoprune.search.tables_policy import removed_text as removed_policy_text
from evoprune.search.tables_structure import removed_text


def searching_note(
    config: MetricSearchConfig, best: Candidate | None, evaluations: int, births: int, rung_counts: Sequence[int]
) -> str:
    """How far a search is.

    Args:
        best: so far; None before the first result.
        evaluations: candidates with a forward pass.
        births: all of them.
        rung_counts: how many candidates have got to each rung.
    """
    budget = "" if config.evaluations is None else f" of {config.evaluations:,}"
    time = "" if config.minutes is None else f", at most {config.minutes:g} min"
    rows = [
        ("evaluations", f"{evaluations:,}{budget}{time}"),
        ("births", f"{births:,}, {births - evaluations:,} of them answered without a forward pass"),
        ("candidates by rung", " → ".join(f"{count:,}" for count in rung_counts)),
    ]
    if config.target.allocation is not None:
        rows.append(("target", f"{config.aim}, {config.target.allocation}"))
    elif config.target.compressor != PLAIN:
        rows.append(("target", config.aim))
    if best is None:
        return "\n".join(["## Searching", "", *_table(("", ""), rows)])
    tokens = config.racing.rungs[len(best.rungs) - 1] * config.data.window
    over = over_most_likely(config.top_k)
    rows = [
        ("fitness", f"{best.value:.5f} ({config.objective}{over} on text B, {tokens:,} tokens; lower is better)"),
        ("from", f"birth {best.birth} ({best.origin}), complexity {best.complexity}"),
        *rows,
    ]
    return "\n".join(
        [
            "## Searching: the best so far",
            "",
            *_formula(best.expression),
            *_table(("", ""), rows),
            "",
            "Fitness is from the text that the search looks at; the result, on text that nobody has seen, comes last.",
        ]
    )


def finished_note(result: Mapping[str, Any], winner: Expression, artifacts: Collection[str] = ()) -> str:
    """What a search has found: the winner, and everyone on held-out text.

    Args:
        result: the run's ``result.json``.
        winner: its expression.
        artifacts: names of the study's artifacts; pictures among them are shown.
    """
    best = result["best"]
    over = over_most_likely(result.get("top_k"))
    rows = [
        tuple(f"**{cell}**" if cell else "" for cell in row) if row[0] in WINNERS else row
        for row in heldout_rows(result)
    ]
    return "\n".join(
        [
            f"## Winner: {result['model']} at {target_text(result)}",
            "",
            *_picture("formula.svg", to_text(winner), artifacts),
            *_formula(winner),
            *_table(("held-out text", "perplexity", "loss", "KL", "minus winner's"), rows),
            "",
            heldout_caption(result),
            "",
            f"Found as birth {best['birth']} ({best['origin']}) in {result['evaluations']:,} evaluations of "
            f"{result['births']:,} births, seed {result['seed']}; fitness {best['fitness']:.5f} ({result['objective']}"
            f"{over} on text B), complexity {best['complexity']}. Metric and report are among the study's artifacts.",
            "",
            *_picture("convergence.svg", "best so far by evaluations", artifacts),
            *_picture("front.svg", "fitness against complexity", artifacts),
        ]
    )


def searching_generations_note(
    config: SearchConfig, search: PooledSearch[Any], evaluations: int, stage_counts: Sequence[int]
) -> str:
    """How far a search by generations is.

    Args:
        evaluations: candidates with a forward pass.
        stage_counts: how many candidates have got to each stage.
    """
    budget = "" if config.evaluations is None else f" of {config.evaluations:,}"
    time = "" if config.minutes is None else f", at most {config.minutes:g} min"
    rows = [
        ("evaluations", f"{evaluations:,}{budget}{time}"),
        ("generation", f"{search.generation:,}"),
        ("candidates by stage", " → ".join(f"{count:,}" for count in stage_counts)),
    ]
    if search.leader is not None:
        fitness, words = search.leader
        over = over_most_likely(config.top_k)
        rows = [("fitness", f"{fitness:.5f} (KL{over} on text B; lower is better)"), ("best", words), *rows]
    return "\n".join(["## Searching", "", *_table(("", ""), rows)])


def finished_allocation_note(result: Mapping[str, Any], artifacts: Collection[str] = ()) -> str:
    """What an allocation search has found: everyone on held-out text; arguments as in `finished_note`."""
    best = result["best"]
    over = over_most_likely(result.get("top_k"))
    return "\n".join(
        [
            f"## Winner: {result['model']} at {target_text(result)}",
            "",
            *_picture("allocation.svg", "sparsity by matrix", artifacts),
            *_heldout(result),
            f"Found in generation {best['generation']} ({best['origin']}) in {result['evaluations']:,} evaluations, "
            f"seed {result['seed']}; fitness {best['fitness']:.5f} (KL{over} on text B). The allocation and the "
            "report are among the study's artifacts.",
            "",
            *_picture("convergence.svg", "best so far by evaluations", artifacts),
        ]
    )


def finished_structure_note(result: Mapping[str, Any], artifacts: Collection[str] = ()) -> str:
    """What a structure search has found: everyone on held-out text; arguments as in `finished_note`."""
    best = result["best"]
    over = over_most_likely(result.get("top_k"))
    rows = [
        (
            str(block),
            *(["merged"] * 2 if merged[0] else [f"{groups:,}", f"{groups * each:,}"]),
            "merged" if merged[1] else f"{neurons:,}",
        )
        for block, ((groups, each, neurons), merged) in enumerate(map(read_block, best["shape"]))
    ]
    return "\n".join(
        [
            f"## Winner: {result['model']} at {target_text(result)}",
            "",
            *_heldout(result),
            f"Found in generation {best['generation']} ({best['origin']}) in {result['evaluations']:,} evaluations, "
            f"seed {result['seed']}; fitness {best['fitness']:.5f} (KL{over} on text B). Gone is "
            f"{removed_text(result)}. The shape and the report are among the study's artifacts.",
            "",
            *_picture("shape.svg", "what every block keeps", artifacts),
            *_table(("block", "KV groups", "query heads", "neurons"), rows),
            "",
            *_picture("convergence.svg", "best so far by evaluations", artifacts),
        ]
    )


def searching_policy_note(config: SearchConfig, search: PolicySearch, evaluations: int) -> str:
    """How far a policy search is; arguments as of `searching_generations_note`."""
    budget = "" if config.evaluations is None else f" of {config.evaluations:,}"
    time = "" if config.minutes is None else f", at most {config.minutes:g} min"
    rows = [("evaluations", f"{evaluations:,}{budget}{time}"), ("step", f"{search.step:,}")]
    if search.leader is not None:
        fitness, words = search.leader
        said = f"{config.objective}{over_most_likely(config.top_k)} on text B"
        rows = [("fitness", f"{fitness:.5f} ({said}; lower is better)"), ("best", words), *rows]
    return "\n".join(["## Searching", "", *_table(("", ""), rows)])


def finished_policy_note(result: Mapping[str, Any], artifacts: Collection[str] = ()) -> str:
    """What a policy search has found: everyone on held-out text; arguments as in `finished_note`."""
    best = result["best"]
    over = over_most_likely(result.get("top_k"))
    counts = best["policy"].get("metrics")
    kept = [] if counts is None else [*_table(("metric", "matrices"), _counted(counts.values())), ""]
    return "\n".join(
        [
            f"## Winner: {result['model']} at {target_text(result)}",
            "",
            *_heldout(result),
            f"Found {found_text(result)}, in {result['evaluations']:,} evaluations, seed {result['seed']}; fitness "
            f"{best['fitness']:.5f} ({result['objective']}{over} on text B). Gone is {removed_policy_text(result)}. "
            "The policy and the report are among the study's artifacts.",
            "",
            *kept,
            *_picture("kept.svg", "what every block keeps", artifacts),
            *_picture("probabilities.svg", "keep probabilities by block and unit", artifacts),
            *_picture("convergence.svg", "losses by step", artifacts),
        ]
    )


def _counted(metrics: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, f"{count:,}") for name, count in metric_counts(metrics)]


def _heldout(result: Mapping[str, Any]) -> list[str]:
    """Everyone on held-out text."""
    rows = [
        tuple(f"**{cell}**" if cell else "" for cell in row) if row[0] in WINNERS else row
        for row in heldout_rows(result)
    ]
    head = ("held-out text", "perplexity", "loss", "KL", "minus winner's")
    return [*_table(head, rows), "", heldout_caption(result), ""]


def finished_front_note(result: Mapping[str, Any], artifacts: Collection[str] = ()) -> str:
    """What a search for a front has found: its members on held-out text; arguments as in `finished_note`."""
    return "\n".join(
        [
            f"## Front: {result['model']}, {target_text(result)}",
            "",
            *_picture("front.svg", "held-out loss against cost", artifacts),
            *_table(front_head(result), [cells for _, *cells in front_rows(result)]),
            "",
            front_caption(result),
            "",
            f"{len(result['front'])} {kind_of(result['kind']).winner}s {span(result)}, found in "
            f"{result['evaluations']:,} evaluations, seed {result['seed']}. The one nearest to a sparsity of "
            f"{result['target']} and the report are among the study's artifacts.",
        ]
    )


def _picture(name: str, words: str, artifacts: Collection[str]) -> list[str]:
    return [f"![{words.replace('[', '(').replace(']', ')')}](artifact:{name})", ""] if name in artifacts else []


def _formula(expression: Expression) -> list[str]:
    """The formula to read, to copy into a paper, and to give to `--metric`; the dashboard itself sets no formulas."""
    return [
        f"**S = {_escaped(to_text(expression))}**",
        "",
        *("```latex", f"S = {latex(expression)}", "```", ""),
        *("```python", expression.text, "```", ""),
    ]


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~])", r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right where there are more than two columns."""
    rule = ["---", *(["---:"] * (len(head) - 1) if len(head) > 2 else ["---"])]
    return [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (head, rule, *rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
