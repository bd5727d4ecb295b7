"""Evaluation tasks of lm-evaluation-harness on a model in memory."""

from __future__ import annotations

import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jinja2.sandbox import SandboxedEnvironment

from evoprune.fitness.hub import one_line, silence
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.task_files import read_task_files
from evoprune.metrics.errors import InvalidInput

BATCH = 8
_STDERR = "_stderr"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One number of a task.

    Attributes:
        value: such as an accuracy; None if it is not finite.
        stderr: its standard error over examples, or None if the harness has none.
    """

    value: float | None
    stderr: float | None

    def to_json(self) -> dict[str, float | None]:
        """What `evoprune eval --json` prints."""
        return {"value": self.value, "stderr": self.stderr}


TaskScores = Mapping[str, Mapping[str, TaskScore]]
"""By task, then by metric; a metric of a filter is called such as ``exact_match,strict-match``."""


@dataclass(frozen=True)
class TaskSuite:
    """Tasks with their data.

    Attributes:
        built: what the harness makes of each name, of a task, a group or a tag.
        trust_remote_code: metrics that bring Python code may run.
    """

    built: Mapping[str, Any]
    trust_remote_code: bool

    def run(
        self,
        language_model: LanguageModel,
        progress: Progress,
        *,
        shots: int | None = None,
        limit: int | None = None,
    ) -> dict[str, dict[str, TaskScore]]:
        """Measure a model; the same call gives the same numbers, and other random numbers go on as if it never ran.

        Args:
            language_model: in eval mode; its weights stay.
            progress: told how many requests of a task are done.
            shots: examples in a prompt; None leaves each task its own number, and a task that says 0 keeps it.
            limit: examples of each task; None takes all.

        Raises:
            InvalidInput: a task cannot be run.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        found: dict[str, dict[str, TaskScore]] = {}
        with _quiet():
            harness = HFLM(
                pretrained=language_model.model,
                tokenizer=deepcopy(language_model.tokenizer),  # it gets a pad token
                backend="causal",
                max_length=language_model.context,
                batch_size=BATCH,
                softmax_dtype=torch.float32,
            )
            for name, built in self.built.items():
                _report(harness, f"{name} with {language_model.name}", progress)
                with _guarded(name, self.trust_remote_code):
                    for task in built["tasks"].values():
                        _set_shots(task, shots)
                    found |= _scores(evaluate(lm=harness, task_dict=built, limit=limit, log_samples=False))
        return found


def load_tasks(
    names: Sequence[str] | None, folder: str | Path | None = None, *, trust_remote_code: bool = False
) -> TaskSuite | None:
    """The tasks with these names and their data; None for None.

    Files of `folder` are read as data and handed to the harness as such: only with `trust_remote_code` does it read,
    and run, what has tags ``!function``. Templates are rendered in a sandbox.

    Args:
        names: of tasks, groups or tags, in `folder` or of the harness itself.
        folder: of YAML files as the harness has them. What is described there comes before what the harness has under
            the same name. Paths of data are looked for beside a file first; where a file has tags ``!function`` the
            harness looks for them, from the working folder.
        trust_remote_code: run Python code that tasks or their metrics bring along.

    Raises:
        InvalidInput: the harness is not installed, there is no such task or folder, its data cannot be had, or a file
            needs Python code.
    """
    if names is None:
        return None
    if not names:
        raise InvalidInput("no task is named: give names of lm-eval, such as arc_easy,hellaswag")
    files = None if folder is None else read_task_files(folder, trust_remote_code)
    if any(find_spec(package) is None for package in ("lm_eval", "accelerate")):
        raise InvalidInput("tasks need lm-eval: pip install 'evoprune[tasks]'")
    with tempfile.TemporaryDirectory(prefix="evoprune-tasks-") as place, _quiet():
        from lm_eval.tasks import TaskManager

        paths = []
        if files is not None:
            for number, content in enumerate(files.contents):
                text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
                (Path(place) / f"{number:05}.yaml").write_text(text, encoding="utf-8")
            paths = [str(files.folder)] * files.with_python + [place]
        # Looking through all that the harness has takes seconds.
        own = files is not None and files.complete() and files.names().issuperset(names)
        manager = TaskManager(include_path=paths, include_defaults=not own)
        for name in names:
            if name not in manager.all_tasks:
                close = get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` shows all"
                raise InvalidInput(f"no task {name[:80]!r}; {hint}")
        built = {}
        for name in names:
            with _guarded(name, trust_remote_code):
                built[name] = manager.load([name])
    return TaskSuite(built, trust_remote_code)


@contextmanager
def _guarded(name: str, trust_remote_code: bool) -> Iterator[None]:
    """Build or run a task: its texts in a sandbox, its metrics no code of others, its errors as one line.

    Raises:
        InvalidInput: it cannot be built or run.
    """
    refused: list[str] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(_seeded())
            stack.enter_context(_sandboxed_templates())
            if not trust_remote_code:
                stack.enter_context(_no_foreign_metrics(refused))
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the harness, its tasks and the libraries below it have no common base
        if not refused:
            raise InvalidInput(f"task {name!r} cannot be run: {one_line(error)}") from error
    if refused:
        raise InvalidInput(
            f"task {name!r} scores by {refused[0]!r} of the library evaluate, which is Python code of others: give "
            "--trust-remote-code if you trust its author"
        )


def _set_shots(task: Any, shots: int | None) -> None:
    """What `lm_eval.simple_evaluate` does, which also looks at the machine and at git, and prints what git says."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, TaskScore]]:
    """Numbers by task and metric from what the harness returns: keys such as ``acc,none`` and ``acc_stderr,none``."""
    found: dict[str, dict[str, TaskScore]] = {}
    for name, row in results["results"].items():
        scores = {}
        for key, value in row.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith(_STDERR) or not isinstance(value, int | float):
                continue
            stderr = _finite(row.get(f"{metric}{_STDERR},{chosen}"))
            scores[metric if chosen == "none" else key] = TaskScore(_finite(value), stderr)
        if scores:  # a group may have none of its own
            found[name] = scores
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _report(harness: Any, what: str, progress: Progress) -> None:
    """Let the harness report requests to `progress`, and draw no bars of its own."""
    counted = _Counted(what, progress)
    harness.set_cache_hook(counted)
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(harness, kind, partial(counted.run, getattr(type(harness), kind).__get__(harness)))


class _Counted:
    """Counts answers where the harness would put them into its cache."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what, self._progress = what, progress
        self._done = self._total = 0

    def run(self, method: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        """Answer requests of one kind."""
        self._done, self._total = 0, len(requests)
        self._progress(self._what, 0, self._total)
        return method(requests, disable_tqdm=disable_tqdm)

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        """One more has its answer."""
        self._done = min(self._done + 1, self._total)
        self._progress(self._what, self._done, self._total)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness and its libraries from writing to the terminal inside the block."""
    import datasets
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.are_progress_bars_disabled(), task.tqdm
    logger.setLevel(logging.CRITICAL)
    task.tqdm = partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        with silence():
            yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _seeded() -> Iterator[None]:
    """Global generators as the harness seeds them, and afterwards as they were."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """A Jinja template is a text of others, and outside a sandbox it reaches everything that Python can do."""
    from lm_eval import utils

    open_to_all = utils.env
    boxed = SandboxedEnvironment(
        loader=open_to_all.loader,
        undefined=open_to_all.undefined,
        keep_trailing_newline=open_to_all.keep_trailing_newline,
    )
    boxed.filters.update(open_to_all.filters)
    utils.env = boxed
    try:
        yield
    finally:
        utils.env = open_to_all


@contextmanager
def _no_foreign_metrics(refused: list[str]) -> Iterator[None]:
    """Metrics that the harness does not have come as Python code from the Hub or a folder: note names, run none."""
    import evaluate

    load = evaluate.load

    def refuse(path: object, *args: object, **options: object) -> None:
        refused.append(str(path))
        raise InvalidInput(f"metric {path} is Python code of others")

    evaluate.load = refuse
    try:
        yield
    finally:
        evaluate.load = load
