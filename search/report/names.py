"""What criteria, allocators, seeds and reasons are called on the page."""

from __future__ import annotations

from evoprune.metrics.reasons import REASONS
from evoprune.search.config_sections import SearchConfig
from evoprune.search.structure_result import ALONE

_LABELS = {
    "dense": "Dense",
    "winner": "Winner",
    "replayed": "Winner, replayed",
    "refitted": "Winner, path refit",
    "power": "Tuned power product",
    "random": "Random",
    "magnitude": "Magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "gblm": "GBLM",
    "gblm-gradient": "GBLM gradient",
    "pruner-zero": "Pruner-Zero",
    "uniform": "Uniform",
    "alpha-pruning": "AlphaPruning",
    "atp": "ATP",
    "block-influence": "Block influence",
    "das": "DAS",
    "das-size-fair": "DAS, size-fair",
    "dp": "DP",
    "dsa": "DSA",
    "er": "ER",
    "erk": "ERK",
    "erk+": "ERK+",
    "global-magnitude": "Global magnitude",
    "global-wanda": "Global Wanda",
    "lamp": "LAMP",
    "owl": "OWL",
    "shortened-llama": "Shortened LLaMA",
    "spdy": "SPDY (ZipLM)",
    "uniform+": "Uniform+",
    "given": "Given",
    "initialisation": "Initialisation",
    "flap": "FLAP",
    "wanda-sp": "Wanda-sp",
    "comp": "COMP",
    "llm-pruner": "LLM-Pruner",
    "llm-pruner-mixed": "LLM-Pruner (mixed)",
    "llm-pruner-second": "LLM-Pruner (second)",
    "llm-pruner-vector": "LLM-Pruner (vector)",
    "metric-uniform": "Evolved metric, uniform",
    "wanda-allocated": "Wanda, last allocation",
    "magnitude-allocated": "Magnitude, last allocation",
}

_NEEDS = {
    "data-free": "no data",
    "forward": "a forward pass",
    "backward": "a backward pass",
    "any": "anything",
}

_OBJECTIVES = {
    "kl": "KL to dense",
    "perplexity": "loss",
    "reconstruction": "relative output error",
    "ce": "cross entropy",
    "ce-residual": "cross entropy above dense",
}


def label(name: str) -> str:
    """A criterion's, an allocator's or a seed's name for people; a name that nobody knows stands for itself."""
    if name.startswith("round-"):
        return f"Round {name.removeprefix('round-')}"
    if name.endswith(ALONE):
        return f"{label(name.removesuffix(ALONE))}{ALONE}"
    return _LABELS.get(name, name)


def shortened(name: str, most: int = 32) -> str:
    """A name that a figure has room for."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def reason_text(code: str) -> str:
    """What a reason code means."""
    return REASONS.get(code, "")


def needs_text(name: str) -> str:
    """What a class of metrics needs at most."""
    return _NEEDS[name]


def objective_text(config: SearchConfig) -> str:
    """What a fitness measures, for axes and captions; the page says in full what the K of a top-K KL are."""
    text = _OBJECTIVES.get(config.objective, config.objective)
    return text if config.top_k is None else f"top-{config.top_k} {text}"
