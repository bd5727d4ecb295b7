"""The board of a run as a whole: made, written anew from the history, given the result."""

from __future__ import annotations

from collections.abc import Callable

from evoprune.metrics.errors import InvalidInput
from evoprune.search.config_sections import SearchConfig
from evoprune.search.engine.board import Board
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.kinds import BoardKind, board_kind_of, config_of
from evoprune.search.objective_words import objective_facts
from evoprune.search.rundir import RunDirectory


def make_board(
    run: RunDirectory, kind: BoardKind, storage: str | None, *, warn: Callable[[str], None] = lambda _: None
) -> Board:
    """The run's board.

    Args:
        run: locked by this process.
        kind: what it searches.
        storage: URL of a database, or None for the run's own file.
        warn: see `Board`.
    """
    prices = kind.prices(config_of(run))
    return Board(run.path, run.run_id, storage, descriptors=kind.descriptors, prices=prices, warn=warn)


def describe(board: Board, run: RunDirectory, config: SearchConfig) -> None:
    """Tell the board what the run is."""
    identity = run.identity
    board.set_attributes(
        {
            "model": config.model.name,
            "target": config.aim,
            **objective_facts(config),
            "seed": config.seed,
            "code": identity.get("code"),
            "commit": identity.get("git"),
            "versions": identity.get("versions"),
        }
    )


def rebuild_board(run: RunDirectory, storage: str | None) -> None:
    """Write the run's studies anew: trials from its history, note and artifacts from its result.

    Raises:
        InvalidInput: a search drives the run, the storage cannot be written, or the run's steps have the boards.
    """
    config, kind = config_of(run), board_kind_of(run)
    run.lock()
    try:
        history = list(run.history())
        log = EvaluationLog(run.path / "evaluations.wal")
        records = list(kind.trials(config).records(history, log.outcomes()))
        log.close()
        said: list[str] = []
        board = make_board(run, kind, storage, warn=said.append)
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
        board = make_board(run, board_kind_of(run), storage, warn=warn)
        _tell_result(board, run)
        board.close()
    finally:
        run.close()


def _tell_result(board: Board, run: RunDirectory) -> None:
    result = run.result
    if result is None:
        return
    kind = board_kind_of(run)
    files = list(kind.artifacts(run.path, result))
    board.publish(kind.finished_note(result, [path.name for path in files]), files)
    board.set_attributes({"counters": result["reasons"], "evaluations": result["evaluations"]})
