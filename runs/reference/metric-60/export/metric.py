"""found by evoprune on reference at 0.6

score = |W|·(‖G‖₂^0.0466667 + 9.09091·‖X‖₂^-0.02)·‖G‖₂^0.62   (compared within each row, lowest removed first)
Use: keep = mask(layer.weight, X_l2=X_l2, G_l2=G_l2). Run this file to test it.
model: reference
fitness: kl 0.21832 on 49152 tokens
seed: 0
run: 20261126-062103-metric-9cb8
heldout_perplexity: {'winner': 33.9623, 'dense': 29.3843, 'wanda': 34.941, 'power': 33.9883}
source: evoprune run 20261126-062103-metric-9cb8
metric-json sha256: 6d7261f2b757f0732182f51b8d95bf9b7a37336d48fce4c33c7d255fbeb62a75
"""

import hashlib
import math
import sys

import torch
from torch import Tensor

FORMULA = (
    "mul(abs(W),mul(add(powc(G_l2,0.0466666666667),mul(9.09090909091,powc(X_l2,-0.02))),powc(G_l2,0.62)))"
)
REQUIRES = ("X_l2", "G_l2")
GROUP = "row"
FORMAT = "symbolic-metric/1"
SEAL = "3f51a4224f378bfdf815a13743c452286570b9d7d196b26f07c289933ca6d1d9"
BOUND = 1e30
TINY = 1e-30


def absolute(x: Tensor) -> Tensor:
    return x.abs()


def add(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).clamp_(-BOUND, BOUND)


def mul(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).clamp_(-BOUND, BOUND)


def powc(x: Tensor, exponent: float) -> Tensor:
    magnitude = x.abs()
    if exponent > 0:
        # Zero to a positive power is zero, not a power of the smallest magnitude.
        return magnitude.pow_(exponent).clamp_(max=BOUND)
    return magnitude.clamp_(min=TINY).pow_(exponent).clamp_(max=BOUND)


@torch.no_grad()
def score(W, *, X_l2, G_l2):
    """float32 [out, in], low = removed first; finite for finite inputs.

    W [out, in]: signed weight, of any float dtype.
    X_l2 [in] or [1, in]: l2 norm of x over a sequence: root of X_ss.
    G_l2 [out, in]: l2 norm over sequences of the loss gradient.
    """
    W = W.float().clamp(-BOUND, BOUND)
    abs_W = absolute(W)
    G_l2 = G_l2.float().clamp(-BOUND, BOUND)
    powc_G_l2 = powc(G_l2, 0.0466666666667)
    c1 = torch.full((1, 1), 9.09090909091, dtype=torch.float32, device=W.device)
    X_l2 = X_l2.float().reshape(1, -1).clamp(-BOUND, BOUND)
    powc_X_l2 = powc(X_l2, -0.02)
    mul_8 = mul(c1, powc_X_l2)
    add_9 = add(powc_G_l2, mul_8)
    powc_10 = powc(G_l2, 0.62)
    mul_11 = mul(add_9, powc_10)
    mul_12 = mul(abs_W, mul_11)
    return mul_12.expand(W.shape)


def removed_count(sparsity: float, total: int) -> int:
    """floor(sparsity * total) of the decimal that was written: 0.29 of 100 is 29."""
    digits, _, power = repr(float(sparsity)).partition("e")
    whole, _, fraction = digits.partition(".")
    return int(whole + fraction) * total // 10 ** (len(fraction) - int(power or 0))


def keep_largest(rows: Tensor, removed: int) -> Tensor:
    """True = keep: each row loses its `removed` lowest scores; ties lose the lower column first."""
    if not torch.isfinite(rows).all():
        raise ValueError("a score is NaN or infinite")
    lowest = rows.argsort(dim=1, stable=True)[:, :removed]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False)


def mask(W, sparsity=0.6, nm=None, **stats):
    """True = keep, bool [out, in]: every row loses floor(sparsity * in) weights.

    With nm=(n, m) every m consecutive columns of a row keep n instead. Of equal scores the lower column goes first.
    The statistics are those of `score`.
    """
    scores = score(W, **stats)
    if nm is not None:
        kept, width = nm
        if not 0 < kept < width or W.shape[1] % width:
            raise ValueError(f"{kept}:{width} needs 0 < N < M and a number of inputs that M divides")
        return keep_largest(scores.reshape(-1, width), width - kept).reshape(W.shape)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")
    rows = scores
    return keep_largest(rows, removed_count(sparsity, rows.shape[1])).reshape(W.shape)


def draw(seed: int, rows: int, columns: int) -> Tensor:
    """Pseudo-random float32 numbers in [0, 1) with 24 bits, the same on every machine."""
    numbers = []
    for _ in range(rows * columns):
        seed = (1103515245 * seed + 12345) % 2**31
        numbers.append((seed >> 7) / 2**24)
    return torch.tensor(numbers, dtype=torch.float32).reshape(rows, columns)


def _selftest(source=None):
    """Whether this file still computes what it did when it was exported, and, given its own text, is unchanged."""
    W = 2 * draw(1, 8, 32) - 1
    stats = {
        "X_l2": draw(2, 1, 32),
        "G_l2": draw(3, 8, 32),
    }
    expected = [
        0.20367176830768585,
        1.0720171928405762,
        1.0013571977615356,
        2.108096122741699,
        2.327014923095703,
        3.626020669937134,
        3.5286097526550293,
        4.563614368438721,
    ]
    found = score(W, **stats).flatten()[::31][:8].tolist()
    slack = 1e-6 * max(map(abs, expected))
    kept = mask(W, sparsity=0.5, **stats).flatten().tolist()
    faults = []
    if not all(math.isclose(x, y, rel_tol=1e-5, abs_tol=slack) for x, y in zip(found, expected, strict=True)):
        faults.append("the scores are not those of the export")
    if hashlib.sha256(bytes(kept)).hexdigest() != "83582863e48d1c25d38a40c5dd4f094b9fe3988b996d092c522f2ea00fa5e8b3":
        faults.append("the mask is not that of the export")
    if source is not None and hashlib.sha256(source.replace(SEAL, "").encode()).hexdigest() != SEAL:
        faults.append("the file was edited after its export")
    print("self-test: " + ("; ".join(faults) or "passed"))
    return not faults


if __name__ == "__main__":
    with open(__file__, encoding="utf-8") as stream:
        sys.exit(0 if _selftest(stream.read()) else 1)
