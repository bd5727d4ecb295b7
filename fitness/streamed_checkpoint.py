"""Writing a checkpoint block by block, so that an interrupted run goes on behind the last whole block."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.cache import disk_errors
from evoprune.fitness.card import Loading, WeightCounts, model_card
from evoprune.fitness.checkpoint import (
    RECORD,
    SPARSITY_REPORT,
    check_out_dir,
    flush_folder,
    json_text,
    put_in_place,
    record_text,
    state_dtype_in_config,
)
from evoprune.fitness.file_states import FileStates
from evoprune.fitness.hub import silence
from evoprune.fitness.pruning import PrunedLayer
from evoprune.fitness.streamed import Streamed
from evoprune.metrics.errors import EvopruneError
from evoprune.metrics.files import content_hash, write_atomically

STATE = "state.json"
INDEX = "model.safetensors.index.json"


class StreamedCheckpoint:
    """A checkpoint on its way, in a hidden folder beside the one that it becomes.

    Args:
        streamed: the model that is pruned.
        out_dir: a new or empty folder, or an evoprune checkpoint, which is replaced in the end.
        identity: JSON values, all that decides the weights: what is there of another one is thrown away.
        dtype: of the floating weights in the files.

    Attributes:
        folder: the hidden one.
        done: how many blocks are written.
        layers: what became of their matrices.
        discarded: whether something else had been begun here.

    Raises:
        InvalidInput: `out_dir` cannot be used, or the disk is full or read-only.
    """

    def __init__(
        self, streamed: Streamed, out_dir: Path | str, identity: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self._streamed = streamed
        self._out = check_out_dir(out_dir)
        self._identity = content_hash(dict(identity) | {"stored": str(dtype)})
        self._dtype = dtype
        self.folder = self._out.with_name(f".{self._out.name}.streaming")
        self._parts = [streamed.block(block) for block in range(streamed.n_blocks)]
        apart = [streamed.beside, streamed.embeddings, streamed.head]
        again = streamed.files.again
        self._parts += [kept for names in apart if (kept := tuple(name for name in names if name not in again))]
        self.done = 0
        self.layers: tuple[PrunedLayer, ...] = ()
        self._zeros: dict[str, list[int]] = {}  # by part: all, and those of prunable matrices
        self._walks: dict[str, Any] = {}
        self.discarded = False
        with disk_errors(self._out):
            self._begin()

    def states(self, walk: str) -> FileStates:
        """An empty file for the hidden states of a walk."""
        return FileStates(self.folder / f"{walk}-{os.urandom(4).hex()}.states")

    def resumed(self, walks: Mapping[str, BlockWalk]) -> None:
        """Bring walks to where they were behind the last block that is done."""
        for name, walk in walks.items():
            known = self._walks[name]
            walk.resume(self.done, FileStates.from_json(self.folder, known["states"]))
            for index, count in enumerate(known["beside"]):
                walk.beside[index] = None if count is None else (None,) * count

    def add(self, layers: Iterable[PrunedLayer], walks: Mapping[str, BlockWalk]) -> None:
        """Write the next block, which is resident and pruned, and where the walks are behind it."""
        with disk_errors(self._out):
            self._write(self.done, {bound.site.name for bound in self._streamed.language_model.sites})
            self._walks = {name: _position(walk) for name, walk in walks.items()}
            self.layers += tuple(layers)
            self.done += 1
            self._commit()

    def finish(
        self,
        *,
        recipe: Mapping[str, Any],
        report: Mapping[str, Any],
        sparsity: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write what is outside the blocks and what goes beside the weights, and let the folder be the checkpoint.

        Arguments as of `evoprune.fitness.checkpoint.write_checkpoint`.

        Returns:
            The absolute path of the folder.
        """
        streamed = self._streamed
        language_model, model = streamed.language_model, streamed.model
        with disk_errors(self._out):
            for part in range(streamed.n_blocks, len(self._parts)):
                with streamed.resident(self._parts[part]):
                    self._write(part, set())
            counts = self._counts()
            with silence():
                model.config.architectures = [type(model).__name__]
                model.config.save_pretrained(self.folder)
                if model.can_generate():
                    model.generation_config.save_pretrained(self.folder)
                language_model.save_readers(self.folder)
            state_dtype_in_config(self.folder / "config.json", self._dtype)
            places = {name: self._name(part) for part, names in enumerate(self._parts) for name in names}
            index = {"metadata": {"total_size": counts.dense_bytes}, "weight_map": places}
            write_atomically(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
            write_atomically(self.folder / RECORD, record_text(language_model, recipe, report))
            write_atomically(self.folder / SPARSITY_REPORT, json_text(sparsity))
            loading = Loading(language_model.auto.__name__)
            card = model_card(
                language_model.name, counts, recipe, report, loading=loading, again=bool(files), sparsities=True
            )
            write_atomically(self.folder / "README.md", card)
            for name, content in (files or {}).items():
                write_atomically(self.folder / name, content)
            for path in [self.folder / STATE, *self.folder.glob("*.states")]:
                path.unlink(missing_ok=True)
            flush_folder(self.folder)
            put_in_place(self.folder, self._out)
        return self._out

    def _begin(self) -> None:
        """Find what was done before, or begin anew."""
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            if state["identity"] == self._identity:
                self.layers = tuple(PrunedLayer(**{**row, "shape": tuple(row["shape"])}) for row in state["layers"])
                self._zeros, self._walks, self.done = state["zeros"], state["walks"], state["done"]
                return
            self.discarded = True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _commit(self) -> None:
        state = {
            "identity": self._identity,
            "done": self.done,
            "layers": [asdict(layer) for layer in self.layers],
            "zeros": self._zeros,
            "walks": self._walks,
        }
        write_atomically(self.folder / STATE, json.dumps(state) + "\n")
        used = {walk["states"]["file"] for walk in self._walks.values()}
        for path in self.folder.glob("*.states"):
            if path.name not in used:
                path.unlink()

    def _name(self, part: int) -> str:
        return f"model-{part + 1:05d}-of-{len(self._parts):05d}.safetensors"

    def _write(self, part: int, prunable: set[str]) -> None:
        """Write the tensors of a part as they are in memory, read them again, and count zeros."""
        state = {name: _tensor(self._streamed.model, name) for name in self._parts[part]}
        tensors = {
            name: (value.to(self._dtype) if value.is_floating_point() else value).cpu().contiguous()
            for name, value in state.items()
        }
        path = self.folder / self._name(part)
        partial = path.with_suffix(".part")
        save_file(tensors, partial, metadata={"format": "pt"})
        with safe_open(partial, framework="pt") as file:
            for name, value in tensors.items():
                if not torch.equal(file.get_tensor(name), value):
                    raise EvopruneError(
                        f"{name} differs after saving and loading again: the checkpoint was not written"
                    )
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
        zeros = {name: int((value == 0).sum()) for name, value in tensors.items()}
        matrices = [name for name in zeros if name.endswith(".weight") and name.removesuffix(".weight") in prunable]
        self._zeros[str(part)] = [sum(zeros.values()), sum(zeros[name] for name in matrices)]

    def _counts(self) -> WeightCounts:
        streamed = self._streamed
        again = streamed.files.again
        whole = sum(value.numel() for name, value in streamed.model.named_parameters() if name not in again)
        files = [self.folder / self._name(part) for part in range(len(self._parts))]
        return WeightCounts(
            prunable=sum(bound.site.weights for bound in streamed.language_model.sites),
            removed=sum(prunable for _, prunable in self._zeros.values()),
            parameters=whole,
            zeros=sum(zeros for zeros, _ in self._zeros.values()),
            dense_bytes=whole * self._dtype.itemsize,
            file_bytes=sum(path.stat().st_size for path in files),
        )


def _position(walk: BlockWalk) -> dict[str, Any]:
    states = walk.hidden
    assert isinstance(states, FileStates)
    states.flush()
    return {"states": states.to_json(), "beside": [None if made is None else len(made) for made in walk.beside]}


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return found.detach()
