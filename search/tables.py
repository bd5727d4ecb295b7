"""Results as tables for people: on a terminal, in a log, in a notebook."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.search.calibration import calibration_options
from evoprune.search.config_sections import SearchConfig
from evoprune.search.kinds import kind_of
from evoprune.search.objective_words import over_most_likely
from evoprune.search.progress import clock
from evoprune.search.removal import PLAIN, compressor_option, followed_by, removed_by
from evoprune.search.replaying import NOTE, OPTION, REFIT_NOTE, REFITTED, REPLAYED
from evoprune.search.result import check_one_text, measured_on

_STATUS_STYLES = {
    "ok": "green", "absent": "yellow", "broken": "bold red",
    "running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red",
}  # fmt: skip
COUNTED = {
    "parameters": "parameters",
    "flops": "operations",
    "kv_bytes": "bytes of keys and values",
    "latency": "time",
}
"""What shapes cost, in words."""
WINNER = "evolved winner"
LEARNED = "learned winner"
WINNERS = (WINNER, LEARNED)
POWER = "power (tuned)"
NOT_REPRODUCIBLE = "not bit-reproducible: workers whose numbers differ in the last bits took part in it"


def heldout_table(result: Mapping[str, Any]) -> Table:
    """Everyone on held-out text, the lowest loss first."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{result['model']} at {target_text(result)}, held-out text",
        title_style="bold",
        title_justify="left",
        caption=heldout_caption(result),
        caption_justify="left",
    )
    table.add_column("")  # where there is no room, names are broken, and numbers are not
    for name in ("perplexity", "loss", "KL", "minus winner's"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, *numbers in heldout_rows(result):
        table.add_row(name, *numbers, style={**dict.fromkeys(WINNERS, "bold green"), "dense": "dim"}.get(name, ""))
    return table


def heldout_caption(result: Mapping[str, Any]) -> str:
    """What the numbers of `heldout_rows` are."""
    alone = ""
    if result["kind"] == "structure":
        alone = (
            " All but those alone have the units of the database and refitted weights; a criterion alone has its "
            "own units and their weights as they were."
        )
        if result["best"].get("refitted") is not None:
            alone += f" {REFIT_NOTE}"
    elif result["best"].get("replayed") is not None:
        alone = f" {NOTE}"
    return (
        f"{result['best']['heldout']['tokens']:,} predicted tokens of {result['data']} (text C), "
        f"{measured_on(result)}. Loss and KL from the dense model in nats per token, ± standard error over windows. "
        f"The last column is the loss minus the winner's, ± paired standard error.{alone}"
    )


def heldout_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Name, perplexity, loss, KL and difference to the winner of everyone, as text, the lowest loss first.

    Raises:
        InvalidInput: they were measured on different text.
    """
    rows = list(_rows(result))
    check_one_text({row["name"]: row["heldout"] for row in rows})
    for row in sorted(rows, key=lambda row: row["heldout"]["loss"]):
        heldout, difference = row["heldout"], row["difference"]
        yield (
            row["name"],
            f"{heldout['perplexity']:,.2f}",
            f"{heldout['loss']:.4f} ± {heldout['stderr']:.4f}",
            "" if row["name"] == "dense" else f"{heldout['kl']:.4f}",
            "" if difference is None else f"{0 - difference['loss']:+.4f} ± {difference['stderr']:.4f}",
        )


def _rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"name": "dense", "heldout": result["dense"]["heldout"], "difference": None}
    winner = LEARNED if result["kind"] == "policy" else WINNER
    best = result["best"]
    yield {"name": winner, "heldout": best["heldout"], "difference": None}
    if best.get("replayed") is not None:
        yield {"name": REPLAYED, "heldout": best["replayed"], "difference": best["winner_minus_replayed"]}
    if best.get("refitted") is not None:
        yield {"name": REFITTED, "heldout": best["refitted"], "difference": best["winner_minus_refitted"]}
    for row in result["baselines"]:
        name = POWER if row["name"] == "power" else row["name"]
        yield {"name": name, "heldout": row["heldout"], "difference": row.get("winner_minus_this")}


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the table, the winner, how it was found, and where its files are."""
    from evoprune.metrics.emit import to_text
    from evoprune.metrics.expression import parse

    best = result["best"]
    births = max(result["births"], 1)
    evolved, spared = result["evolved_parents"], result["births"] - result["evaluations"]
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    winner = facts_table(
        {
            "winner": Text(best["expression"], style="bold green"),
            "formula": Text(to_text(parse(best["expression"]))),
            "fitness": f"{best['fitness']:.5f} ({result['objective']}{over_most_likely(result.get('top_k'))} on "
            f"text B, {result['rung_tokens'][len(best['rungs']) - 1]:,} tokens), complexity {best['complexity']}",
            **_power(result),
            **_finals(result),
            "search": f"{result['evaluations']} evaluations of {result['births']} births, "
            f"{result['distinct']} different rankings, seed {result['seed']}",
            "spared": f"{spared} of {result['births']} births ({spared / births:.0%}) needed no forward pass",
            "ancestry": f"{evolved} of {result['births']} births ({evolved / births:.0%}) had an evolved parent",
            **numerics,
        }
    )
    return [Padding(heldout_table(result), (1, 0, 1, 0)), winner, Text(), *_ways_on(result, run)]


def _power(result: Mapping[str, Any]) -> dict[str, str]:
    """The power product of the table, which has no name that `prune --metric` knows, unless it is the winner."""
    power = next((row["expression"] for row in result["baselines"] if row["name"] == "power"), None)
    return {} if power in (None, result["best"]["expression"]) else {"power": power}


def _finals(result: Mapping[str, Any]) -> dict[str, str]:
    """How the winner was chosen among the finalists; nothing for results that had no finals."""
    members = result.get("finalists", ())
    if len(members) < 2:
        return {}
    return {"finals": f"least {result['final_score']} of {len(members)} finalists on {result['final_tokens']:,} tokens"}


def _ways_on(result: Mapping[str, Any], run: Path) -> list[Text]:
    """Where the files are, and commands to copy; one line each, however long."""
    quoted, metric, page = shlex.quote(str(run)), run / "export" / "metric.py", run / "report.html"
    target = f"{'--pattern' if ':' in str(result['target']) else '--sparsity'} {result['target']}"
    if result.get("allocation") is not None:
        target = f"--allocation {shlex.quote(str(metric.with_name('allocation.json')))}"
    target += compressor_option(result)
    prune = (
        f"evoprune prune {shlex.quote(result['model'])} --metric {shlex.quote(str(metric))} {target} --out DIR"
        f"{calibration_options(result.get('calibration', {}), result['seed'])}"
    )
    ways = {
        "python": str(metric),
        "report": str(page) if page.exists() else f"evoprune report {quoted}",
        "show": f"evoprune show {quoted}",
        "go on": f"evoprune resume {quoted} --fork --set evaluations={2 * result['evaluations']}",
        **prune_ways(result, prune),
    }
    return [Text.assemble((f"{name:<10}", "dim"), way) for name, way in ways.items()]


def prune_ways(result: Mapping[str, Any], command: str) -> dict[str, str]:
    """The command that prunes by the winner as it was searched, and where it was replayed also the one for that."""
    replayed = result["best"].get("replayed") is not None
    return {"prune": command, **({"replay": f"{command}{OPTION}"} if replayed else {})}


def unfinished_view(
    document: Mapping[str, Any],
    config: SearchConfig,
    run: Path,
    history: Sequence[Mapping[str, Any]],
    error: str | None,
) -> list[RenderableType]:
    """A run without a result: how far it is, and how to go on.

    Args:
        document: as `show --json` prints it.
        config: of the run.
        run: its folder.
        history: its births so far.
        error: what a failed run ended with.
    """
    kind, best = kind_of(document["kind"]), document["best"]
    facts: dict[str, RenderableType] = {
        "run": document["run"],
        "state": Text(document["state"], style=_STATUS_STYLES[document["state"]]),
        "model": f"{config.model.name}, seed {document['seed']}",
        "evaluations": f"{document['evaluations']}{_budget(config)} in {clock(document['seconds'])}",
    }
    if best is not None:
        facts["best"] = Text(f"{best['fitness']:.5g}  {kind.words(best)}", style="green")
    facts |= kind.unfinished_facts(config, document, history)
    if reasons := Counter(line["reason"] for line in history if line.get("reason")):
        facts["stopped"] = ", ".join(f"{code} {count}" for code, count in sorted(reasons.items()))
    if error is not None:
        facts["error"] = Text(error, style="red")
    quoted = shlex.quote(str(run))
    if document["state"] == "running":
        facts["follow"] = f"evoprune show {quoted} --follow"
    else:
        facts["continue"] = f"evoprune resume {quoted}"
    return [facts_table(facts)]


def _budget(config: SearchConfig) -> str:
    """Such as `` of 250`` or `` of 250, at most 10 min``."""
    evaluations, minutes = config.evaluations, config.minutes
    parts = [] if evaluations is None else [f" of {evaluations}"]
    return ",".join([*parts, *([] if minutes is None else [f" at most {minutes:g} min"])])


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a run."""
    table = plain_box("run", "state", "time", "fitness", "best")
    table.columns[0].no_wrap = True
    for row in rows:
        best = row["best"]
        table.add_row(
            row["run"],
            Text(row["state"], style=_STATUS_STYLES[row["state"]]),
            clock(row["seconds"]),
            "" if best is None else f"{best['fitness']:.5g}",
            "" if best is None else kind_of(row["kind"]).words(best),
        )
    return table


def layers_table(document: Mapping[str, Any]) -> Group:
    """What `prune` did, matrix by matrix.

    Args:
        document: as `prune --json` prints it.
    """
    measured = any(layer["error"] is not None for layer in document["layers"])
    replayed = any("path_error" in layer for layer in document["layers"])
    metrics = document.get("policy", {}).get("sites", {})
    inputs = {row["name"]: row["sparsity"] for row in document.get("thresholds", ())}
    more = [
        *(["bits"] if "bits" in document else []),
        *(["inputs let go"] if inputs else []),
        *(["output error"] if measured else []),
        *(["path error"] if replayed else []),
        *(["metric"] if metrics else []),
    ]
    table = plain_box("matrix", "shape", "sparsity", *more)
    for layer in document["layers"]:
        bits = [str(layer["bits"])] if "bits" in document else []
        share = [f"{inputs.get(layer['name'], 0):.4f}"] if inputs else []
        error = [f"{layer[name]:.5f}" for name in ("error", "path_error") if layer.get(name) is not None]
        metric = [Text(metrics[layer["name"]], overflow="fold")] if metrics else []
        shape = " × ".join(str(size) for size in layer["shape"])
        sparsity = f"{layer['sparsity']:.4f}"
        table.add_row(Text(layer["name"], overflow="fold"), shape, sparsity, *bits, *share, *error, *metric)
    for column in table.columns[1:]:
        column.justify = "right"
    total = removed_words(document)
    inside = None if document["compressor"] == "mask" else document["compressor"]
    chosen = "a policy" if "policy" in document else document["criterion"]
    by = " and ".join(name for name in (chosen, inside) if name is not None)
    total += f" by {by}{'' if document['pattern'] is None else ' at ' + document['pattern']}"
    if document["allocation"] is not None:
        total += f", allocated by {document['allocation']['allocator']}"
    if "bits" in document:
        budget = document["allocation"]["bits"]["budget"]
        total += f"; {document['stored_bits']:,} of {budget:,} bits, {document['bits']:.4f} a weight that stays"
    if inputs:
        unread = sum(inputs.get(layer["name"], 0) * math.prod(layer["shape"]) for layer in document["layers"])
        total += f"; inputs let go: {unread / document['prunable']:.2%} of the weights are not needed for a token"
    return Group(table, Text(total), *recovery_lines(document["recovery"]))


def removed_words(document: Mapping[str, Any]) -> str:
    """How many weights went; of what `prune --json` prints."""
    return f"removed {document['removed']:,} of {document['prunable']:,} prunable weights ({document['sparsity']:.2%})"


def recovery_lines(recovery: Mapping[str, Any] | None) -> Iterator[Text]:
    """What training brought, on held-out text."""
    if recovery is None:
        return
    before, after = recovery["before"], recovery["after"]
    found = f"loss {before['loss']:.4f} before, {after['loss']:.4f} after"
    if after["kl"] is not None:
        found += f"; KL {before['kl']:.4f} before, {after['kl']:.4f} after"
    learned = f"{recovery['parameters']:,} parameters learned from {recovery['tokens']:,} tokens ({recovery['loss']})"
    yield Text(f"recovered by {recovery['method']}: {learned}")
    yield Text(f"on {after['tokens']:,} predicted tokens of held-out text: {found}")


def checks_table(checks: Sequence[Mapping[str, str]]) -> Table:
    """What `doctor` found."""
    table = plain_box("", "", "")
    table.show_header = False
    for check in checks:
        table.add_row(check["name"], Text(check["status"], style=_STATUS_STYLES[check["status"]]), check["detail"])
    return table


def criteria_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Criteria: below each formula the expression to type, and its source."""
    table = plain_box("name", "group", "needs", "formula, expression, source")
    table.columns[0].no_wrap = True
    for row in rows:
        lines = [Text(text) for text in (row["formula"], row["expression"]) if text is not None]
        what = Group(*lines, Text(row["source"], style="dim"))
        table.add_row(row["name"], row["group"], " ".join(row["needs"]), what)
    return table


def compressors_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Compressors: who says which weights go, or that inputs do; below what each does its parameters and its source."""
    table = plain_box("name", "what goes", "needs", "cost", "what, parameters, source")
    table.columns[0].no_wrap = True
    for row in rows:
        chosen = "by metric" if row["keeps_mask"] else "from metric" if row["reads_criterion"] else "by itself"
        goes = "inputs" if row["at_run_time"] else chosen
        lines = [Text(text) for text in (row["what"], " ".join(row["parameters"])) if text]
        what = Group(*lines, Text(row["source"], style="dim"))
        table.add_row(row["name"], goes, " ".join(row["needs"]), row["cost"], what)
    return table


def plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Records with the same keys, one column a key."""
    table = plain_box(*(name.replace("_", " ") for name in rows[0]))
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def plain_box(*columns: str) -> Table:
    """An empty table in the house's style."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def facts_table(facts: Mapping[str, RenderableType]) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(str(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value)


def target_text(result: Mapping[str, Any]) -> str:
    """Such as ``60% sparsity per row`` or ``2:4``."""
    target = result["target"]
    if (front := result.get("pareto")) is not None:
        low, high = (f"{100 * sparsity:.4g}" for sparsity in front["range"])
        if result["kind"] == "structure":
            return f"a front from {low}% to {high}% fewer {COUNTED[result['cost']]} in heads and MLPs"
        inside = f"dropped as {result['drop']}" if result["drop_only"] else f"removed by {_remover(result)}"
        return f"a front from {low}% to {high}% {inside}"
    if result["kind"] == "structure":
        if result.get("speedup") is not None:
            return f"{result['speedup']:g} times the speed"
        less = "less time" if result["cost"] == "latency" else f"fewer {COUNTED[result['cost']]}"
        return f"{100 * float(target):.4g}% {less} in heads and MLPs"
    if result["kind"] == "policy":
        fewer = f"fewer {COUNTED[result['cost']]} in heads and MLPs"
        return target if ":" in target else f"{100 * float(target):.4g}% {fewer}"
    if result["kind"] == "joint":
        followed = followed_by(result.get("compressor", PLAIN))
        return f"{100 * float(target):.4g}% sparsity, metric{followed} and allocation in {result['rounds']} rounds"
    if result["kind"] == "allocation":
        if result.get("drop_only"):
            return f"{100 * float(target):.4g}% of the weights dropped as {result['drop']}"
        return f"{100 * float(target):.4g}% sparsity by {_remover(result)}"
    followed = followed_by(result.get("compressor", PLAIN))
    if (allocation := result.get("allocation")) is not None:
        return f"{100 * float(target):.4g}% sparsity, allocated by {allocation['allocator']}{followed}"
    return f"{target if ':' in target else f'{100 * float(target):.4g}% sparsity per ' + result['group']}{followed}"


def _remover(result: Mapping[str, Any]) -> str:
    return removed_by(result["metric"], result.get("compressor", PLAIN))
