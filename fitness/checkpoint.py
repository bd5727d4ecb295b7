"""Writing a pruned model as a checkpoint that plain transformers loads: whole and checked, or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evoprune.fitness.adapters import Prunable
from evoprune.fitness.cache import disk_errors
from evoprune.fitness.card import Cut, Loading, WeightCounts, model_card, public_name
from evoprune.fitness.compact import load_compact, write_compact
from evoprune.fitness.hub import one_line, silence
from evoprune.fitness.modular import load_modular, modules_of, write_modular
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import user_path, write_atomically

FORMAT = "evoprune checkpoint 1"
RECORD = "evoprune.json"
SPARSITY_REPORT = "sparsity_report.json"


class Writable(Prunable, Protocol):
    """What can become a checkpoint; see `evoprune.fitness.models.LanguageModel` for what its attributes are.

    Attributes:
        model: of transformers.
        auto: the class in transformers that loads it.
    """

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def stored_dtype(self) -> torch.dtype | None: ...

    @property
    def cut(self) -> bool: ...

    @property
    def auto(self) -> Any: ...

    def save_readers(self, folder: Path) -> None:
        """Write what turns text and images into its inputs."""


def write_checkpoint(
    language_model: Writable,
    out_dir: Path | str,
    *,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    cut: Cut | None = None,
    files: Mapping[str, str] | None = None,
    sparsity: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model as it is now: safetensors with its zeros, tokenizer, `evoprune.json` and a model card.

    The files of a processor that lie beside a model that reads images are copied. A model whose blocks have widths of
    their own gets the compact form, one with modules of ours the modular form.

    The folder is written beside `out_dir`, loaded again as users will, compared weight by weight, and only then
    renamed. Weights get the dtype of the original files when every one of them survives that exactly, as it does
    after a mask; else they keep the dtype that the model computes in. Tied weights stay tied.

    Args:
        language_model: with the pruned weights in place.
        out_dir: a new or empty folder, or an evoprune checkpoint, which is replaced.
        recipe: how the model was pruned; goes into `evoprune.json` and the card. JSON values only.
        report: numbers about it; a mapping in it that has a ``perplexity`` becomes a row of the card's table.
        cut: what a shape took away; None if every matrix is as large as it was.
        files: text of further files by name, with which `evoprune prune --recipe` makes the checkpoint again.
        sparsity: what becomes `sparsity_report.json`: what was done to each matrix, and what that took. JSON values.

    Returns:
        The absolute path of the folder.

    Raises:
        InvalidInput: `out_dir` cannot be used, the model has thresholds and widths of its own, or the disk is full or
            read-only; nothing is left behind.
        EvopruneError: what was loaded again differs from what was saved; nothing is left behind.
    """
    out = check_out_dir(out_dir)
    model = language_model.model
    if language_model.cut and modules_of(model):
        raise InvalidInput("a model with thresholds has no compact form: cut it first, or give --form padded or masked")
    dtype = _exact_dtype(model, language_model.stored_dtype)
    state = _state_as(model, dtype)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        try:
            partial.mkdir()
            with silence():
                model.save_pretrained(partial, state_dict=dict(state))
                language_model.save_readers(partial)
            state_dtype_in_config(partial / "config.json", dtype)
            if language_model.cut:
                write_compact(language_model, partial)
            if modules := modules_of(model):
                write_modular(model, partial)
            counts = _count(language_model, partial, state)
            write_atomically(partial / RECORD, record_text(language_model, recipe, report))
            if sparsity is not None:
                write_atomically(partial / SPARSITY_REPORT, json_text(sparsity))
            loading = Loading(language_model.auto.__name__, language_model.cut, bool(modules))
            has = {"again": bool(files), "sparsities": sparsity is not None}
            card = model_card(language_model.name, counts, recipe, report, loading=loading, cut=cut, **has)
            write_atomically(partial / "README.md", card)
            for name, content in (files or {}).items():
                write_atomically(partial / name, content)
            _check_reload(language_model, partial, state, dtype)
            flush_folder(partial)
            put_in_place(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def json_text(values: Mapping[str, Any]) -> str:
    """A file of a checkpoint: JSON with sorted keys, of values that are finite."""
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def record_text(language_model: Writable, recipe: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What `evoprune.json` says: how which model was pruned, and numbers about it."""
    record = {
        "format": FORMAT,
        "evoprune": version("evoprune"),
        "model": public_name(language_model.name),
        "fingerprint": language_model.fingerprint,
        "recipe": recipe,
        "report": report,
    }
    return json_text(record)


def check_out_dir(out_dir: Path | str) -> Path:
    """The absolute path of a folder that a checkpoint may be written to; worth asking before long work.

    Raises:
        InvalidInput: it is a file, holds something else than an evoprune checkpoint, or is the current folder.
    """
    try:
        out = user_path(out_dir).resolve()
    except RuntimeError as error:  # a loop of links
        raise InvalidInput(f"cannot write {out_dir}: {one_line(error)}") from None
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out_dir} is a file: give a new or empty folder for the checkpoint")
    if out.is_dir() and out.samefile("."):
        # The rename would leave whoever stands in it in a folder that is no more.
        raise InvalidInput(f"{out_dir} is the current folder, which would be replaced: give a new one, such as pruned")
    with disk_errors(out):
        if out.is_dir() and any(out.iterdir()) and not _is_checkpoint(out):
            raise InvalidInput(f"{out_dir} holds other files: give a new or empty folder for the checkpoint")
    return out


def _is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds what `write_checkpoint` writes and no folder beside it."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(record, dict)
        and record.get("format") == FORMAT
        and not any(path.is_dir() for path in folder.iterdir())
    )


def _exact_dtype(model: PreTrainedModel, stored: torch.dtype | None) -> torch.dtype:
    """`stored` if no parameter changes by the cast, else the dtype the model computes in."""
    if stored is None or stored == model.dtype or not stored.is_floating_point:
        return model.dtype
    exact = all(torch.equal(value.to(stored).to(value.dtype), value) for value in model.parameters())
    return stored if exact else model.dtype


def _state_as(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of `model` with its floating parameters as `dtype`; tensors that share memory still do."""
    parameters = {id(value): value for value in model.parameters()}
    cast: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in parameters and value.is_floating_point():
            state[name] = cast.setdefault(id(value), value.detach().to(dtype))
        else:
            state[name] = value.detach()
    return state


def state_dtype_in_config(file: Path, dtype: torch.dtype) -> None:
    """Name in config.json the dtype of the files: transformers would name the one that the model computes in."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _count(language_model: Writable, folder: Path, state: dict[str, Tensor]) -> WeightCounts:
    parameters = list(language_model.model.parameters())
    unique = {value.data_ptr(): value for value in state.values()}.values()
    return WeightCounts(
        prunable=sum(bound.site.weights for bound in language_model.sites),
        removed=sum(int((bound.weight() == 0).sum()) for bound in language_model.sites),
        parameters=sum(value.numel() for value in parameters),
        zeros=sum(int((value == 0).sum()) for value in parameters),
        dense_bytes=sum(value.numel() * value.element_size() for value in unique),
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


def _check_reload(language_model: Writable, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Load the folder as a user would and compare every tensor bit for bit.

    Raises:
        EvopruneError: they differ, or tied weights came apart.
    """
    model = language_model.model
    # A model of another author's class is loaded by that class: no file in the folder is run.
    ours = language_model.auto if type(model).__module__.startswith("transformers.") else type(model)
    modules = modules_of(model)
    load = load_compact if language_model.cut else load_modular if modules else ours.from_pretrained
    with silence():
        loaded = load(folder, dtype=dtype, use_safetensors=True)
    found = loaded.state_dict()
    if surplus := sorted(found.keys() - state.keys()):
        raise EvopruneError(f"{surplus[0]} is there after loading again and was not before: nothing was written")
    for name, value in state.items():
        if name not in found or not torch.equal(found[name], value.cpu()):
            raise EvopruneError(f"{name} differs after saving and loading again: the checkpoint was not written")
    if modules_of(loaded) != modules:
        raise EvopruneError("modules differ after saving and loading again: the checkpoint was not written")
    if _is_tied(model) != _is_tied(loaded):
        raise EvopruneError("tied weights came apart in saving and loading again: the checkpoint was not written")


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.get_parameter("weight") is model.get_input_embeddings().get_parameter("weight")


def flush_folder(folder: Path) -> None:
    """Bring the files to the disk before the rename makes them count."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; an older checkpoint there is moved aside first and deleted last."""
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_suffix(".old")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
