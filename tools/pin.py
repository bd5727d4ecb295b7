"""Rewrite constraints.txt: the versions we test, for every Python we support. Needs uv (`pip install uv`).

Pins already in constraints.txt are kept where they still fit; delete a line, or the file, to move to newer versions.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# The versions evoprune is tested with; `make` installs with these. Written by tools/pin.py.
# torch has no local suffix, so a CPU or a CUDA build fits; torch itself pins the CUDA packages it needs.
"""
COMMAND = "uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header"
# It wants an older transformers than all others.
APART = ("llmcompressor",)
CUDA_PACKAGES = ("cuda-", "nvidia-", "triton")
OLDEST = {"python_full_version < '3.11'": "<", "python_full_version >= '3.11'": ">="}


def simplified(line: str) -> str | None:
    """One pin with nothing but a Python-version marker; None for what torch pins by itself."""
    if line.startswith(CUDA_PACKAGES):
        return None
    pin, _, marker = (part.strip() for part in line.partition(";"))
    for clause, sign in OLDEST.items():
        if clause in marker:
            return f'{pin}; python_version {sign} "3.11"'
    return re.sub(r"\+\w+$", "", pin)


def main() -> None:
    """Resolve pyproject.toml with all extras that fit together and write constraints.txt."""
    target = ROOT / "constraints.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [f"--extra={name}" for name in project["optional-dependencies"] if name not in APART]
    subprocess.run([*COMMAND.split(), *extras, "pyproject.toml", "--output-file", target.name], cwd=ROOT, check=True)
    pins = [simplified(line) for line in target.read_text().splitlines() if line and not line.startswith("#")]
    target.write_text(HEADER + "".join(f"{pin}\n" for pin in pins if pin))


if __name__ == "__main__":
    main()
