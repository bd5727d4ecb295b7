"""Every option of a structure search and its default."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from evoprune.fitness.allocating import statistics_needed
from evoprune.fitness.allocators import configured
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.dense_stream import CORRECTION
from evoprune.fitness.short_training import Loss, Trainable, Training
from evoprune.fitness.structure_database import Mode
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.metrics.criterion import CRITERIA
from evoprune.search.config_allocation import FrontConfig, GenerationsConfig
from evoprune.search.config_sections import (
    Range,
    SearchConfig,
    Section,
    Sparsity,
    SparsityRange,
    check_front,
    with_range,
)
from evoprune.search.spaces.part_genes import Heads

DEFAULT_SPARSITY = 0.25
DEFAULT_RANGE: Range = (0.1, 0.5)
SERVING_MULTIPLE = 256
"""Neurons at a time, where a shape is to be served; layerwise sparsity allocation, section 6.3."""
DEFAULT_SEEDS = ("flap", "magnitude", "wanda-sp")
"""Those that need no more than sums over inputs: gradients and Gram matrices of all matrices are the user's choice."""
ALLOCATED_BY = "wanda"
"""The criterion inside, for allocators that read one."""
StructureSearcher = Literal["evolution"]
Accumulation = Literal["dense", "expectation", "path"]
Selection = Literal["one-shot", "path-refit", "training-aware"]
STRUCTURE_SEARCHERS: tuple[str, ...] = get_args(StructureSearcher)


class StructureTarget(Section):
    """How much of the heads and MLPs goes, and in which pieces."""

    sparsity: Sparsity | None = Field(
        DEFAULT_SPARSITY,
        description="fraction of what the heads and MLPs of all blocks cost that goes, in (0, 1); none with a speedup; "
        "of a front, which member is exported as the shape: the middle of its range unless given",
    )
    speedup: float | None = Field(
        None,
        gt=1,
        description="how many times faster the whole model gets, such as 1.5, in place of a sparsity",
    )
    cost: Literal["parameters", "flops", "kv_bytes", "latency"] = Field(
        "parameters",
        description="what is counted: parameters, operations of a forward pass, bytes of the cache for each token, or "
        "the time of a forward pass, measured on the machine of the search, which is the default with a speedup",
    )
    pareto: Literal["parameters", "flops", "kv_bytes", "latency"] | None = Field(
        None,
        description="search a front of quality against this cost, in place of one shape; latency stands beside "
        "parameters, which its range is of",
    )
    sparsity_range: SparsityRange | None = Field(
        None,
        description="of a front, the least and the most of the cost of heads and MLPs that goes; 0.1 and 0.5 unless "
        "given",
    )
    batch: int = Field(1, ge=1, description="sequences of the forward pass whose operations or time count")
    sequence: int | None = Field(
        None,
        ge=1,
        description="tokens of each of them; none takes 2048, or as many as the model reads if fewer",
    )
    decode: bool = Field(
        False, description="the time that counts is that of one more token of each, with these in the cache"
    )
    table: str | None = Field(
        None, description="a latency.json that a run has exported, in place of measuring the parts of the model again"
    )
    heads: Heads = Field(
        "both",
        description="how attention shrinks: whole KV groups, as many query heads in every group, or both",
    )
    step: int | None = Field(
        None, ge=1, description="neurons that an MLP loses or gains at a time; none takes a thirty-second of them"
    )
    serving_safe: bool = Field(
        False,
        description="only shapes that serving software with a width for each MLP can take: numbers of neurons are "
        "multiples of 256, attentions stay whole or go",
    )
    drop: Literal["none", "parts"] = Field(
        "parts", description="whether the attention or the MLP of a block may go as a whole"
    )
    merge: bool = Field(
        False, description="whether an attention or MLP that goes may be merged into that of a block before"
    )
    accumulation: Accumulation = Field(
        "expectation",
        description="what calibration text has gone through when it reaches a block: dense blocks, a mixture of cut "
        "ones, or this mixture first and then, again and again, blocks cut as the best so far",
    )
    correction: float = Field(
        CORRECTION,
        ge=0,
        le=1,
        description="along a path, by accumulation or by a path refit, how much of what it can make up for of changes "
        "in the hidden states before it each output does; with 0, and in blocks that normalise or scale outputs, none",
    )

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, values: Any) -> Any:
        """What follows from a speedup or a front is written out: a resolved configuration says what is searched."""
        if not isinstance(values, dict):
            return values
        if values.get("serving_safe"):
            values = {"heads": "whole", **values}
        if (pareto := values.get("pareto")) is not None:
            counted = "parameters" if pareto == "latency" else pareto
            return with_range({"cost": counted, **values}, DEFAULT_RANGE)
        if values.get("speedup") is not None:
            return {"cost": "latency", "sparsity": None, **values}
        return values

    @model_validator(mode="after")
    def _together(self) -> StructureTarget:
        if self.pareto is not None and self.speedup is not None:
            raise ValueError("a front has many speeds: leave out --speedup, or --pareto")
        if (self.sparsity is None) == (self.speedup is None):
            raise ValueError("give --sparsity or --speedup, one of the two")
        if self.speedup is not None and self.cost != "latency":
            raise ValueError(f"a speedup is one of latency: leave out --cost {self.cost}, or give --sparsity")
        if self.merge and self.drop == "none":
            raise ValueError("nothing goes as a whole that could be merged: leave out --drop none or --merge")
        if self.merge and self.pareto is not None:
            raise ValueError("fronts merge nothing yet: leave out --merge, or the front")
        if self.merge and self.accumulation == "path":
            raise ValueError("a path of merged parts is not rebuilt around: leave out --merge, or path accumulation")
        if self.pareto is not None and self.cost != ("parameters" if self.pareto == "latency" else self.pareto):
            raise ValueError(f"the cost of a front is that of --pareto: leave out --cost, or give --pareto {self.cost}")
        if not self.timed and (self.decode or self.table is not None):
            raise ValueError(f"decode and table are about latency, and the cost is {self.cost}: add --cost latency")
        if self.serving_safe and self.heads != "whole":
            raise ValueError(f"what serves keeps attentions whole: leave out --heads {self.heads}, or serving_safe")
        check_front(self.pareto, self.sparsity_range, self.sparsity or 0.0, "shape")
        return self

    @property
    def multiple(self) -> int:
        """What numbers of neurons are multiples of."""
        return SERVING_MULTIPLE if self.serving_safe else 1

    @property
    def timed(self) -> bool:
        """Whether times of parts are measured."""
        return "latency" in (self.cost, self.pareto)


class TrainingConfig(Section):
    """The short training of training-aware selection."""

    tokens: int = Field(
        51_200, ge=1, description="of the calibration's side of the text that each candidate is trained on, at least"
    )
    batch_tokens: int = Field(2048, ge=1, description="of one step, at most, but one window at least")
    trainable: Trainable = Field(
        "outputs", description="output matrices of attentions and MLPs, and norms, or all but embeddings and head"
    )
    loss: Loss = Field("kl", description="KL from the dense model, or the cross entropy of the next token")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="after warm-up; none takes 1e-4 for outputs and 1e-5 for all"
    )

    def resolved(self) -> Training:
        """As workers take it."""
        rate = self.learning_rate or {"outputs": 1e-4, "all": 1e-5}[self.trainable]
        return Training(self.tokens, self.batch_tokens, self.trainable, self.loss, rate)


class StructureGenerations(GenerationsConfig):
    """How a generation is bred and selected."""

    name: StructureSearcher = Field("evolution", description="who breeds")
    selection: Selection = Field(
        "one-shot",
        description="how seeds, the last stage and the finals measure: as the database leaves a candidate, after all "
        "output matrices are refitted to what the candidate itself gives them, or after a short training",
    )
    rebuild: int = Field(
        5,
        ge=1,
        description="generations between two builds of the database around the best so far, with path accumulation",
    )
    training: TrainingConfig = Field(TrainingConfig(), description="of training-aware selection")
    seeds: tuple[str, ...] | None = Field(
        DEFAULT_SEEDS,
        description="to start from, and to compare with: criteria of units, and allocators, whose sparsities of "
        "matrices become those of attentions and MLPs; none takes all criteria",
    )
    spdy: int = Field(
        0,
        ge=0,
        description="candidates of SPDY, of the evaluations, at most: it searches for weights of the output errors of "
        "parts whose least sum is a good seed (ZipLM); each is measured on as much text as the other seeds",
    )
    methods: tuple[str, ...] = Field(
        (), description="names from `evoprune list methods`, whose blocks, heads and neurons are to start from as well"
    )


class StructureSearchConfig(SearchConfig):
    """A structure search, fully resolved."""

    kind: Literal["structure"] = "structure"
    target: StructureTarget = StructureTarget()
    searcher: StructureGenerations = StructureGenerations()
    front: FrontConfig = FrontConfig()
    objective: Literal["kl"] = Field("kl", description="what candidates are compared by")
    evaluations: int | None = Field(
        500,
        ge=1,
        description="candidates with a forward pass, at most; none leaves it to the minutes, and is the default then",
    )
    window: int = Field(64, ge=1, description="candidates that may wait for results; changes no history")

    @model_validator(mode="after")
    def _fitting(self) -> StructureSearchConfig:
        if self.target.merge and self.searcher.selection == "path-refit":
            raise ValueError("what is merged has no path refit: leave out --merge, or path-refit selection")
        if self.target.pareto is None:
            self.searcher.check_stages()
        else:
            self.front.check(self.searcher)
            if self.searcher.spdy:
                raise ValueError("SPDY finds a seed at one budget: leave out searcher.spdy, or the front")
            if self.searcher.selection != "one-shot":
                raise ValueError(
                    f"a front has no last stage: leave out {self.searcher.selection} selection, or the front"
                )
            if self.target.accumulation == "path":
                raise ValueError("a front has no parent to rebuild around: give dense or expectation accumulation")
        return self

    @property
    def aim(self) -> str:
        target = self.target
        if target.sparsity_range is not None:
            low, high = target.sparsity_range
            return f"{low:g} to {high:g} of the {target.cost} of heads and MLPs"
        if target.speedup is not None:
            return f"{target.speedup:g} times as fast"
        return f"{target.sparsity:g} of the {target.cost} of heads and MLPs"

    @property
    def first_windows(self) -> int:
        """Windows of text B that every candidate is measured on."""
        return self.searcher.stages[0].windows if self.target.pareto is None else self.front.windows

    @property
    def seeds(self) -> tuple[str, ...]:
        """Criteria of units and allocators to start from, by name."""
        return tuple(sorted(UNIT_CRITERIA)) if self.searcher.seeds is None else self.searcher.seeds

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria of units among the seeds."""
        return tuple(name for name in self.seeds if name in UNIT_CRITERIA)

    @property
    def allocators(self) -> tuple[str, ...]:
        """The allocators among the seeds."""
        return tuple(name for name in self.seeds if name not in UNIT_CRITERIA)

    @property
    def first_accumulation(self) -> Mode:
        """Of the database that the search begins with."""
        accumulation = self.target.accumulation
        return "expectation" if accumulation == "path" else accumulation

    @property
    def selection(self) -> dict[str, Any] | None:
        """As jobs of the kind ``recovered`` say it; None is one-shot."""
        method = self.searcher.selection
        if method == "one-shot":
            return None
        if method == "path-refit":
            return self.path_refit
        return {"method": method, "training": self.searcher.training.resolved().to_json()}

    @property
    def path_refit(self) -> dict[str, Any]:
        """A path refit, as jobs say it."""
        return {"method": "path-refit", "correction": self.target.correction}

    def context(self) -> EvaluationContext:
        """What workers have to know."""
        inside = CRITERIA[ALLOCATED_BY]
        needs = frozenset[str]().union(
            *(UNIT_CRITERIA[name].needs for name in self.criteria),
            *(statistics_needed(configured(name), inside) for name in self.allocators),
        )
        return EvaluationContext(
            model=self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.model.device,
            trust_remote_code=self.model.trust_remote_code,
            data=self.data.source,
            seed=self.seed,
            window=self.data.window,
            rungs=tuple(sorted({self.first_windows, self.searcher.windows})),
            heldout_windows=self.data.heldout_windows,
            calibration=self.data.calibration or self.data.source,
            calibration_sequences=self.data.calibration_sequences,
            calibration_window=self.data.calibration_window,
            statistics=tuple(sorted(needs)),
            objective=self.objective,
            top_k=self.top_k,
            # No mask is made by it; where time is the budget it is anything.
            sparsity=self.target.sparsity or DEFAULT_SPARSITY,
            group="row",
            threads=self.threads,
        )
