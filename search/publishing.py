"""The board of a run as a whole: made, written anew from the history, given the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from evoprune.metrics.emit import latex, to_text
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.files import write_atomically
from evoprune.search.board_note import finished_note
from evoprune.search.config import MetricSearchConfig, validated
from evoprune.search.engine.board import Board
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.report.formula import formula_picture
from evoprune.search.rundir import RunDirectory
from evoprune.search.trials import DESCRIPTORS, Trials


def make_board(run: RunDirectory, storage: str | None, *, warn: Callable[[str], None] = lambda _: None) -> Board:
    """The run's board.

    Args:
        run: locked by this process.
        storage: URL of a database, or None for the run's own file.
        warn: see `Board`.
    """
    return Board(run.path, run.run_id, storage, descriptors=DESCRIPTORS, warn=warn)


def describe(board: Board, run: RunDirectory, config: MetricSearchConfig) -> None:
    """Tell the board what the run is."""
    identity = run.identity
    board.set_attributes(
        {
            "model": config.model.name,
            "target": str(config.target.rule),
            "objective": config.objective,
            "seed": config.seed,
            "code": identity.get("code"),
            "commit": identity.get("git"),
            "versions": identity.get("versions"),
        }
    )


def rebuild_board(run: RunDirectory, storage: str | None) -> None:
    """Write the run's studies anew: trials from its history, note and artifacts from its result.

    Raises:
        InvalidInput: a search drives the run, or the storage cannot be written.
    """
    config = validated(run.config)
    run.lock()
    try:
        history = list(run.history())
        log = EvaluationLog(run.path / "evaluations.wal")
        records = list(Trials(len(config.racing.rungs)).records(history, log.outcomes()))
        log.close()
        said: list[str] = []
        board = make_board(run, storage, warn=said.append)
        board.rebuild(records)
        describe(board, run, config)
        _tell_result(board, run)
        if not board.close():
            raise InvalidInput(f"the board cannot be rebuilt: {said[0]}")
    finally:
        run.close()


def publish_result(run: RunDirectory, storage: str | None, *, warn: Callable[[str], None] = lambda _: None) -> None:
    """Give the board of a finished run its note and its artifacts.

    Args:
        run: this process must be able to lock it.
        warn: see `Board`.

    Raises:
        InvalidInput: another process drives the run.
    """
    run.lock()
    try:
        board = make_board(run, storage, warn=warn)
        _tell_result(board, run)
        board.close()
    finally:
        run.close()


def _tell_result(board: Board, run: RunDirectory) -> None:
    result = run.result
    if result is None:
        return
    winner = parse(result["best"]["expression"])
    files = list(_files(run.path, winner))
    board.publish(finished_note(result, winner, [path.name for path in files]), files)
    board.set_attributes({"counters": result["reasons"], "evaluations": result["evaluations"]})


def _files(folder: Path, winner: Expression) -> Iterator[Path]:
    """What a finished run leaves for people to take, after a picture of the winner's formula."""
    picture = formula_picture(f"S = {latex(winner)}", f"S = {to_text(winner)}")
    if picture is not None and (folder / "plots").is_dir():
        write_atomically(folder / "plots" / "formula.svg", picture)
    yield from sorted((folder / "export").glob("metric.*"))
    yield from sorted((folder / "plots").glob("*.svg"))
    if (folder / "report.html").exists():
        yield folder / "report.html"
