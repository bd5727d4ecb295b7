"""Exported metrics whose content was changed and whose seal was then made anew, as somebody who knows evoprune can."""

from __future__ import annotations

import json
from typing import Any

from evoprune.metrics.emit_python import seal
from evoprune.metrics.files import content_hash


def resealed(text: str) -> str:
    """A `.py` whose seal was made for its own, changed text."""
    value = text[text.index('SEAL = "') + 8 :][:64]
    return text.replace(value, seal(text, value))


def rehashed(document: dict[str, Any]) -> str:
    """A `.json` whose hash was made for its own, changed content."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return json.dumps({**content, "sha256": content_hash(content)})
