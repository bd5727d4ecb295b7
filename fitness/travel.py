"""The user's own files on their way to a cluster: the model's folder and the texts, packed where the driver is."""

from __future__ import annotations

import os
from pathlib import Path

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.examples import holds_images, read_examples
from evoprune.fitness.hub import DESCRIPTIONS, REFERENCE, model_folder, weight_files
from evoprune.fitness.parcels import packing
from evoprune.metrics.errors import InvalidInput


def pack_inputs(context: EvaluationContext) -> dict[str, str]:
    """Pack what a search reads from this machine's disk, as parcels of links.

    The embedded model travels with the package. A Hub model is sent as it lies in this machine's cache, so that all
    nodes work on one revision and need neither a network nor a login. A data set's name is left to the nodes.

    Returns:
        For `EvaluationContext.places`: name as the user gave it -> the parcel, and the file inside it if it is one.

    Raises:
        InvalidInput: there is no such model, or images lie elsewhere than the file that names them.
    """
    places: dict[str, str] = {}
    remote_code = context.trust_remote_code
    folder = model_folder(context.model, revision=context.revision, trust_remote_code=remote_code, weights=True)
    if folder != REFERENCE:
        patterns = [*DESCRIPTIONS, *(["*.py"] if remote_code else [])]
        described = [path for pattern in patterns for path in folder.glob(pattern)]
        places[context.model] = _pack("model", folder, {*described, *weight_files(folder)})
    for source in sorted({context.data, context.calibration}):
        path = Path(source).expanduser()
        if path.is_file() and holds_images(source):
            places[source] = f"{_pack('text', path.parent, {path, *_images(path)})}/{path.name}"
        elif path.is_file():
            places[source] = f"{_pack('text', path.parent, {path})}/{path.name}"
        elif path.is_dir():
            files = {Path(parent) / name for parent, _, names in os.walk(path) for name in names}
            places[source] = _pack("text", path, files)
    return places


def _images(file: Path) -> set[Path]:
    """The images that the lines of a file name.

    Raises:
        InvalidInput: one lies outside the file's folder, which is what travels.
    """
    found = {example.image for example in read_examples(str(file)) if example.image is not None}
    for image in sorted(found):
        if not image.is_relative_to(file.parent) or ".." in image.relative_to(file.parent).parts:
            raise InvalidInput(f"{image} lies outside {file.parent}, which travels to the cluster: put it inside")
    return found


def _pack(kind: str, root: Path, files: set[Path]) -> str:
    with packing(kind) as packed:
        for path in files:
            target = packed.folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    return packed.name
