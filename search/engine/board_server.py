"""Optuna Dashboard on a run's board."""

from __future__ import annotations

from pathlib import Path

from evoprune.metrics.errors import EvopruneError, InvalidInput


def check_installed() -> None:
    """Make sure that there is a dashboard to serve.

    Raises:
        InvalidInput: the package is not installed.
    """
    try:
        import optuna_dashboard  # noqa: F401
    except ImportError:
        raise InvalidInput("the dashboard is not installed: pip install 'evoprune[dashboard]'") from None


def serve(run_dir: Path, url: str | None, host: str, port: int) -> None:
    """Serve the board of the run in `run_dir` until the process is stopped.

    Args:
        url: the board's database; None for the run's own file.

    Raises:
        EvopruneError: nothing can listen at this address, or the database does not answer.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import run_server

    artifacts = run_dir.resolve() / "artifacts"
    artifacts.mkdir(exist_ok=True)
    # Absolute, for Optuna's lock is a link to the file.
    storage = url or str(run_dir.resolve() / "optuna.log")
    try:
        run_server(storage, host=host, port=port, artifact_store=FileSystemArtifactStore(artifacts))
    except (OSError, OverflowError) as error:
        raise EvopruneError(f"cannot listen at {host}:{port}: {error}; give another --port") from None
