"""What criteria and reasons are called on the page."""

from __future__ import annotations

from evoprune.metrics.reasons import REASONS

_LABELS = {
    "dense": "Dense",
    "winner": "Winner",
    "power": "Tuned power product",
    "random": "Random",
    "magnitude": "Magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "gblm": "GBLM",
    "gblm-gradient": "GBLM gradient",
    "pruner-zero": "Pruner-Zero",
}

_NEEDS = {
    "data-free": "no data",
    "forward": "a forward pass",
    "backward": "a backward pass",
    "any": "anything",
}

_OBJECTIVES = {"kl": "KL to dense", "perplexity": "loss", "reconstruction": "relative output error"}


def label(name: str) -> str:
    """A criterion's name for people; a name that nobody knows stands for itself."""
    return _LABELS.get(name, name)


def reason_text(code: str) -> str:
    """What a reason code means."""
    return REASONS.get(code, "")


def needs_text(name: str) -> str:
    """What a class of metrics needs at most."""
    return _NEEDS[name]


def objective_text(name: str) -> str:
    """What a fitness measures, for axes and captions."""
    return _OBJECTIVES.get(name, name)
