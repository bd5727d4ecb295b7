"""What commands that search print: the resolved configuration, or what was found."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from evoprune.console import Output

if TYPE_CHECKING:
    from evoprune.search.config_sections import SearchConfig
    from evoprune.search.rundir import RunDirectory


def command_line(storage: str | None) -> list[str]:
    """The words of this command, for the run's record, without the password in `storage`."""
    from evoprune.search.engine.board_storage import without_password

    return ["evoprune", *(without_password(word, storage) for word in sys.argv[1:])]


def finish(output: Output, run: RunDirectory) -> None:
    """Print what a search found: the table to stderr, its folder to stdout."""
    from evoprune.search.kinds import kind_of
    from evoprune.summaries import run_document

    result = run.result
    if output.as_json or result is None:
        output.json(run_document(run))
    else:
        output.tell(*kind_of(run.kind).result_view(result, run.path))
        output.line(str(run.path))


def show_config(output: Output, config: SearchConfig) -> None:
    """Print a resolved configuration."""
    plain = config.model_dump(mode="json")
    output.json(plain) if output.as_json else output.line(_yaml(plain))


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True).rstrip()
