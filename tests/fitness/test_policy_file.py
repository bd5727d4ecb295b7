"""Policies as files, and done to models: what zeros say is what masks and cuts say."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.fitness.adapters import rebind
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.mask_units import unit_table
from evoprune.fitness.masked_model import MaskedModel
from evoprune.fitness.maskers import ByMetrics, ByUnits, ByWeights, Masker
from evoprune.fitness.matrix_masks import MetricMasks
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.policy_file import (
    Calibration,
    apply_policy,
    from_json,
    policy_shape,
    read_policy,
    to_json,
    write_policy,
)
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from tests.models import random_windows, tiny_language_model
from tests.policies import policy_of
from tests.prepared import tiny_prepared

MASKERS: list[Masker] = [
    ByUnits(("kv-group", "neurons:20")),
    ByUnits(("query-head", "neuron")),
    ByUnits(("block",)),
    ByMetrics((2, 4), ("magnitude", "mul(W,W)", "wanda")),
    ByWeights((1, 4), "magnitude"),
]
TEXT = Calibration("corpus", 4, 16, 0, 1)


def logits(language_model: LanguageModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = language_model.model(input_ids=random_windows(2, 12), use_cache=False).logits
    return found


def biased(family: str) -> LanguageModel:
    language_model = tiny_language_model(family)
    for name, parameter in language_model.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    return language_model


@pytest.mark.parametrize("masker", MASKERS, ids=str)
def test_files_both_ways(masker: Masker, tmp_path: Path) -> None:
    policy = policy_of(tiny_language_model(), masker, calibration=TEXT)
    path = write_policy(policy, tmp_path / "policy.json")
    again = read_policy(path)
    assert np.array_equal(again.mask, policy.mask)
    assert policy.probabilities is not None
    assert np.array_equal(again.probabilities, policy.probabilities)
    assert (again.table, again.calibration, again.target, again.origin) == (
        policy.table,
        policy.calibration,
        policy.target,
        policy.origin,
    )
    assert to_json(again) == to_json(policy)
    assert path.read_text().count("\n") < 40 + len(policy.table.rows)
    silent = policy_of(tiny_language_model(), masker, calibration=TEXT, probabilities=None)
    assert from_json(json.loads(json.dumps(to_json(silent)))).probabilities is None


def test_a_person_can_read_it(tmp_path: Path) -> None:
    mask = np.array([True, False, True, True, False, True, True, False, False, False])
    policy = policy_of(tiny_language_model(), ByUnits(("kv-group", "neurons:20")), mask)
    rows = to_json(policy)["units"]
    assert [(row["name"], row["kind"], row["of"], row["kept"]) for row in rows] == [
        ("model.layers.0.self_attn", "kv-group", 2, "0"),
        ("model.layers.0.mlp", "neurons:20", 48, "0-1"),
        ("model.layers.1.self_attn", "kv-group", 2, "0-1"),
        ("model.layers.1.mlp", "neurons:20", 48, ""),
    ]
    assert all(len(str(value)) <= 8 for row in rows for value in row["keep"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "phi3"])
@pytest.mark.parametrize("kinds", [("kv-group", "neurons:7"), ("query-head", "neuron"), ("attention", "mlp")])
def test_zeros_say_what_hooks_say(family: str, kinds: tuple[str, ...]) -> None:
    language_model = biased(family)
    policy = policy_of(language_model, ByUnits(kinds))
    mask = policy.mask.copy()
    mask[policy.table.of_row(1)] = False
    policy = policy_of(language_model, ByUnits(kinds), mask)
    with MaskedModel(language_model, find_units(language_model), policy.table).kept(mask):
        expected = logits(language_model)
    layers = apply_policy(language_model, policy)
    assert torch.allclose(logits(language_model), expected, atol=1e-5)
    zeros = [int((bound.weight() == 0).sum()) for bound in language_model.sites]
    assert [layer.removed for layer in layers] == zeros
    assert [layer.name for layer in layers] == [bound.site.name for bound in language_model.sites]


def test_query_heads_of_which_no_shape_can_be_said() -> None:
    language_model = tiny_language_model()
    mask = np.ones(8, dtype=bool)
    mask[0] = False
    units = find_units(language_model)
    policy = policy_of(language_model, ByUnits(("query-head",)), mask)
    assert policy_shape(policy, units) is None
    mask = mask.copy()
    mask[2] = False
    shape = policy_shape(policy_of(language_model, ByUnits(("query-head",)), mask), units)
    assert shape is not None
    assert shape.blocks[0].heads == (1, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_choices_come_out_as_the_search_measured_them(family: str, tmp_path: Path) -> None:
    language_model = tiny_language_model(family)
    prepared = tiny_prepared(tmp_path / "prepared", language_model)
    masker = ByMetrics((2, 4), ("wanda", "magnitude", "ria"))
    policy = policy_of(language_model, masker, calibration=TEXT)
    other = deepcopy(language_model.model)
    copy = LanguageModel(
        other, language_model.tokenizer, tuple(rebind(language_model.sites, other)), "copy", language_model.fingerprint
    )
    masks = MetricMasks(language_model, prepared.dense, policy.table, prepared.statistics())
    layers = apply_policy(copy, policy, prepared.statistics())
    with masks.kept(policy.mask):
        for bound, expected in zip(copy.sites, language_model.sites, strict=True):
            assert torch.equal(bound.weight(), expected.weight())
    assert [layer.sparsity for layer in layers] == [0.5] * len(layers)
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in layers)
    assert set(policy.choices.values()) <= set(masker.metrics)


def test_single_weights_are_masked() -> None:
    language_model = tiny_language_model()
    policy = policy_of(language_model, ByWeights((1, 4), "magnitude"))
    apply_policy(language_model, policy)
    kept = torch.cat([bound.weight().flatten() != 0 for bound in language_model.sites])
    assert np.array_equal(kept.numpy(), policy.mask)


def test_another_model_is_refused() -> None:
    policy = policy_of(tiny_language_model(), ByUnits(("neurons:20",)))
    with pytest.raises(InvalidInput, match="LlamaForCausalLM and not this GPT2LMHeadModel"):
        policy.check(tiny_language_model("gpt2"))
    with pytest.raises(InvalidInput, match=r"layers\.0\.mlp has 48 members .* has 40"):
        policy.check(tiny_language_model(intermediate_size=40))
    with pytest.raises(InvalidInput, match=r"has 2 kinds of units.* this one 3"):
        policy.check(tiny_language_model(num_hidden_layers=3))


def test_masks_that_read_statistics_say_from_what_text() -> None:
    masker = ByMetrics((2, 4), ("wanda", "magnitude"))
    language_model = tiny_language_model()
    by_metric = [np.tile([metric == 0, metric == 1], len(language_model.sites)) for metric in (0, 1)]
    with pytest.raises(InvalidInput, match=r"X_l2.*'calibration'"):
        policy_of(language_model, masker, by_metric[0])
    assert not policy_of(language_model, masker, by_metric[1]).needs
    assert policy_of(language_model, masker, by_metric[0], calibration=TEXT).needs == {"X_l2"}


def test_the_calibration_is_that_of_the_search() -> None:
    context = EvaluationContext(calibration="a.txt", calibration_sequences=3, calibration_window=9, seed=4, threads=2)
    assert Calibration.of(context) == Calibration("a.txt", 3, 9, 4, 2)


def test_probabilities_are_checked() -> None:
    for wrong in (np.full(2, 1.5), np.full(2, np.nan), np.full(3, 0.5)):
        with pytest.raises(InvalidInput, match="keep probabilities"):
            policy_of(tiny_language_model(), ByUnits(("mlp",)), probabilities=wrong)


ROW = {"kind": "mlp", "block": 0, "name": "model.layers.0.mlp", "of": 1, "size": 1, "cost": 4608, "kept": "0"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "evoprune-policy/2"}, "this version reads"),
        ({"hash": 3}, "'hash' must be text"),
        ({"hash": "00"}, "the file was changed"),
        ({"target": []}, "'target' must be an object"),
        ({"origin": None}, "'origin' must be an object"),
        ({"masker": {"kind": "units", "units": ["heads"]}}, "no kind of unit"),
        ({"dense": "many"}, "'dense'"),
        ({"quantity": None}, "'quantity'"),
        ({"calibration": {"text": "corpus"}}, "'calibration' must be null"),
        (
            {"calibration": {"text": "corpus", "sequences": 0, "window": 8, "seed": 0, "threads": 1}},
            "'sequences' of 'calibration'",
        ),
        ({"units": []}, "'units' must be a list"),
        ({"units": [1]}, "entry 1 of 'units'"),
        ({"units": [ROW | {"more": 1}]}, "entry 1 of 'units'"),
        ({"units": [ROW | {"of": 0}]}, "'of' of entry 1"),
        ({"units": [ROW | {"kept": 3}]}, "no 'kept'"),
        ({"units": [ROW | {"of": 1 << 40, "kept": "0"}]}, "no 'kept'"),
        ({"units": [ROW | {"kind": "block"}]}, "cannot have its units"),
        ({"more": 1}, "which no policy has"),
    ],
)
def test_a_wrong_field_is_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    document = to_json(policy_of(tiny_language_model(), ByUnits(("mlp",)))) | change
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=said) as caught:
        read_policy(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "units", "hash", "calibration"])
def test_a_missing_field_is_named(key: str) -> None:
    document = to_json(policy_of(tiny_language_model(), ByUnits(("mlp",))))
    del document[key]
    with pytest.raises(InvalidInput, match=f"no '{key}'"):
        from_json(document)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"kept": "0-9"}, "'kept' of model.layers.0.mlp"),
        ({"kept": "a"}, "'kept' of model.layers.0.mlp"),
        ({"keep": [2]}, "probabilities"),
        ({"keep": [True]}, "probabilities"),
        ({"keep": [0.1, 0.2]}, "probabilities"),
    ],
)
def test_a_wrong_mask_is_one_line(row: dict[str, Any], said: str) -> None:
    document = to_json(policy_of(tiny_language_model(), ByUnits(("mlp",))))
    document["units"][0] |= row
    with pytest.raises(InvalidInput, match=said):
        from_json(document)


@pytest.mark.parametrize(("kept", "said"), [("zz", "no hex"), ("ff", "8 bits"), ("ff" * 128, "keeps 4 units")])
def test_wrong_bits_are_one_line(kept: str, said: str) -> None:
    document = to_json(policy_of(tiny_language_model(), ByWeights((1, 4), "magnitude"), probabilities=None))
    document["units"][0]["kept"] = kept
    with pytest.raises(InvalidInput, match=said):
        from_json(document)


@pytest.mark.parametrize("text", ["[]", "{", "NaN", '{"format": "evoprune-shape/1"}'])
def test_what_is_no_policy_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=r"'other\.json'"):
        read_policy(path)
    with pytest.raises(InvalidInput, match="no file"):
        read_policy(tmp_path / "nowhere.json")


def test_the_summary_names_units_and_counts_them() -> None:
    policy = policy_of(tiny_language_model(), ByUnits(("mlp",)), np.array([False, True]))
    summary = policy.summary()
    assert summary["hash"] == unit_table(tiny_language_model(), ByUnits(("mlp",))).hash
    assert (summary["units"], summary["kept"]) == (2, 1)
