"""Numbers of a result: means and standard errors over windows of held-out text; and what a failed job says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.search.engine.executor import Outcome


def summary(losses: Mapping[str, Any]) -> dict[str, Any]:
    """The five numbers that stand for a model on a text.

    Args:
        losses: ``nll`` and ``kl`` by window, in nats per token, and ``tokens``, the number of predictions.

    Returns:
        loss, perplexity, kl, stderr (of the loss, over windows) and tokens.
    """
    nll, kl = losses["nll"], losses["kl"]
    loss = window_mean(nll)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "kl": window_mean(kl),
        "stderr": standard_error(nll),
        "tokens": losses["tokens"],
    }


def measured_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of how everything in it was measured, beside text and tokens.

    Args:
        facts: of the prepared set.
    """
    return {"images": facts["images"], "dtype": str(facts["identity"]["dtype"]).removeprefix("torch.")}


def measured_on(document: Mapping[str, Any]) -> str:
    """What the text was cut into, or that it belongs to images, and in what dtype the model ran.

    Args:
        document: a result, in which earlier versions had no dtype, or what ``eval --json`` prints.
    """
    dtype = f", {document['dtype']}" if "dtype" in document else ""
    if document.get("images"):
        return f"images with texts, {document['window']} tokens each on average{dtype}"
    return f"windows of {document['window']}{dtype}"


def check_one_text(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to set held-out results beside each other that are of different text.

    Args:
        rows: `summary` of everyone, by name.

    Raises:
        InvalidInput: two of them differ in the number of tokens.
    """
    _check_alike({name: {"predicted tokens": row["tokens"]} for name, row in rows.items()})


def check_measured_alike(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to set the held-out results of several runs beside each other that were not measured alike.

    Args:
        results: of runs, by a name for each. What one of them does not say is not compared.

    Raises:
        InvalidInput: two of them differ in text, length of windows, number of tokens or dtype.
    """
    facts = {}
    for name, result in results.items():
        said = {"text": "data", "tokens in a window": "window", "dtype": "dtype"}
        facts[name] = {what: result[key] for what, key in said.items() if key in result}
        facts[name]["predicted tokens"] = result["dense"]["heldout"]["tokens"]
    _check_alike(facts)


def _check_alike(facts: Mapping[str, Mapping[str, Any]]) -> None:
    known: dict[str, tuple[str, Any]] = {}
    for name, row in facts.items():
        for what, value in row.items():
            first, expected = known.setdefault(what, (name, value))
            if value != expected:
                raise InvalidInput(
                    f"{first!r} and {name!r} were not measured alike, {what}: {expected} and {value}; numbers in one "
                    "table are of one text, length and dtype, so measure one of them again"
                )


def window_mean(values: Sequence[float]) -> float:
    """The mean of losses by window, the same to the last bit wherever it is taken."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = window_mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def paired_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Mean of loss(first) - loss(second) over the same windows, and its standard error.

    Raises:
        InvalidInput: they are of different windows.
    """
    counts = [(len(losses["nll"]), losses.get("tokens")) for losses in (first, second)]
    if counts[0] != counts[1]:
        texts = " and on ".join(f"{windows} windows with {tokens} predicted tokens" for windows, tokens in counts)
        raise InvalidInput(f"losses on {texts} have no difference: measure both on the same text")
    differences = [a - b for a, b in zip(first["nll"], second["nll"], strict=True)]
    return {"loss": window_mean(differences), "stderr": standard_error(differences)}


def closed_gap(result: Mapping[str, Any]) -> float | None:
    """The share of the held-out loss between uniform sparsity and the dense model that an allocation wins back.

    None where uniform sparsity loses nothing.

    Args:
        result: of an allocation search.
    """
    dense, best = (result[name]["heldout"]["loss"] for name in ("dense", "best"))
    uniform = next((row["heldout"]["loss"] for row in result["baselines"] if row["name"] == "uniform"), None)
    return None if uniform is None or uniform <= dense else (uniform - best) / (uniform - dense)


def member_name(row: Mapping[str, Any]) -> str:
    """What the file of a member of a front is called: per cent of each dense cost that are saved."""
    return str(row.get("name", row["saved"]))


def failure(outcome: Outcome) -> EvopruneError:
    """What a failed job of the set-up or the result says: one line if the input is at fault."""
    message = invalid_input(outcome.error)
    return InvalidInput(message) if message else EvopruneError(f"the worker failed: {outcome.error or outcome.status}")


def invalid_input(traceback: str) -> str | None:
    """The message of the `InvalidInput` that ended a worker's work, from its traceback; None if something else did."""
    for line in reversed(traceback.strip().splitlines()):
        kind, colon, message = line.strip().partition(": ")
        if colon and kind.rpartition(".")[2] in ("InvalidInput", "UnknownName", "InvalidExpression"):
            return message
    return None
