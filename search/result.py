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
    loss = math.fsum(nll) / len(nll)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "kl": math.fsum(kl) / len(kl),
        "stderr": standard_error(nll),
        "tokens": losses["tokens"],
    }


def measured_on(document: Mapping[str, Any]) -> str:
    """What the text was cut into, or that it belongs to images, from a result or what ``eval --json`` prints."""
    if document.get("images"):
        return f"images with texts, {document['window']} tokens each on average"
    return f"windows of {document['window']}"


def window_mean(values: Sequence[float]) -> float:
    """The mean of losses by window, the same to the last bit wherever it is taken."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def paired_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Mean of loss(first) - loss(second) over the same windows, and its standard error."""
    differences = [a - b for a, b in zip(first["nll"], second["nll"], strict=True)]
    return {"loss": math.fsum(differences) / len(differences), "stderr": standard_error(differences)}


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
