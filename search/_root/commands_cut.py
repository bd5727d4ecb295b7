"""What `prune` does with `--shape`, `--method`, `--policy` and `--recipe`: most of these make the model smaller."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.console import Output
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import user_path

if TYPE_CHECKING:
    from evoprune.outcomes import Smaller


def prune_to_shape(output: Output, model: str, shape: Path, beside: dict[str, Any], options: dict[str, Any]) -> None:
    """Cut a model to the shape in a file; what was given beside it is refused.

    Args:
        output, model, shape: as given.
        beside: values of options that say something else than a shape.
        options: further arguments of `prune_shape`, `out` among them.

    Raises:
        InvalidInput: a shape and something else say what goes, or `prune_shape` refuses.
    """
    _check("--shape", model, beside, options["out"])
    from evoprune.shapes import prune_shape

    done = prune_shape(model, shape, progress=output.step, **options)
    if done.foreign:
        output.tell("the shape was found on other weights of this class")
    _show(output, model, done)


def prune_by_method(output: Output, model: str, method: str, beside: dict[str, Any], options: dict[str, Any]) -> None:
    """Make a model smaller as a published method does.

    Args:
        output, model, method: as given.
        beside: values of options that say something else than a method.
        options: further arguments of `prune_structure`, `out` among them.

    Raises:
        InvalidInput: a method and something else say what goes, or `prune_structure` refuses.
    """
    _check("--method", model, beside, options["out"])
    from evoprune.shapes import prune_structure

    _show(output, model, prune_structure(model, method, progress=output.step, **options))


def prune_by_policy(output: Output, model: str, policy: str, beside: dict[str, Any], options: dict[str, Any]) -> None:
    """Remove from a model what a policy search found can go.

    Args:
        output, model, policy: as given.
        beside: values of options that say something else than a policy.
        options: further arguments of `prune_policy`, `out` among them.

    Raises:
        InvalidInput: a policy and something else say what goes, or `prune_policy` refuses.
    """
    _check("--policy", model, beside, options["out"])
    from evoprune.outcomes import CutModel
    from evoprune.policies import FOREIGN, prune_policy

    done = prune_policy(model, policy, progress=output.step, **options)
    if done.foreign if isinstance(done, CutModel) else done.doubt is not None:
        output.tell(FOREIGN)
    _show(output, model, done)


def prune_by_recipe(
    output: Output, model: str | None, recipe: Path, beside: dict[str, Any], options: dict[str, Any]
) -> None:
    """Make a checkpoint again.

    Args:
        output, recipe: as given.
        model: None takes the recipe's.
        beside: values of options that a recipe has by itself.
        options: further arguments of `prune_recipe`, `out` among them.

    Raises:
        InvalidInput: something else is given that says how to prune, or `prune_recipe` refuses.
    """
    _check("--recipe", model or "reference", beside, options["out"])
    from evoprune.recipe_file import read_recipe
    from evoprune.recipes import prune_recipe

    stored = read_recipe(recipe)
    done = prune_recipe(stored, model, progress=output.step, **options)
    if done.doubt is not None:
        output.tell(f"warning: {done.doubt}")
    _show(output, model or stored.recipe.model.name, done)


def of_recovery(done: Smaller) -> Iterator[str]:
    """Where the training of a recovery began, if not at the beginning; what was there before, if it was of no use."""
    if done.recovery is None:
        return
    training = done.recovery.done
    if training.discarded:
        yield "a recovery of something else had been interrupted here: its checkpoints are gone, this one began anew"
    if training.continued:
        yield f"the recovery went on from step {training.continued:,} of {training.steps:,}"


def _show(output: Output, model: str, done: Smaller) -> None:
    from evoprune.outcomes import CutModel
    from evoprune.search.tables import layers_table
    from evoprune.search.tables_structure import cut_view

    for remark in of_recovery(done):
        output.tell(remark)
    document = done.to_json()
    if output.as_json:
        output.json(document)
    else:
        words = ["evoprune", "eval", document["out"], "--dense", model]
        view = cut_view if isinstance(done, CutModel) else layers_table
        output.tell(view(document), f"try it: {shlex.join(words)}")
        output.line(document["out"])


def _check(option: str, model: str, beside: dict[str, Any], out: Path) -> None:
    """Refuse, before long work, what goes with no model that gets smaller."""
    from evoprune.fitness.pipelines import is_pipeline

    if given := [name for name, value in beside.items() if value not in (None, [])]:
        raise InvalidInput(f"{option} says by itself what goes: leave out {given[0]}")
    check_writable(out)
    if is_pipeline(model):
        raise InvalidInput(f"{option} does not go with a pipeline: give --sparsity")


def check_writable(folder: Path) -> None:
    """Refuse, before long work, a folder that cannot be made.

    Raises:
        InvalidInput: what is there is no folder, or not ours to write to.
    """
    existing = user_path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InvalidInput(f"cannot write {folder}: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise InvalidInput(f"cannot write {folder}: {existing} is read-only; give a folder that can be written")


def key_values(option: str, words: list[str], example: str) -> dict[str, str]:
    """Values by name from words KEY=VALUE.

    Raises:
        InvalidInput: a word has no name or no value, or a name comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not name or not equals or name in found:
            raise InvalidInput(f"{option} {word[:60]!r} is not KEY=VALUE with each KEY once, such as {example}")
        found[name] = value
    return found
