"""Commands about one model: `eval` and `stats`, and where `prune` is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from evoprune import completion
from evoprune.commands_prune import prune
from evoprune.console import Output
from evoprune.metrics.errors import InvalidInput
from evoprune.options import (
    MODEL,
    TASKS,
    TEXT,
    CalibrationSequences,
    CalibrationText,
    CalibrationWindow,
    Components,
    Device,
    Dtype,
    Json,
    Memory,
    ModelArgument,
    Revision,
    Seed,
    Tokens,
    TrustRemoteCode,
    given_calibration,
    given_loading,
    option,
)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("prune", rich_help_panel="Models")(prune)
    app.command("eval", rich_help_panel="Models")(evaluate)
    app.command("stats", rich_help_panel="Models")(stats)


def evaluate(
    model: ModelArgument = "reference",
    dense: Annotated[
        str | None,
        option(
            "--dense",
            metavar="MODEL",
            help="the model before pruning, for the KL",
            panel=TEXT,
            autocompletion=completion.models,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="TEXT",
            help="`corpus` (embedded), a file, a folder, or a data set; its side C is read",
            rich_help_panel=TEXT,
        ),
    ] = "corpus",
    window: Annotated[
        int | None, option("--window", metavar="N", help="tokens in a window", panel=TEXT, default=256)
    ] = None,
    tokens: Annotated[
        int | None, option("--tokens", metavar="N", help="how much text", panel=TEXT, default="20480, or all there is")
    ] = None,
    tasks: Annotated[
        str | None,
        option(
            "--tasks",
            metavar="NAMES",
            help="tasks, groups or tags of lm-evaluation-harness, separated by commas; needs evoprune\\[tasks]",
            panel=TASKS,
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        option(
            "--tasks-path",
            metavar="DIR",
            help="tasks of your own in its YAML, whose data may lie beside them; Python that they name runs with "
            "--trust-remote-code only",
            panel=TASKS,
        ),
    ] = None,
    shots: Annotated[
        int | None,
        option("--shots", metavar="N", help="examples in the prompt of a task", panel=TASKS, default="the task's own"),
    ] = None,
    limit: Annotated[
        int | None, option("--limit", metavar="N", help="examples of each task", panel=TASKS, default="all")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=0,
            help="show how the model, and the dense one, go on with the first words of N windows",
            rich_help_panel=TEXT,
        ),
    ] = 0,
    sample_tokens: Annotated[
        int | None, option("--sample-tokens", metavar="N", help="tokens in each", panel=TEXT, default=32)
    ] = None,
    memory: Memory = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on held-out text, and KL divergence from the dense model with --dense; tasks with --tasks."""
    with Output(as_json) as output:
        from evoprune import api
        from evoprune.search.tables_evaluation import evaluation_table, samples_table, tasks_table

        evaluation = api.evaluate(
            model,
            dense=dense,
            data=data,
            window=window,
            tokens=tokens,
            tasks=None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()],
            tasks_path=tasks_path,
            shots=shots,
            limit=limit,
            samples=samples,
            sample_tokens=sample_tokens,
            memory=memory,
            progress=output.step,
            **given_loading(dtype, device, revision, trust_remote_code),
        )
        document = evaluation.to_json()
        if as_json:
            output.json(document)
        else:
            output.show(evaluation_table(document, evaluation.held_out.stderr, dense))
            if "tasks" in document:
                output.show(tasks_table(document))
            if "samples" in document:
                output.show(samples_table(document))


def stats(
    model: ModelArgument = "reference",
    metric: Annotated[
        str | None,
        option(
            "--metric",
            metavar="M",
            help="collect what this metric reads",
            panel=MODEL,
            autocompletion=completion.plugins("evoprune.metrics.library"),
        ),
    ] = None,
    statistics: Annotated[
        str | None,
        option(
            "--statistics",
            metavar="NAMES",
            help="collect these, separated by commas; `evoprune list terminals` shows them",
            panel=MODEL,
            default="what a search reads",
        ),
    ] = None,
    calibration: CalibrationText = None,
    calibration_sequences: CalibrationSequences = None,
    calibration_window: CalibrationWindow = None,
    tokens: Tokens = "all",
    seed: Seed = 0,
    components: Components = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Collect calibration statistics, keep them in the cache, and print where they are."""
    with Output(as_json) as output:
        from evoprune import api
        from evoprune.metrics.exported import load_metric

        if metric is not None and statistics is not None:
            raise InvalidInput("give --metric or --statistics, not both")
        names: dict[str, Any] = {}
        if metric is not None:
            names["names"] = load_metric(metric).needs
        elif statistics is not None:
            names["names"] = [name.strip() for name in statistics.split(",") if name.strip()]
            if not names["names"]:
                raise InvalidInput("--statistics names none: give some of `evoprune list terminals`, such as X_l2,G_l2")
        found = api.collect_statistics(
            model,
            tokens=tokens,
            seed=seed,
            progress=output.step,
            **names,
            **given_calibration(calibration, calibration_sequences, calibration_window),
            **given_loading(dtype, device, revision, trust_remote_code, components),
        )
        size = sum(file.stat().st_size for file in found.folder.iterdir())
        manifest = found.manifest
        if as_json:
            output.json(
                {
                    "folder": str(found.folder),
                    "model": model,
                    "statistics": sorted(found.names),
                    "sequences": manifest["sequences"],
                    "window": manifest["window"],
                    "data": calibration or "corpus",
                    "seed": seed,
                    "bytes": size,
                }
            )
        else:
            what = ", ".join(sorted(found.names)) or "no statistics"
            output.tell(
                f"{what} of {len(found.sites)} matrices, from {manifest['sequences']} × {manifest['window']} tokens of "
                f"{calibration or 'corpus'}; {size / 2**20:.1f} MiB"
            )
            output.line(str(found.folder))
