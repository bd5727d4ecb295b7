"""Run a notebook from top to bottom and write it back with what it prints: `python tools/run_notebook.py`.

It runs in an empty folder, so that what it writes does not stay, and without marks of the machine in the result.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
CELL_SECONDS = 1200


def run(path: Path, folder: Path) -> NotebookNode:
    """The notebook with new outputs; the file stays as it is.

    Args:
        folder: where its cells work.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Without progress bars and warnings of other packages (stderr), and with what a cell prints in one piece."""
    for cell in notebook.cells:
        kept: list[NotebookNode] = []
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                continue
            if kept and output.get("name") == "stdout" == kept[-1].get("name"):
                kept[-1].text += output.text
            else:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this interpreter
    return notebook


def main(path: Path) -> None:
    """Run the notebook in place."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(path, Path(folder))
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else QUICKSTART)
