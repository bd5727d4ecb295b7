"""From what the user typed to a folder with a model in it: the embedded model, a local folder, a Hub id."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.errors import RevisionNotFoundError as NoSuchRevision
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import file_hash, user_path

REFERENCE = Path(__file__).parent / "reference"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
DESCRIPTIONS = ["*.json", "*.model", "*.txt", "*.jinja"]
# Some repositories hold the same weights a second time, in another layout.
DUPLICATES = ["consolidated*", "*/*"]
# What says that a folder holds a pipeline of diffusers, and not a model.
PIPELINE_INDEX = "model_index.json"
# How a model that reads images wants them: copied as they are, since not every processor can be built everywhere.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers and the Hub client from writing to the terminal inside the block."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
        hub_logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            hub_logger.setLevel(hub_level)
            if bars:
                transformers_logging.enable_progress_bar()
            if hub_bars:
                enable_progress_bars()


def model_folder(name: str, *, revision: str | None, trust_remote_code: bool, weights: bool) -> Path:
    """The folder that holds the model `name`.

    A Hub model is downloaded into the Hub client's own cache; without a network a copy that is there is used.

    Args:
        name: ``reference``, a local folder or a Hub id; the embedded model wins over a folder of that name.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: fetch the model's own Python files too.
        weights: fetch the weights too; the descriptions alone are enough to refuse a model.

    Raises:
        InvalidInput: there is no such model, or it cannot be reached.
    """
    if name == "reference":
        return REFERENCE
    folder = user_path(name)
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise InvalidInput(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    if name[:1] in (".", "/", "~") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InvalidInput(f"no model {name[:200]!r}: it is neither a folder nor a Hub id such as Qwen/Qwen3-0.6B")
    patterns = DESCRIPTIONS + (["*.safetensors"] if weights else []) + (["*.py"] if trust_remote_code else [])
    try:
        with silence():
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=DUPLICATES))
    except GatedRepoError:
        raise InvalidInput(
            f"model {name!r} is gated: accept its terms on the Hub and log in with `hf auth login`"
        ) from None
    except NoSuchRevision:
        raise InvalidInput(f"model {name!r} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise InvalidInput(f"no model {name!r}: there is no such folder and no such public model on the Hub") from None
    except LocalEntryNotFoundError:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise InvalidInput(
            f"no model {name!r}: there is no such folder, {reason}, and no downloaded copy was found"
        ) from None
    except Exception as error:  # the client's own errors, those of its HTTP library and of the disk
        raise InvalidInput(f"model {name!r} cannot be downloaded: {one_line(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in `folder`, sorted by name.

    Raises:
        InvalidInput: there are none, the index is damaged, or a file that it lists is missing.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidInput(f"{index} is damaged: it is no JSON object with a weight_map") from None
        for name in names:
            if not (isinstance(name, str) and Path(name).name == name and (folder / name).is_file()):
                raise InvalidInput(f"{folder} is incomplete: {name!r}, which {index.name} lists, is missing")
        return [folder / name for name in names]
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise InvalidInput(
            f"{folder} has its weights as a pickle only, which evoprune does not open: load it once with transformers "
            f"where you trust it and call save_pretrained(), which writes model.safetensors"
        )
    raise InvalidInput(f"{folder} has no model.safetensors: save the model there with save_pretrained()")


def fingerprint(folder: Path) -> str:
    """sha256 over the content of config.json and of the weight files, in hex: the same for every copy of a model."""
    digest = sha256()
    for path in [folder / "config.json", *weight_files(folder)]:
        facts = path.stat()
        digest.update(f"{path.name}:{_hash_once(path.resolve(), facts.st_size, facts.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@cache
def _hash_once(path: Path, size: int, modified: int) -> str:
    """`file_hash`, computed again in this process only when the file's size or time changed."""
    return file_hash(path)


def copy_processor(folder: Path | None, out: Path) -> None:
    """Bring along what `AutoProcessor` and `AutoImageProcessor` read, if the model came with it."""
    for name in PROCESSOR_FILES:
        if folder is not None and (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def one_line(error: BaseException) -> str:
    """What an error of a library says, on one line of at most 200 characters, for use inside one of ours."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:197]}..."
