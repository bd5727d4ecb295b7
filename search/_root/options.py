"""Options that several commands share. Their defaults are those of the configuration and of the Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from evoprune import completion

TARGET, RECOVERY, BUDGET, TEXT, TASKS, SEARCH, MODEL, WORKERS, CONFIG, OUTPUT = (
    "Target", "Recovery", "Budget", "Text", "Tasks", "Search", "Model", "Workers", "Configuration", "Output",
)  # fmt: skip


def option(*names: str, help: str, panel: str, default: object = None, **more: Any) -> Any:
    """A typer option whose own default is None, so that what was not given can be told; `default` is for the help."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(*names, help=help + shown, rich_help_panel=panel, show_default=False, **more)


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`reference` (embedded), a local folder, or a Hub id",
        autocompletion=completion.models,
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="`reference` (embedded), a local folder, or a Hub id [dim]\\[default: reference][/dim]",
        show_default=False,
        autocompletion=completion.models,
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a run's folder or id, or `latest`", autocompletion=completion.runs),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document to stdout", rich_help_panel=OUTPUT)]

# Target
Sparsity = Annotated[
    float | None,
    option("--sparsity", help="fraction of weights to remove, in (0, 1)", panel=TARGET, default="0.6"),
]
AllocationSparsity = Annotated[
    float | None,
    option(
        "--sparsity",
        help="fraction of weights to remove, in (0, 1)",
        panel=TARGET,
        default="0.6; with --pareto the middle of the range",
    ),
]
PruneSparsity = Annotated[
    float | None,
    option("--sparsity", help="fraction of weights to remove, in (0, 1)", panel=TARGET, default="0.5"),
]
Pattern = Annotated[
    str | None, option("--pattern", metavar="N:M", help="keep N of every M consecutive inputs", panel=TARGET)
]
SearchGroup = Annotated[
    Literal["row", "layer", "global"] | None,
    option("--group", help="compare scores within a row, a layer, or the whole model", panel=TARGET, default="row"),
]
PruneGroup = Annotated[
    Literal["row", "layer", "global"] | None,
    option(
        "--group",
        help="compare scores within a row, a layer, or the whole model",
        panel=TARGET,
        default="the criterion's own",
    ),
]
SearchCompressor = Annotated[
    str | None,
    option(
        "--compressor",
        metavar="C",
        help="what the other weights become: one of `evoprune list compressors`, such as refit or obq:bits=3",
        panel=TARGET,
        default="mask",
        autocompletion=completion.plugins("evoprune.fitness.compressors"),
    ),
]
MetricCompressor = Annotated[
    str | None,
    option(
        "--compressor",
        metavar="C",
        help="what the other weights become, for every candidate anew: one of `evoprune list compressors` that reads a "
        "metric, such as refit:steps=10",
        panel=TARGET,
        default="mask",
        autocompletion=completion.plugins("evoprune.fitness.compressors"),
    ),
]

# Model
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    option("--dtype", help="of the forward pass; auto is float32 on a CPU, else bfloat16", panel=MODEL, default="auto"),
]
Device = Annotated[
    str | None,
    option("--device", help="cpu, cuda, cuda:1; auto takes a GPU if any", panel=MODEL, default="auto"),
]
Revision = Annotated[
    str | None, option("--revision", metavar="R", help="branch, tag or commit of a Hub id", panel=MODEL)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that the model brings along", rich_help_panel=MODEL)
]

Memory = Annotated[
    str | None,
    option(
        "--memory",
        metavar="SIZE",
        help="such as 2GiB or 500MB, by which this process grows at most: blocks come from the files one at a time",
        panel=MODEL,
        default="no limit, the whole model is loaded",
    ),
]
Components = Annotated[
    str | None,
    option(
        "--components",
        metavar="NAMES",
        help="parts to prune, separated by commas: language_model, vision_tower, projector, or all",
        panel=MODEL,
        default="language_model",
    ),
]

# Text
Tokens = Annotated[
    Literal["all", "amia"],
    typer.Option("--tokens", help="statistics of all tokens, or of those that attention chooses", rich_help_panel=TEXT),
]
CalibrationText = Annotated[
    str | None,
    option(
        "--calibration",
        metavar="TEXT",
        help="text, or images with texts, of the statistics (side A); of an image classifier a folder of images, of a "
        "pipeline prompts, one a line",
        panel=TEXT,
        default="corpus",
    ),
]
SearchCalibrationText = Annotated[
    str | None,
    option("--calibration", metavar="TEXT", help="text of the statistics (side A)", panel=TEXT, default="as --data"),
]
CalibrationSequences = Annotated[
    int | None,
    option("--calibration-sequences", metavar="N", help="windows of it", panel=TEXT, default=64),
]
CalibrationWindow = Annotated[
    int | None, option("--calibration-window", metavar="N", help="tokens in each", panel=TEXT, default=256)
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="draws the windows of text", rich_help_panel=TEXT)]

# Workers
ExecutorOption = Annotated[
    Literal["ray", "inline"],
    typer.Option("--executor", help="worker processes, or this process (for debugging)", rich_help_panel=WORKERS),
]
Workers = Annotated[
    int | None,
    option(
        "--workers",
        metavar="N",
        min=1,
        help="worker processes",
        panel=WORKERS,
        default="one per core, or per GPU, of the machine or cluster",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    option(
        "--gpus-per-worker",
        min=0,
        help="GPUs of each, or a fraction of one",
        panel=WORKERS,
        default="1 if there is one",
    ),
]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="A",
        help="Ray cluster: auto, HOST:PORT, ray://HOST:PORT; local starts a private instance",
        rich_help_panel=WORKERS,
    ),
]
InsecureCluster = Annotated[
    bool,
    typer.Option(
        "--insecure-cluster",
        help="use a cluster without a token: whoever reaches it can run code as you on its nodes",
        rich_help_panel=WORKERS,
    ),
]
Storage = Annotated[
    str | None,
    option("--storage", metavar="URL", help="database of the Optuna study", panel=WORKERS, default="in the run"),
]
KnownStorage = Annotated[
    str | None,
    option(
        "--storage",
        metavar="URL",
        help="database of the Optuna study",
        panel=WORKERS,
        default="where the run's board was",
    ),
]

# Configuration
RunDir = Annotated[
    Path | None,
    option("--run-dir", metavar="DIR", help="the run's folder, new or empty", panel=OUTPUT, default="one below runs/"),
]
Settings = Annotated[
    list[str] | None,
    option("--set", metavar="KEY.SUB=VALUE", help="any option by its key; repeatable", panel=CONFIG),
]

Minutes = Annotated[
    float | None,
    option("--minutes", metavar="X", help="time for the search, at most", panel=BUDGET, default="no limit"),
]
SearchSeed = Annotated[
    int | None, option("--seed", metavar="N", help="fixes the text and the search", panel=SEARCH, default=0)
]
SearchText = Annotated[
    str | None,
    option(
        "--data",
        metavar="TEXT",
        help="a file, a folder, or a data set: fitness (side B) and report (side C)",
        panel=TEXT,
        default="corpus, embedded",
    ),
]
Threads = Annotated[
    int | None,
    option("--threads", metavar="N", help="of a worker; part of a run's identity", panel=WORKERS, default=1),
]
ConfigFiles = Annotated[
    list[Path] | None,
    option("--config", metavar="FILE.yaml", help="options from a file; repeatable", panel=CONFIG),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the resolved configuration and stop", rich_help_panel=CONFIG)
]


def given_calibration(text: str | None, sequences: int | None, window: int | None) -> dict[str, Any]:
    """What was given of these options, by the names of the Python API."""
    named = {"calibration": text, "calibration_sequences": sequences, "calibration_window": window}
    return {name: value for name, value in named.items() if value is not None}


def given_loading(
    dtype: str | None,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    components: str | None = None,
) -> dict[str, Any]:
    """What was given of these options, as `load_model` takes them."""
    named = {"dtype": dtype, "device": device, "revision": revision, "components": components}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return given | {"trust_remote_code": trust_remote_code}
