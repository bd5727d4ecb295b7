"""The files that the winner of a metric search leaves, and all that they say about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evoprune.metrics.canonical import metric_key
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.records import Group
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.identity import versions
from evoprune.search.objective_words import objective_facts, over_most_likely
from evoprune.search.removal import PLAIN, compressor_option, followed_by
from evoprune.search.replaying import NOTE, OPTION, REPLAYED
from evoprune.search.result import measured_on


def winner_export(
    config: MetricSearchConfig,
    identity: Mapping[str, Any],
    result: Mapping[str, Any],
    expression: Expression,
    *,
    dtype: str,
    seconds: float,
) -> MetricExport:
    """The winner with all that its files say about it.

    Args:
        identity: the run's ``run.json``.
        result: the run's ``result.json``.
        dtype: of the model while statistics were collected.
        seconds: that the run took.

    Source: symbolic pruning metrics, section 4.1.
    """
    best, group = result["best"], result["group"]
    heldout = {
        "dense": result["dense"]["heldout"],
        "winner": best["heldout"],
        **{row["name"]: row["heldout"] for row in result["baselines"]},
    }
    shown = [name for name in ("winner", "dense", "wanda", "power") if name in heldout]
    tokens = result["rung_tokens"][: len(best["rungs"])]
    return MetricExport(
        Metric(expression, group, f"evoprune run {result['run']}"),
        rule=config.target.rule,
        title=f"found by evoprune on {config.model.name} at {result['target']}{_allocated(result)}"
        f"{followed_by(result['compressor'])}",
        provenance={
            "run": result["run"],
            "created": identity["created"],
            "seconds": round(seconds, 1),
            "model": config.model.name,
            "model_fingerprint": identity["model_fingerprint"],
            "statistics": {
                "names": best["statistics"],
                "data": result["calibration"]["text"],
                "sequences": result["calibration"]["sequences"],
                "window": result["calibration"]["window"],
                "seed": config.seed,
                "dtype": dtype,
            },
            "seed": config.seed,
            "compressor": config.target.compressor,
            "fitness": f"{config.objective} {best['fitness']:.5f} ± {best['stderr']:.5f}"
            f"{over_most_likely(config.top_k)} on {tokens[-1]} tokens",
            "evaluations": result["evaluations"],
            "parents": best["parents"],
            "config": config.identity,
            "git": identity.get("git"),
            "versions": versions(),
        },
        results={
            "fitness": {
                **objective_facts(config),
                "rungs": [{"tokens": n, "value": value} for n, value in zip(tokens, best["rungs"], strict=True)],
                "stderr": best["stderr"],
            },
            "heldout": {name: heldout[name] for name in ("dense", "winner")},
            "heldout_perplexity": {name: round(heldout[name]["perplexity"], 4) for name in shown},
            "baselines": result["baselines"],
        },
        equivalent_to=_equivalents(expression, result, group),
    )


def readme(result: Mapping[str, Any], export: MetricExport) -> str:
    """The text of ``README.md``: what was found, and the held-out table."""
    own = result["best"]["heldout"]
    rows = [("dense", result["dense"]["heldout"], None), ("**winner**", own, None)]
    replayed = result["best"].get("replayed")
    if replayed is not None:
        rows.append((REPLAYED, replayed, result["best"]["winner_minus_replayed"]))
    ranked = sorted(result["baselines"], key=lambda row: (row["heldout"]["loss"], row["name"]))
    rows += [(row["name"], row["heldout"], row["winner_minus_this"]) for row in ranked]
    lines = [
        f"# A pruning metric {export.title}",
        "",
        f"    {export.metric.expression.text}",
        "",
        f"`metric.py` needs nothing but torch; `{_command(result)}` uses it. {_same(export)}",
        "",
        *_compressed(result),
        "| | perplexity | loss | KL | minus winner's |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(_row(name, heldout, difference) for name, heldout, difference in rows),
        "",
        f"Held-out text of {result['data']}: {own['tokens']:,} predicted tokens, {measured_on(result)}. Loss "
        "and KL are in nats per token; KL is from the dense to the pruned model.",
        "",
        f"Fitness on search text: {export.provenance['fitness']}. Run {result['run']}, seed {result['seed']}, "
        f"{result['evaluations']} evaluations.",
    ]
    return "\n".join(lines) + "\n"


def _command(result: Mapping[str, Any]) -> str:
    return f"evoprune prune MODEL --metric metric.json{compressor_option(result)}"


def _compressed(result: Mapping[str, Any]) -> list[str]:
    """What has to be known of the numbers below where masks were not all."""
    compressor = result["compressor"]
    if compressor == PLAIN:
        return []
    return [
        f"What every metric keeps was compressed by `{compressor}` before it was measured, that of the baselines too: "
        f"this one was found for masks that are followed by it.{_replayed(result)}",
        "",
    ]


def _replayed(result: Mapping[str, Any]) -> str:
    if result["best"].get("replayed") is None:
        return ""
    return f" {NOTE} That is what `{_command(result)}{OPTION}` writes."


def _row(name: str, heldout: Mapping[str, Any], winner_minus_this: Mapping[str, float] | None) -> str:
    kl = f"{heldout['kl']:.4f}" if name != "dense" else ""
    difference = ""
    if winner_minus_this is not None:
        difference = f"{-winner_minus_this['loss']:+.4f} ± {winner_minus_this['stderr']:.4f}"
    loss = f"{heldout['loss']:.4f} ± {heldout['stderr']:.4f}"
    return f"| {name} | {heldout['perplexity']:,.2f} | {loss} | {kl} | {difference} |"


def _same(export: MetricExport) -> str:
    names = ", ".join(export.equivalent_to)
    return f"It prunes the same weights as {names}." if names else "No listed criterion prunes the same weights."


def _equivalents(expression: Expression, result: Mapping[str, Any], group: Group) -> tuple[str, ...]:
    """Baselines and listed criteria whose canonical form is the winner's, so that their masks are too."""
    known = {name: metric.expression for name in CRITERIA if isinstance(metric := CRITERIA[name], Metric)}
    known |= {row["name"]: parse(row["expression"]) for row in result["baselines"] if row["name"] == "power"}
    key = metric_key(expression, group)
    return tuple(name for name in sorted(known) if metric_key(known[name], group) == key)


def _allocated(result: Mapping[str, Any]) -> str:
    """How matrices share the sparsity, where they do not all have it."""
    allocation = result.get("allocation")
    return "" if allocation is None else f", allocated by {allocation['allocator']}"
