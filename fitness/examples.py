"""The user's texts, and images with texts: split into sides, and encoded as the model reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoProcessor

from evoprune.fitness.hub import one_line, silence
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.text import ENOUGH_DOCUMENTS, SIDES, token_windows
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import file_hash, user_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Of a folder of images, what says which text belongs to which, as in a Hugging Face `imagefolder`.
METADATA = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class Example:
    """An image with its text, or text alone.

    Attributes:
        image: the file; None for text alone.
        text: what is said of it, without a placeholder unless the user put one there.
    """

    image: Path | None
    text: str


def holds_images(source: str) -> bool:
    """Whether a source is one of images with texts: rows that name an image, or a folder with images in it."""
    path = user_path(source)
    try:
        if path.is_dir():
            return (path / METADATA).is_file() or any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())
        if path.suffix.lower() != ".jsonl" or not path.is_file():
            return False
        with path.open(encoding="utf-8") as stream:
            first = json.loads(next((line for line in stream if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "image" in first


def reads_images(language_model: LanguageModel, source: str) -> bool:
    """Whether a model is run on the images of a source, rather than on windows of its text."""
    return language_model.multimodal and holds_images(source)


def read_examples(source: str) -> list[Example]:
    """The examples of a source, in a fixed order.

    Args:
        source: JSON lines ``{"image": path, "text": ...}``, paths being relative to the file and null for text alone;
            or a folder, with such lines in ``metadata.jsonl`` (``file_name`` for ``image`` is understood) or with a
            ``.txt`` beside each image.

    Raises:
        InvalidInput: a line, an image or a text is missing or not readable; names it.
    """
    path = user_path(source)
    try:
        if path.is_dir() and not (path / METADATA).is_file():
            return _folder(path)
        file = path / METADATA if path.is_dir() else path
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    examples = [_row(line, f"line {number} of {file}", file) for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise InvalidInput(f"{source} holds no example: give lines such as " + '{"image": "cat.png", "text": "A cat."}')
    return examples


def side_examples(examples: Sequence[Example], side: str) -> list[Example]:
    """The examples of one side: A for statistics, B for search, C for the report.

    At least 30 are split by a hash of each, so that equal ones share a side; fewer are cut into thirds in order.

    Raises:
        InvalidInput: no such side, or it holds no example.
    """
    if side not in SIDES:
        raise InvalidInput(f"no side {side!r} of a text; the sides are {', '.join(SIDES)}")
    n = len(examples)
    if n >= ENOUGH_DOCUMENTS:
        found = [example for example in examples if SIDES[_digest(example) % 3] == side]
    else:
        place = SIDES.index(side)
        found = list(examples[-(-n * place // 3) : -(-n * (place + 1) // 3)])
    if not found:
        raise InvalidInput(f"{n} examples are too few for side {side}: give three or more, a third goes to each side")
    return found


def read_side(
    language_model: LanguageModel,
    source: str,
    side: str,
    *,
    window: int,
    count: int | None,
    seed: int | None = None,
    spare: int = 0,
) -> Sequences:
    """One side of a source as a model is run on it: windows of text (`token_windows`), or images with texts.

    Of images with texts there may be fewer than `count`.

    Raises:
        InvalidInput: the source cannot be read, is too short, or does not fit the model.
    """
    if reads_images(language_model, source):
        wanted = None if count is None else count + spare
        return encode_examples(language_model, source, side, count=wanted, seed=seed)
    tokenizer = language_model.tokenizer
    return token_windows(tokenizer, source, side, window=window, count=count, seed=seed, spare=spare)


def encode_examples(
    language_model: LanguageModel, source: str, side: str, *, count: int | None = None, seed: int | None = None
) -> Samples:
    """Examples of one side of a source, as the model's processor encodes them, each a batch of its own.

    Args:
        count: how many at most; None takes all.
        seed: draws them, in random order; None takes the first ones in order.

    Raises:
        InvalidInput: the source or an image cannot be read, the model reads no images or has no processor, or an
            example is longer than its context.
    """
    if count is not None and count < 1:
        raise InvalidInput(f"{count} examples are too few: give 1 or more")
    examples = side_examples(read_examples(source), side)
    order = torch.arange(len(examples))
    if seed is not None:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    processor = load_processor(language_model)
    encoded = [_encoded(processor, examples[index]) for index in order[:count].tolist()]
    samples = Samples(encoded, language_model.model.config)
    language_model.check_window(samples.longest)
    return samples


def load_processor(language_model: LanguageModel) -> Any:
    """What turns images and text into the arguments of the model's forward.

    Raises:
        InvalidInput: the model reads text only, or its folder has no processor that can be built here.
    """
    if not language_model.multimodal:
        raise InvalidInput(f"model {language_model.name!r} reads no images: calibrate on text")
    if language_model.folder is None:
        raise InvalidInput(f"model {language_model.name!r} was not loaded from a folder: encode samples yourself")
    try:
        with silence():
            return AutoProcessor.from_pretrained(language_model.folder)
    except Exception as error:  # whatever transformers makes of files that a stranger wrote
        # Without it transformers builds some processors and not others, such as those that read videos too.
        hint = "" if find_spec("torchvision") else "; it may need torchvision: pip install torchvision"
        raise InvalidInput(
            f"the processor of {language_model.name!r} cannot be read{hint}: {one_line(error)}"
        ) from error


def _encoded(processor: Any, example: Example) -> dict[str, torch.Tensor]:
    prompt = _prompt(processor, example)
    images = None if example.image is None else open_image(example.image)
    try:
        with silence():
            found = processor(text=[prompt], images=images, return_tensors="pt")
    except Exception as error:  # such as a text with two placeholders and one image
        raise InvalidInput(f"the example {str(example.image or example.text)[:80]!r}: {one_line(error)}") from error
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def open_image(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise InvalidInput(f"{path} is no image that can be read: give {', '.join(IMAGE_SUFFIXES)}") from None


def _prompt(processor: Any, example: Example) -> str:
    """The text with a placeholder for the image, as the model's chat template writes it, if it has one."""
    token = getattr(processor, "image_token", None)
    if example.image is None or (token and token in example.text):
        return example.text
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": example.text}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    if not token:
        raise InvalidInput(f"{type(processor).__name__} names no placeholder for images: put it into each text")
    return f"{token}\n{example.text}"


def _row(line: str, where: str, file: Path) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InvalidInput(f"{where} is no JSON object with a text: " + 'give {"image": "cat.png", "text": "A cat."}')
    name = row.get("image", row.get("file_name"))
    if name is not None and not isinstance(name, str):
        raise InvalidInput(f"{where}: its image is {str(name)[:40]!r}, no path")
    image = None if name is None else file.parent / name
    if image is not None and not image.is_file():
        raise InvalidInput(f"{where}: no image {str(image)[:200]!r}")
    return Example(image, row["text"])


def _folder(folder: Path) -> list[Example]:
    images = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise InvalidInput(f"folder {folder} holds no image in {', '.join(IMAGE_SUFFIXES)} files")
    found = []
    for image in images:
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise InvalidInput(f"{image.name} in {folder} has no text: give {text.name}, or {METADATA} for all")
        found.append(Example(image, text.read_text(encoding="utf-8", errors="replace").strip()))
    return found


def _digest(example: Example) -> int:
    image = "" if example.image is None else file_hash(example.image)
    return sha256(f"{image}\n{example.text}".encode(errors="surrogatepass")).digest()[0]
