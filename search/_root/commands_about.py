"""Commands about evoprune itself: `list` and `doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from evoprune.console import Output
from evoprune.options import Json

Kind = Literal[
    "criteria", "operators", "terminals", "allocators", "compressors", "methods", "unit-criteria", "objectives",
    "spaces", "searchers", "learners", "estimators", "policies", "recoveries",
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("list", rich_help_panel="About")(list_kind)
    app.command("doctor", rich_help_panel="About")(doctor)


def list_kind(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="what to list", show_choices=True)],
    as_json: Json = False,
) -> None:
    """List criteria, operators, allocators, compressors, methods, searchers, learners, recoveries and others."""
    from evoprune.listing import rows_of

    with Output(as_json) as output:
        rows = rows_of(kind)
        if as_json:
            output.json(rows)
        else:
            from evoprune.search.tables import compressors_table, criteria_table, plain_table

            own = {"criteria": criteria_table, "compressors": compressors_table}
            output.show(own.get(kind, plain_table)(rows))
            if kind == "criteria":
                output.tell(_seeding(rows))


def _seeding(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which criteria a search does not start from, and how to have them."""
    from evoprune.search.config_metric import MetricSearchConfig

    readable = MetricSearchConfig().terminals
    left_out = [row for row in rows if row["expression"] is not None and not readable.issuperset(row["needs"])]
    names = ", ".join(row["name"] for row in left_out)
    wanted = ",".join(sorted({need for row in left_out for need in row["needs"]}))
    return (
        f"`evoprune search metric` starts from all of these that are formulas but {names}: candidates may not read "
        f"their statistics unless told so, as by --set 'statistics=[{wanted}]'"
    )


def doctor(as_json: Json = False) -> None:
    """Check what works here: packages (Ray is not started), devices, embedded model and text, folders, extras."""
    from evoprune.checks import all_checks

    with Output(as_json) as output:
        checks = list(all_checks())
        healthy = all(check.status != "broken" for check in checks)
        if as_json:
            output.json({"ok": healthy, "checks": [check.to_json() for check in checks]})
        else:
            from evoprune.search.tables import checks_table

            output.show(checks_table([check.to_json() for check in checks]))
    if not healthy:
        raise typer.Exit(1)
