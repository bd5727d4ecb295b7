"""Both studies of a run in Optuna's storage: trials, attributes, the note and the artifacts."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.search.engine.trial_record import Range, TrialRecord, fits, plain

if TYPE_CHECKING:
    from optuna import Study
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

Numbered = tuple[int, int, TrialRecord]
"""Number of the trial, number of its point of the front if it is one, and the record."""


_ARTIFACT = re.compile(r"(?<=\()artifact:([\w.-]+)(?=\))")  # as the address of a Markdown link or picture


class OtherTrial(Exception):
    """The storage holds another trial under this number."""


class Studies:
    """Both studies of a run, open. Whatever is there already is not added again, so each call can be repeated.

    Args:
        storage: an open one.
        name: of the main study; the front's is `<name>/front`.
        descriptors: name and range of every descriptor.
        artifacts: folder of the artifacts; made by the first.
        prices: what the front's values beside the fitness are called.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        descriptors: Mapping[str, Range],
        artifacts: Path | None = None,
        prices: Sequence[str] = ("complexity",),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # For good: a filter for the length of a call is the whole process's, and other threads have their own.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._descriptors = descriptors
        self._distributions = {descriptor: _distribution(allowed) for descriptor, allowed in descriptors.items()}
        self._artifacts = artifacts
        self._main = _study(storage, name, ["fitness"])
        self._front = _study(storage, front_name(name), ["fitness", *prices])
        self._known = {
            study.study_name: [_gist(trial) for trial in study.get_trials(deepcopy=False)]
            for study in (self._main, self._front)
        }

    def add_all(self, numbered: Iterable[Numbered]) -> None:
        """Add the records' trials, and their points of the front, under their numbers.

        Raises:
            OtherTrial: a number is taken by another trial.
        """
        for number, point, record in numbered:
            value = record.final_value
            self._add(self._main, number, self._trial(record, None if value is None else [value]))
            if record.enters_front and value is not None:
                self._add(self._front, point, self._trial(record, [value, *map(float, record.prices)]))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the main study."""
        for name, value in attributes.items():
            self._main.set_user_attr(name, value)

    def note(self, markdown: str) -> None:
        """Replace the main study's note, if the dashboard is installed, whose format that is.

        Args:
            markdown: an address `artifact:NAME` becomes that of the artifact in the dashboard.
        """
        with contextlib.suppress(ImportError):
            from optuna_dashboard import save_note

            save_note(self._main, _ARTIFACT.sub(self._address, markdown))

    def _address(self, found: re.Match[str]) -> str:
        from optuna.artifacts import get_all_artifact_meta

        known = {artifact.filename: artifact.artifact_id for artifact in get_all_artifact_meta(self._main)}
        if found[1] not in known:
            return found[0]
        return f"/artifacts/{self._main._study_id}/{known[found[1]]}"

    def add_artifact(self, path: Path) -> None:
        """Copy a file to the artifacts and list it at the main study; one of this name and content stays as it is."""
        from optuna.artifacts import get_all_artifact_meta, upload_artifact
        from optuna.artifacts.exceptions import ArtifactNotFound

        assert self._artifacts is not None
        store = _artifact_store(self._artifacts)
        for known in get_all_artifact_meta(self._main):
            if known.filename == path.name:
                # Optuna lists an artifact before it copies the file, and a crash may come in between.
                with contextlib.suppress(ArtifactNotFound), store.open_reader(known.artifact_id) as file:
                    if file.read() == path.read_bytes():
                        return
        upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=self._main)

    def _add(self, study: Study, number: int, trial: FrozenTrial) -> None:
        known = self._known[study.study_name]
        if number < len(known):
            if known[number] != _gist(trial):
                raise OtherTrial(f"trial {number} of {study.study_name} is not the one in the history")
            return
        if number > len(known):
            raise OtherTrial(f"trial {len(known)} of {study.study_name} is missing")
        study.add_trial(trial)
        known.append(_gist(trial))

    def _trial(self, record: TrialRecord, values: list[float] | None) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "fail": TrialState.FAIL}
        params = {
            name: value
            for name, value in record.descriptors.items()
            if name in self._descriptors and fits(value, self._descriptors[name])
        }
        rungs = plain({"rungs": {rung: float(value) for rung, value in record.rungs.items()}})["rungs"]
        trial = create_trial(
            state=states[record.final_state],
            values=values,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs=plain(record.attributes),
            # Optuna's own `constraints=` is stored under other names, which the dashboard (0.21) takes for feasible.
            system_attrs={"constraints": list(record.constraints)} if record.constraints else None,
            intermediate_values={int(rung): value for rung, value in rungs.items() if not isinstance(value, str)},
        )
        if record.finished is not None:  # Optuna's times are local and naive
            trial.datetime_complete = datetime.fromtimestamp(record.finished)
            trial.datetime_start = datetime.fromtimestamp(record.started or record.finished)
        return trial


def erase(storage: BaseStorage, name: str, artifacts: Path) -> None:
    """Delete both studies of a run, and the artifacts that they list."""
    import optuna

    for study_name in (name, front_name(name)):
        with contextlib.suppress(KeyError):
            study = optuna.load_study(study_name=study_name, storage=storage)
            for artifact in optuna.artifacts.get_all_artifact_meta(study):
                with contextlib.suppress(optuna.artifacts.exceptions.ArtifactNotFound):
                    _artifact_store(artifacts).remove(artifact.artifact_id)
            optuna.delete_study(study_name=study_name, storage=storage)


def front_name(name: str) -> str:
    """The study with the points of the front."""
    return f"{name}/front"


def _artifact_store(folder: Path) -> FileSystemArtifactStore:
    from optuna.artifacts import FileSystemArtifactStore

    folder.mkdir(exist_ok=True)
    return FileSystemArtifactStore(folder)


def _study(storage: BaseStorage, name: str, metrics: list[str]) -> Study:
    """Open or create a study that minimises `metrics`."""
    import optuna

    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=["minimize"] * len(metrics),
        sampler=optuna.samplers.RandomSampler(),
        load_if_exists=True,
    )
    if study.metric_names != metrics:
        study.set_metric_names(metrics)
    return study


def _gist(trial: FrozenTrial) -> tuple[Any, ...]:
    """What tells one trial from another."""
    return (trial.state, tuple(trial.values or ()), json.dumps(trial.user_attrs, sort_keys=True))


def _distribution(allowed: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(allowed, list):
        return CategoricalDistribution(allowed)
    low, high = allowed
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high)
    return FloatDistribution(low, high)
