"""Windows of tokens from three disjoint texts: A for statistics, B for search fitness, C for the held-out report.

What is trained learns from A, or from what the embedded corpus holds beside the three.
"""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evoprune.fitness import corpus
from evoprune.fitness.documents import read_documents
from evoprune.metrics.errors import InvalidInput

SIDES = ("A", "B", "C")
CORPUS = "corpus"
TRAIN = "train"
# With fewer documents than this, three random heaps would differ too much in size and kind.
ENOUGH_DOCUMENTS = 30
# How far a cut may move to reach the end of a line.
CUT_SLACK = 2000
DOCUMENTS_PER_CALL = 32


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    side: str,
    *,
    window: int,
    count: int | None = None,
    seed: int | None = None,
    spare: int = 0,
) -> Tensor:
    """Non-overlapping windows of one side of a text, in which every document stands behind a separator.

    The separator is the tokenizer's BOS token, else its EOS token, else nothing; no other special token is added.

    Args:
        tokenizer: the model's.
        source: ``corpus`` (embedded), or a file, folder or data set as in `evoprune.fitness.documents`.
        side: A, B or C; of the corpus also ``train``.
        window: tokens in a window.
        count: how many windows; None takes all.
        seed: draws the windows without replacement, in random order; None takes the first ones in order.
        spare: so many windows more behind them, as far as the text has them.

    Returns:
        [count, window] int64, and up to `spare` windows more.

    Raises:
        InvalidInput: the source cannot be read, or is too short.
    """
    if window < 2:
        raise InvalidInput(f"window {window} is too short: its first token is not predicted, so give 2 or more")
    if count is not None and count < 1:
        raise InvalidInput(f"{count} windows of text are too few: give 1 or more")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise InvalidInput(f"seed {seed} cannot be: give a whole number from 0 to {(1 << 63) - 1}")
    enough = (count + spare) * window if count is not None and seed is None else None
    stream = token_stream(tokenizer, side_documents(source, side), enough)
    available, needed = len(stream) // window, 1 if count is None else count
    if available < needed:
        raise InvalidInput(
            f"text too short: side {side} of {source!r} has {len(stream)} tokens, {needed * window} are needed "
            f"({needed} windows of {window}); a side is about a third of a text"
        )
    windows = stream[: available * window].view(available, window)
    if seed is not None:
        windows = windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
    return windows[: None if count is None else count + spare].clone()


def training_side(source: str) -> str:
    """The side of a text that may be learned from: never one on which anything is measured."""
    return TRAIN if source == CORPUS else "A"


def side_documents(source: str, side: str) -> tuple[str, ...]:
    """The documents of one side.

    The embedded corpus has sides of its own, ``train`` among them. Any other source with at least 30 documents is
    split by a hash of each document, so that equal documents share a side. A source with fewer is cut into three
    contiguous parts of equal length, at line ends where possible. The split depends on nothing but the text: neither
    on the tokenizer nor on the window, so texts stay disjoint whatever windows are taken from them.

    Raises:
        InvalidInput: no such side, or the source cannot be read.
    """
    if side not in SIDES and (side, source) != (TRAIN, CORPUS):
        raise InvalidInput(f"no side {side!r} of a text; the sides are {', '.join(SIDES)}")
    if source == CORPUS:
        return corpus.read_side(side)
    documents = read_documents(source)
    if len(documents) >= ENOUGH_DOCUMENTS:
        return tuple(document for document in documents if _drawn_side(document) == side)
    third = sum(map(len, documents)) // 3
    first, rest = _cut(documents, third)
    second, last = _cut(rest, third)
    part = {"A": first, "B": second, "C": last}[side]
    return tuple(document for document in part if document.strip())


def source_hash(source: str, side: str) -> str:
    """sha256 over the documents of one side, in hex: part of a run's identity.

    Raises:
        InvalidInput: as `side_documents`.
    """
    digest = sha256()
    for document in side_documents(source, side):
        digest.update(sha256(document.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: tuple[str, ...], enough: int | None = None) -> Tensor:
    """All documents as one [tokens] int64 stream, each behind the separator; may stop once it has `enough` tokens."""
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    behind = [] if separator is None else [separator]
    parts: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    length = 0
    for first in range(0, len(documents), DOCUMENTS_PER_CALL):
        if enough is not None and length >= enough:
            break
        chunk = list(documents[first : first + DOCUMENTS_PER_CALL])
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(torch.tensor([*behind, *ids], dtype=torch.int64))
            length += len(parts[-1])
    return torch.cat(parts)


def _drawn_side(document: str) -> str:
    return SIDES[sha256(document.encode(errors="surrogatepass")).digest()[0] % 3]


def _cut(documents: list[str], position: int) -> tuple[list[str], list[str]]:
    """Documents before and from a character position, one of them cut in two behind the next line end."""
    before: list[str] = []
    for index, document in enumerate(documents):
        if position < len(document):
            end = document.find("\n", position, position + CUT_SLACK)
            cut = position if end < 0 else end + 1
            return [*before, document[:cut]], [document[cut:], *documents[index + 1 :]]
        before.append(document)
        position -= len(document)
    return before, []
