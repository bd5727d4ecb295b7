"""A metric as a JSON document: the source of truth of an export. Source: symbolic pruning metrics, section 4.1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.metrics.canonical import canonicalise
from evoprune.metrics.criterion import Metric
from evoprune.metrics.emit_formula import latex, to_text
from evoprune.metrics.emit_python import FORMAT
from evoprune.metrics.emit_selftest import SelfTest, arguments
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import MaskRule

DIALECT = "core"


def json_document(
    metric: Metric,
    rule: MaskRule,
    selftest: SelfTest,
    *,
    title: str,
    provenance: Mapping[str, Any],
    results: Mapping[str, Any],
    equivalent_to: Sequence[str],
) -> dict[str, Any]:
    """The document, with its own ``sha256`` over the canonical JSON of the rest.

    Raises:
        ValueError: `provenance` or `results` hold a NaN, an infinity or something that is no plain data.
    """
    expression = metric.expression
    document = {
        "format": FORMAT,
        "dialect": DIALECT,
        "title": title,
        "group": metric.group,
        "expr": expression.to_json(),
        "canonical": canonicalise(expression, metric.group).text,
        "text": to_text(expression),
        "latex": latex(expression),
        "requires": list(arguments(expression)),
        "complexity": expression.complexity,
        "source": metric.source,
        "rule": {"sparsity": rule.sparsity, "pattern": None if rule.pattern is None else list(rule.pattern)},
        "provenance": dict(provenance),
        "results": dict(results),
        "equivalent_to": list(equivalent_to),
        "selftest": selftest.to_json(),
    }
    # Through JSON and back, so that the hash is that of what a reader will see.
    document = json.loads(json.dumps(document, allow_nan=False))
    return {**document, "sha256": content_hash(document)}
