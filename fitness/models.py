"""Loading a model that writes text: safetensors only, no code of others unless the user says so, nothing printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from evoprune.fitness.adapters import SiteModule, auto_class, decoder_blocks, is_multimodal, list_sites
from evoprune.fitness.compact import compact_config, is_compact, load_compact
from evoprune.fitness.hub import (
    PIPELINE_INDEX,
    copy_processor,
    fingerprint,
    model_folder,
    one_line,
    silence,
    weight_files,
)
from evoprune.fitness.modular import is_modular, load_modular, modular_config
from evoprune.metrics.errors import InvalidInput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class LanguageModel:
    """A model ready for pruning.

    Attributes:
        model: in eval mode, no parameter asks for gradients.
        tokenizer: the one saved beside the weights.
        sites: prunable matrices in model order, bound to `model`.
        name: what the user typed: ``reference``, a folder, a Hub id.
        fingerprint: sha256 over config and weights as stored; a part of a run's identity. The dtype is not in it.
        stored_dtype: dtype of the weights in the files; `model` may compute in another.
        components: whose matrices are in `sites`, as in `evoprune.fitness.adapters.list_sites`; None is the language
            model alone.
        folder: where its files are; None if it was never in a folder.
        cut: its blocks have widths of their own, which no class of transformers builds.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: tuple[SiteModule, ...]
    name: str
    fingerprint: str
    stored_dtype: torch.dtype | None = None
    components: tuple[str, ...] | None = None
    folder: Path | None = None
    cut: bool = False

    @property
    def multimodal(self) -> bool:
        """Whether it reads more than text."""
        return is_multimodal(self.model.config)

    @property
    def auto(self) -> Any:
        """The class in transformers that loads it."""
        return auto_class(self.model.config)

    def save_readers(self, folder: Path) -> None:
        """Write what turns text, and images if it reads any, into its inputs."""
        self.tokenizer.save_pretrained(folder)
        if self.multimodal:
            copy_processor(self.folder, folder)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().get_parameter("weight").device

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """(module path, block) of each block with sites, in model order."""
        return decoder_blocks(self.model, self.components)

    @property
    def context(self) -> int | None:
        """The longest window the model can read, or None where positions are not bounded."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def check_window(self, window: int) -> None:
        """Refuse windows that the model cannot read.

        Raises:
            InvalidInput: `window` is longer than `context`.
        """
        if self.context is not None and window > self.context:
            raise InvalidInput(f"window {window} is too long: model {self.name!r} reads at most {self.context} tokens")


def load_model(
    name: str = "reference",
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    components: str | Sequence[str] | None = None,
) -> LanguageModel:
    """Load a language model, one that also reads images included, with its tokenizer, and list its prunable sites.

    A checkpoint of evoprune with modules of its own, such as wrappers and thresholds, is loaded with the code of this
    package: nothing in the folder is run or unpickled.

    Args:
        name: ``reference`` (the embedded model), a local folder, or a Hub id.
        dtype: float32, bfloat16 or float16; ``auto`` is float32 on a CPU and bfloat16 elsewhere.
        device: such as ``cpu`` or ``cuda:1``; ``auto`` is the first CUDA device, else the CPU.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run the model's own Python files; nothing else sets this.
        device_map: spreads a large model over several GPUs, as in transformers; needs accelerate, replaces `device`.
        components: the parts whose matrices shall be prunable, as names or as text with commas between them:
            ``language_model`` (the default), ``vision_tower``, ``projector``, or ``all``.

    Raises:
        InvalidInput: no such model or component, not readable, weights not in safetensors, family or device not
            supported.
    """
    parts = named_components(components)
    target = device_of(device)
    chosen = dtype_of(dtype, target)
    if device_map is not None and find_spec("accelerate") is None:
        raise InvalidInput("device_map needs accelerate: pip install accelerate")
    folder, config = check_model(name, revision=revision, trust_remote_code=trust_remote_code, components=parts)
    tokenizer = read_tokenizer(folder, config, trust_remote_code)
    model = _weights(folder, config, trust_remote_code, chosen, device_map)
    check_vocabulary(folder, tokenizer, model)
    if device_map is None:
        try:
            model.to(target)  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            raise InvalidInput(f"model {name!r} does not fit on {target}: {one_line(error)}") from error
    elif any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInput(f"model {name!r} does not fit on the devices of device_map: part of it went to the disk")
    check_weights(model, folder)
    model.eval().requires_grad_(False)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
    sites = tuple(list_sites(model, parts))
    cut = is_compact(config_facts(folder))
    return LanguageModel(model, tokenizer, sites, name, fingerprint(folder), stored, parts, folder, cut)


def check_weights(model: nn.Module, folder: Path) -> None:
    """Refuse a model with a parameter that is not finite.

    Raises:
        InvalidInput: names it, and the folder that it is from.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(bound.isfinite() for bound in parameter.aminmax()):  # of a NaN both are NaN
            raise InvalidInput(f"the weights in {folder} are damaged: {name} holds a NaN or an infinity")


def refuse_cut(language_model: LanguageModel) -> None:
    """Refuse a model whose blocks have widths of their own already.

    Raises:
        InvalidInput: it is one.
    """
    if language_model.cut:
        raise InvalidInput(f"model {language_model.name!r} is cut already: give the dense model")


def named_components(components: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of components from text such as ``language_model,vision_tower``; None stays None."""
    if components is None:
        return None
    words = components.split(",") if isinstance(components, str) else components
    return tuple(word.strip() for word in words if word.strip())


def check_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    components: Sequence[str] | None = None,
) -> tuple[Path, PreTrainedConfig]:
    """(local folder with the weights, config) of a model that `load_model` can load, without loading it.

    Raises:
        InvalidInput: no such model, no config, a family that is not supported, no such component, no tokenizer, or no
            whole safetensors.
    """
    folder = model_folder(name, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    config = _config(folder, trust_remote_code)
    _refuse_unsupported(name, config, trust_remote_code, components)
    _check_tokenizer_files(folder, trust_remote_code)
    folder = model_folder(name, revision=revision, trust_remote_code=trust_remote_code, weights=True)
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):  # reads what the file says of itself, and compares its length
                pass
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"the weights in {folder} cannot be read: {file.name}: {one_line(error)}") from error
    return folder, config


def device_of(device: str) -> torch.device:
    """The device that a user means; ``auto`` is the first CUDA device, else the CPU.

    Raises:
        InvalidInput: there is none of this name here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InvalidInput(f"no device {device[:80]!r}: give auto, cpu, cuda or cuda:1") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"no device {device!r}: this machine shows {torch.cuda.device_count()} CUDA devices")
    return target


def dtype_of(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a user means; ``auto`` is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        InvalidInput: no model computes in it.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise InvalidInput(f"no dtype {dtype[:80]!r}: give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def config_facts(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        InvalidInput: there is none, it is damaged, or the folder holds a pipeline.
    """
    file = folder / "config.json"
    if (folder / PIPELINE_INDEX).is_file():
        raise InvalidInput(
            f"{folder} is a pipeline of diffusers, which `evoprune prune` alone takes: --budget searched finds what "
            "each of its components should lose"
        )
    if not file.is_file():
        raise InvalidInput(f"{folder} has no config.json: give a folder that save_pretrained() wrote")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise InvalidInput(f"{file} is damaged: it holds no JSON object")
    return facts


def _config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a folder; that of the model it was made of where the folder holds a compact or modular form."""
    file = folder / "config.json"
    facts = config_facts(folder)
    compact, modular = is_compact(facts), is_modular(facts)
    family = facts.get("model_type")
    known = compact or modular or (isinstance(family, str) and family in CONFIG_MAPPING)
    if not known and "auto_map" not in facts:
        raise InvalidInput(f"{folder}: transformers {version('transformers')} knows no model family {family!r:.80}")
    if not known and not trust_remote_code:
        raise InvalidInput(f"{folder} needs its own Python code: pass --trust-remote-code if you trust its author")
    if facts.get("quantization_config"):
        raise InvalidInput(f"{folder} is quantised: prune the original model and quantise the result")
    try:
        with silence():
            if compact:
                return compact_config(facts)
            if modular:
                return modular_config(facts)
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers makes of a config that a stranger wrote
        raise InvalidInput(f"{file} cannot be read: {one_line(error)}") from error


def _refuse_unsupported(
    name: str, config: PreTrainedConfig, trust_remote_code: bool, components: Sequence[str] | None
) -> None:
    """Build the model without memory for its weights, to refuse a family before its weights are fetched or read."""
    try:
        with silence(), torch.device("meta"):
            empty = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InvalidInput(
            f"model {name!r} of family {config.model_type!r} is no causal language model: {one_line(error)}"
        ) from error
    list_sites(empty, components)


def _check_tokenizer_files(folder: Path, trust_remote_code: bool) -> None:
    # Without any of these files transformers would build an empty tokenizer for some families.
    if not trust_remote_code and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise InvalidInput(f"{folder} has no tokenizer: copy tokenizer.json there from the original model")


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer with tokens that the model's embeddings do not have.

    Raises:
        InvalidInput: it is one.
    """
    known = model.get_input_embeddings().get_parameter("weight").shape[0]
    if tokenizer.vocab_size > known:
        raise InvalidInput(
            f"the tokenizer in {folder} knows {tokenizer.vocab_size} tokens, the model only {known}: "
            f"they do not belong together"
        )


def read_tokenizer(folder: Path, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        with silence():
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InvalidInput(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error


def _weights(
    folder: Path,
    config: PreTrainedConfig,
    trust_remote_code: bool,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None,
) -> PreTrainedModel:
    facts = config_facts(folder)

    def load(attention: str) -> Any:
        options: dict[str, Any] = {
            "dtype": dtype,
            "device_map": device_map,
            "attn_implementation": attention,
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,  # they are refused below, by name
            "output_loading_info": True,
        }
        if is_compact(facts):
            return load_compact(folder, **options)
        if is_modular(facts):
            return load_modular(folder, **options)
        return auto_class(config).from_pretrained(folder, trust_remote_code=trust_remote_code, **options)

    try:
        with silence():
            try:
                model, info = load("sdpa")
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                model, info = load("eager")  # Gemma 2 caps attention logits, which the fused kernel cannot
    except Exception as error:
        raise InvalidInput(f"the weights in {folder} cannot be read: {one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(f"the weights in {folder} are incomplete: {len(missing)} are missing, such as {missing[0]}")
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    if mismatched:
        raise InvalidInput(f"the weights in {folder} do not fit its config.json: {mismatched[0]} has another shape")
    return model
