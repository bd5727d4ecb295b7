"""The command `prune`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from evoprune import completion
from evoprune.commands_cut import (
    check_writable,
    key_values,
    of_recovery,
    prune_by_method,
    prune_by_policy,
    prune_by_recipe,
    prune_to_shape,
)
from evoprune.console import Output
from evoprune.metrics.errors import InvalidInput
from evoprune.options import (
    OUTPUT,
    RECOVERY,
    TARGET,
    CalibrationSequences,
    CalibrationText,
    CalibrationWindow,
    Components,
    Device,
    Dtype,
    Json,
    Memory,
    OptionalModel,
    Pattern,
    PruneGroup,
    PruneSparsity,
    Revision,
    Seed,
    Tokens,
    TrustRemoteCode,
    given_calibration,
    given_loading,
    option,
)

if TYPE_CHECKING:
    from evoprune.outcomes import PrunedFiles, Removal


def prune(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="the checkpoint, new or empty", rich_help_panel=OUTPUT),
    ],
    model: OptionalModel = None,
    recipe: Annotated[
        Path | None,
        option(
            "--recipe",
            metavar="FILE|FOLDER",
            help="make a checkpoint again, bit for bit on the same machine: its recipe.yaml, or its folder",
            panel=TARGET,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        option(
            "--metric",
            metavar="M",
            help="a listed criterion, an expression such as mul(abs(W),X_l2), or an exported .json or .py",
            panel=TARGET,
            default="wanda",
            autocompletion=completion.plugins("evoprune.metrics.library"),
        ),
    ] = None,
    sparsity: PruneSparsity = None,
    pattern: Pattern = None,
    group: PruneGroup = None,
    compressor: Annotated[
        str | None,
        option(
            "--compressor",
            metavar="C",
            help="what the other weights become: one of `evoprune list compressors`, such as refit or obq:bits=3",
            panel=TARGET,
            default="that of the allocation's file, or mask",
            autocompletion=completion.plugins("evoprune.fitness.compressors"),
        ),
    ] = None,
    accumulation: Annotated[
        Literal["dense", "path"] | None,
        option(
            "--accumulation",
            help="what calibration text has gone through when it reaches a block: dense blocks, or those before it as "
            "they are now pruned",
            panel=TARGET,
            default="dense",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        option(
            "--allocation",
            metavar="A",
            help="sparsity by matrix: a file of sparsities or with a formula, or one of `evoprune list allocators`",
            panel=TARGET,
            autocompletion=completion.plugins("evoprune.fitness.allocators"),
        ),
    ] = None,
    allocation_set: Annotated[
        list[str] | None,
        option("--allocation-set", metavar="KEY=VALUE", help="a parameter of the allocator; repeatable", panel=TARGET),
    ] = None,
    bits: Annotated[
        float | None,
        option(
            "--bits",
            metavar="B",
            help="round weights that stay to B bits on average, shared out by --allocation cmpq, dp, pmpq or tdmpq, or "
            "the same for all; with --compressor obq, sparsegpt or awp. Nothing is removed unless asked for",
            panel=TARGET,
        ),
    ] = None,
    bit_levels: Annotated[
        str | None,
        option(
            "--bit-levels",
            metavar="LIST",
            help="bits that a matrix may have, of 2 to 8, and 16, which leaves it whole",
            panel=TARGET,
            default="2,3,4,8,16",
        ),
    ] = None,
    method: Annotated[
        str | None,
        option(
            "--method",
            metavar="NAME",
            help="take out whole blocks, heads and neurons as one of `evoprune list methods` does, so that the model "
            "gets smaller",
            panel=TARGET,
            autocompletion=completion.plugins("evoprune.fitness.methods"),
        ),
    ] = None,
    method_set: Annotated[
        list[str] | None,
        option("--method-set", metavar="KEY=VALUE", help="a parameter of the method; repeatable", panel=TARGET),
    ] = None,
    budget: Annotated[
        list[str] | None,
        option(
            "--budget",
            metavar="GROUP=S",
            help="sparsity of a component or of names such as *.mlp.*, repeatable; the rest gets what --sparsity "
            "leaves, and stays dense without it; `searched` tries out components",
            panel=TARGET,
        ),
    ] = None,
    shape: Annotated[
        Path | None,
        option("--shape", metavar="F", help="a .json of the heads and neurons that every block keeps", panel=TARGET),
    ] = None,
    policy: Annotated[
        str | None,
        option(
            "--policy",
            metavar="F|RUN",
            help="what a policy search keeps: its policy.json, or the run",
            panel=TARGET,
            autocompletion=completion.runs,
        ),
    ] = None,
    refit: Annotated[
        Literal["none", "path-refit"] | None,
        option(
            "--refit",
            help="with --shape or --policy: path-refit solves every output matrix anew for the heads and neurons that "
            "stay, behind the cut blocks before it, on the text that the search read; a shape may have --calibration",
            panel=TARGET,
            default="as the shape says, none for a policy",
        ),
    ] = None,
    recovery: Annotated[
        str | None,
        option(
            "--recovery",
            metavar="R",
            help="train what is left: one of `evoprune list recoveries`; what was removed stays zero",
            panel=RECOVERY,
            default="none",
            autocompletion=completion.plugins("evoprune.fitness.recoveries"),
        ),
    ] = None,
    recovery_tokens: Annotated[
        int | None,
        option("--recovery-tokens", metavar="N", help="how much text it is trained on", panel=RECOVERY, default=300000),
    ] = None,
    recovery_loss: Annotated[
        Literal["distill", "lm"] | None,
        option(
            "--recovery-loss",
            help="learn the dense model's distributions, or the next token of the text",
            panel=RECOVERY,
            default="distill",
        ),
    ] = None,
    recovery_set: Annotated[
        list[str] | None,
        option("--recovery-set", metavar="KEY=VALUE", help="a parameter of the recovery; repeatable", panel=RECOVERY),
    ] = None,
    form: Annotated[
        Literal["auto", "plain", "padded", "compact", "masked", "modules"],
        typer.Option(
            "--form",
            help="of what is cut by --shape, --method or --policy: plain has one width in all blocks, padded fills up "
            "with zeros, compact is as small as the shape, masked has zeros only; auto is plain if the shape allows "
            "it, else compact. Of --compressor armor: modules keeps its wrappers apart, which evoprune alone loads, "
            "plain multiplies them out, which has no zeros; auto is modules",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    latency: Annotated[
        bool,
        typer.Option(
            "--latency/--no-latency",
            help="of what is cut by --shape, --method or --policy: measure how fast it is, for the model card",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    calibration: CalibrationText = None,
    calibration_sequences: CalibrationSequences = None,
    calibration_window: CalibrationWindow = None,
    tokens: Tokens = "all",
    seed: Seed = 0,
    components: Components = None,
    memory: Memory = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove the weights that a criterion scores lowest, and write a checkpoint that plain transformers loads."""
    with Output(as_json) as output:
        training: dict[str, Any] = {
            "recovery": recovery,
            "recovery_tokens": recovery_tokens,
            "recovery_loss": recovery_loss,
            "recovery_parameters": key_values("--recovery-set", recovery_set or [], "rank=16"),
        }
        loading = given_loading(dtype, device, revision, trust_remote_code, components)
        beside: dict[str, Any] = {
            "--allocation": allocation,
            "--pattern": pattern,
            "--metric": metric,
            "--group": group,
            "--compressor": compressor,
            "--accumulation": accumulation,
            "--memory": memory,
            "--allocation-set": allocation_set,
            "--budget": budget,
            "--bits": bits,
            "--bit-levels": bit_levels,
        }
        refits = {} if refit is None else {"refit": refit}
        if refits and policy is None and shape is None:
            raise InvalidInput(
                "--refit goes with --shape or --policy: a recipe or a method says by itself what weights become, and "
                "single weights have --compressor refit"
            )
        text = given_calibration(calibration, calibration_sequences, calibration_window)
        if recipe is not None:
            beside |= {"--sparsity": sparsity, "--method": method, "--method-set": method_set, "--shape": shape}
            beside |= {"--policy": policy, "--components": components, "--dtype": dtype, "--revision": revision}
            beside |= {"--calibration-sequences": calibration_sequences, "--calibration-window": calibration_window}
            told = {name.replace("parameters", "set").replace("_", "-"): value for name, value in training.items()}
            beside |= {f"--{name}": value or None for name, value in told.items()}
            # What has a default of its own is told to be given by being another.
            beside |= {"--tokens": None if tokens == "all" else tokens, "--seed": seed or None}
            beside |= {"--form": None if form == "auto" else form}
            where = {"device": device, "trust_remote_code": trust_remote_code, "calibration": calibration}
            prune_by_recipe(output, model, recipe, beside, {"out": out, "latency": latency, **where})
            return
        model = model or "reference"
        written = {"form": form, "out": out, "latency": latency, "seed": seed}
        if method is not None:
            beside |= {"--shape": shape, "--policy": policy}
            if tokens != "all":
                beside["--tokens"] = tokens
            parameters = key_values("--method-set", method_set or [], "protect_last=1")
            target = {"sparsity": sparsity, "parameters": parameters, **written, **text}
            prune_by_method(output, model, method, beside, target | training | loading)
            return
        if shape is not None or policy is not None:
            # Only a recovery reads text here, and a refit of a shape.
            reads = recovery or (shape is not None and refit == "path-refit")
            read = {"calibration": text.pop("calibration")} if reads and calibration is not None else {}
            beside |= {"--sparsity": sparsity, "--method-set": method_set}
            beside |= {f"--{name.replace('_', '-')}": value for name, value in text.items()}
            options = written | read | training | loading
            if shape is not None:
                prune_to_shape(output, model, shape, beside | {"--policy": policy}, options | refits)
            elif policy is not None:
                if tokens != "all":
                    beside["--tokens"] = tokens
                prune_by_policy(output, model, policy, beside, options | refits)
            return
        if method_set:
            raise InvalidInput("--method-set is a parameter of a method: name one by --method")
        if form not in ("auto", "plain", "modules"):
            raise InvalidInput(
                f"--form {form} goes with --shape, --method or --policy: a mask keeps every width, so give --form plain"
            )
        if sparsity is not None and not 0 < sparsity < 1:
            raise InvalidInput(
                f"sparsity {sparsity:g} is not between 0 and 1: give the fraction to remove, such as 0.5"
            )
        check_writable(out)
        from evoprune import api
        from evoprune.classifiers import prune_classifier
        from evoprune.fitness.classifiers import is_classifier
        from evoprune.fitness.pipelines import is_pipeline
        from evoprune.pipelines import prune_pipeline, read_prompts
        from evoprune.search.tables import layers_table

        shared: dict[str, Any] = {
            "metric": metric or "wanda",
            "sparsity": sparsity,
            "allocation_parameters": key_values("--allocation-set", allocation_set or [], "spread=0.1"),
            "out": out,
            "seed": seed,
            "progress": output.step,
        }
        target = {**shared, "budgets": _budgets(budget or [])}
        pipeline = is_pipeline(model)
        classifier = not pipeline and is_classifier(model, revision)
        pruned: Removal
        if classifier:
            beside = {f"--{name.replace('_', '-')}": value for name, value in training.items()}
            beside |= {"--budget": budget, "--components": components, "--calibration-window": calibration_window}
            beside |= {"--tokens": None if tokens == "all" else tokens, "--form": None if form == "auto" else form}
            beside |= {
                "--bits": bits,
                "--bit-levels": bit_levels,
                "--memory": memory,
                "--accumulation": None if accumulation == "dense" else accumulation,
            }
            _refuse_with_classifier(beside)
            if calibration_sequences is not None:
                shared["calibration_sequences"] = calibration_sequences
            pruned = prune_classifier(
                model,
                images=calibration,
                pattern=pattern,
                group=group,
                allocation=allocation,
                compressor=compressor or "mask",
                **shared,
                **{name: value for name, value in loading.items() if name != "trust_remote_code"},
            )
        elif pipeline:
            if any(training.values()):
                raise InvalidInput("a pipeline has no recovery: leave out --recovery and what goes with it")
            if form == "modules":
                raise InvalidInput("a pipeline is written plain: leave out --form modules")
            if pattern is not None or group is not None or compressor not in (None, "mask") or components is not None:
                raise InvalidInput(
                    "a pipeline is pruned by row with the compressor mask: leave out --pattern, --group, --compressor "
                    "and --components, and give --budget denoiser=0.35 to prune one component alone"
                )
            if memory is not None:
                raise InvalidInput("a pipeline is loaded whole: leave out --memory")
            if accumulation == "path":
                raise InvalidInput("a pipeline is pruned by statistics of the dense one: leave out --accumulation path")
            if bits is not None or bit_levels is not None:
                raise InvalidInput("a pipeline is not rounded: leave out --bits and --bit-levels")
            prompts = None if calibration is None else read_prompts(calibration)
            pruned = prune_pipeline(model, allocation=allocation or "uniform", prompts=prompts, **target)
        elif memory is not None:
            if any(training.values()):
                raise InvalidInput("a recovery trains the whole model: leave out --memory, or --recovery")
            if bits is not None or bit_levels is not None:
                raise InvalidInput(
                    "bits are shared out over the whole model: leave out --memory, or give a file that has them by "
                    "--allocation"
                )
            from evoprune.streaming import prune_streamed

            pruned = streamed = prune_streamed(
                model,
                memory=memory,
                pattern=pattern,
                group=group,
                allocation=allocation,
                compressor=compressor,
                accumulation=accumulation,
                form=form,
                tokens=tokens,
                **target,
                **text,
                **loading,
            )
            for remark in [*_remarks(pruned, metric), *_begun(streamed)]:
                output.tell(remark)
        else:
            pruned = api.prune(
                model,
                pattern=pattern,
                group=group,
                allocation=allocation,
                compressor=compressor,
                accumulation=accumulation,
                bits=bits,
                bit_levels=bit_levels,
                form=form,
                tokens=tokens,
                **target,
                **training,
                **text,
                **loading,
            )
            for remark in [*_remarks(pruned, metric), *of_recovery(pruned)]:
                output.tell(remark)
        document = pruned.to_json()
        if as_json:
            output.json(document)
        else:
            words = ["evoprune", "eval", document["out"], "--dense", model]
            words += [] if memory is None else ["--memory", memory]
            hint = f"try it: {shlex.join(words)}"
            if pipeline:
                hint = "load it with DiffusionPipeline.from_pretrained"
            elif classifier:
                hint = _of_classifier(document["held_out"])
            output.tell(layers_table(document), hint)
            output.line(document["out"])


def _refuse_with_classifier(beside: dict[str, Any]) -> None:
    """Refuse options, by name, that an image classifier has nothing for.

    Raises:
        InvalidInput: names the first that is given.
    """
    if told := [name for name, value in beside.items() if value]:
        raise InvalidInput(f"{told[0]} is of language models, and this is an image classifier: leave it out")


def _of_classifier(held_out: dict[str, float] | None) -> str:
    """How near a pruned classifier is to the dense one, and what loads it."""
    loads = "load it with AutoModelForImageClassification.from_pretrained"
    if held_out is None:
        return loads
    found = f"on {held_out['images']} other images: KL {held_out['kl']:.4f}, same first class {held_out['top1']:.1%}"
    return f"{found}; {loads}"


def _remarks(pruned: Removal, metric: str | None) -> Iterator[str]:
    """What of the options was not read, or does not fit together as well as it could."""
    from evoprune.fitness.compressors import compressor_of

    allocation, name = pruned.allocation, pruned.compressor
    if metric is not None and pruned.criterion is None:
        said = f"{name} chooses by itself what goes and does not read --metric"
        yield said if allocation is None else f"{said}; an allocator may have"
    if pruned.criterion is not None and not compressor_of(name).keeps_mask:
        yield f"{name} chooses by itself what goes, from what {pruned.criterion} keeps as a start"
    searched = name if allocation is None else allocation.parameters.get("compressor", name)
    if searched != name:
        yield f"the allocation was searched for {searched}, and its matrices now lose weights by {name}"
    if pruned.merged:
        yield (
            f"warning: {name} is multiplied out: these weights are dense, and no kernel for sparse ones makes use of "
            "them; --form modules keeps the sparse cores"
        )
    if pruned.doubt is not None:
        yield f"warning: {pruned.doubt}"


def _begun(pruned: PrunedFiles) -> Iterator[str]:
    """Where a checkpoint that is written block by block began, if not at the beginning; what was there before."""
    if pruned.discarded:
        yield "something else had been begun here: its blocks are gone, this one began anew"
    if pruned.continued:
        written = "1 block was" if pruned.continued == 1 else f"{pruned.continued:,} blocks were"
        yield f"went on where an interrupted run had stopped: {written} written"


def _budgets(words: list[str]) -> dict[str, float] | Literal["searched"]:
    """Sparsities by group from words GROUP=S, or the one word ``searched``.

    Raises:
        InvalidInput: a word has no group, no number, or a group comes twice.
    """
    if words == ["searched"]:
        return "searched"
    found: dict[str, float] = {}
    for word in words:
        name, _, value = (part.strip() for part in word.rpartition("="))
        try:
            sparsity = float(value)
        except ValueError:
            sparsity = math.nan
        if not name or name in found or math.isnan(sparsity):
            raise InvalidInput(
                f"--budget {word[:60]!r} is not GROUP=SPARSITY with each GROUP once, such as vision_tower=0.3"
            )
        found[name] = sparsity
    return found
