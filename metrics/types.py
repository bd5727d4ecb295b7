"""The four nominal types of the language: what a value varies with."""

from __future__ import annotations

from enum import Enum


class Type(Enum):
    """What a value varies with; the shape is [out or 1, in or 1].

    ``Scal`` is a subtype of ``InVec`` and ``OutVec``, and these of ``Mat``: a subtype broadcasts to its supertypes.
    """

    SCAL = (False, False)
    INVEC = (False, True)
    OUTVEC = (True, False)
    MAT = (True, True)

    @property
    def varies_with_row(self) -> bool:
        return self.value[0]

    @property
    def varies_with_column(self) -> bool:
        return self.value[1]

    @property
    def label(self) -> str:
        """The name used in documentation and messages."""
        return {"SCAL": "Scal", "INVEC": "InVec", "OUTVEC": "OutVec", "MAT": "Mat"}[self.name]

    def join(self, other: Type) -> Type:
        """The least type that both broadcast to."""
        return Type((self.value[0] or other.value[0], self.value[1] or other.value[1]))

    def fits(self, slot: Type) -> bool:
        """Whether a value of this type may stand where `slot` is expected."""
        return self.join(slot) is slot

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The shape of a value of this type in a matrix of the given size."""
        return (out_features if self.value[0] else 1, in_features if self.value[1] else 1)


# What is known of a value's sign: the subset of {-1, 0, 1} that it may take, in real arithmetic.
Sign = frozenset[int]
ANY: Sign = frozenset({-1, 0, 1})
NONNEGATIVE: Sign = frozenset({0, 1})
POSITIVE: Sign = frozenset({1})
ZERO: Sign = frozenset({0})
