"""Codes of classes in coding schemes such as SNOMED CT and RadLex, which a site provides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from camserve.answers import Prediction
from camserve.errors import InvalidArgument

__all__ = ["ClassCode", "find_code"]

# Coding Scheme Designators that are often written in another way (PS3.16 8.2).
_DESIGNATORS = {
    "SNOMED": "SCT",
    "SNOMED-CT": "SCT",
    "SNOMED CT": "SCT",
    "SNOMEDCT": "SCT",
    "LOINC": "LN",
    "RID": "RADLEX",
}
# Tables of the Verhoeff algorithm, which gives the last digit of SNOMED CT identifiers: the dihedral group of order 10,
# and the powers of the permutation.
_PRODUCT = [[(i + j) % 5 if j < 5 else (i + j) % 5 + 5 for j in range(10)] for i in range(5)]
_PRODUCT += [[(i - j) % 5 + 5 if j < 5 else (i - j) % 5 for j in range(10)] for i in range(5, 10)]
_PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


@dataclass(frozen=True)
class ClassCode:
    """The code of a class.

    Attributes:
        target: Label or index of the class.
        code: Code Value, such as "60046008".
        scheme: Coding Scheme Designator (PS3.16 8.2), such as "SCT" or "RADLEX".
        meaning: Code Meaning, at most 64 characters.
        version: Coding Scheme Version. Empty for schemes without one.
        model: Name of the model; None for all models.

    Raises:
        InvalidArgument: If an attribute is invalid.
    """

    target: str | int
    code: str
    scheme: str
    meaning: str
    version: str = ""
    model: str | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        if expected := _DESIGNATORS.get(self.scheme.upper()) or (
            self.scheme.upper() if self.scheme != self.scheme.upper() else None
        ):
            raise InvalidArgument(f"is {self.scheme!r}; expected the designator {expected}", field="scheme")
        if not re.fullmatch(r"[0-9A-Z][0-9A-Z._-]{0,15}", self.scheme) or self.scheme == "99CAMSERVE":
            raise InvalidArgument(
                f"is {self.scheme!r}; expected a Coding Scheme Designator such as SCT or RADLEX", field="scheme"
            )
        if not re.fullmatch(r"[!-\[\]-~]{1,64}", self.code):
            raise InvalidArgument(
                f"is {self.code!r}; expected 1 to 64 characters without spaces and backslashes", field="code"
            )
        if self.scheme == "SCT" and not _is_snomed_identifier(self.code):
            raise InvalidArgument(
                f"is {self.code!r}, which is not an identifier of SNOMED CT: it has 6 to 18 digits, and the last is a "
                "check digit; look for a typing error",
                field="code",
            )
        if self.scheme == "RADLEX" and not re.fullmatch(r"RID\d+", self.code):
            raise InvalidArgument(f"is {self.code!r}; expected an identifier of RadLex, RID and a number", field="code")
        for name, text, least in (("meaning", self.meaning, 1), ("version", self.version, 0)):
            longest = 64 if name == "meaning" else 16
            if not (least <= len(text.strip()) and len(text) <= longest and text.isprintable() and "\\" not in text):
                raise InvalidArgument(
                    f"is {text!r}; expected {least} to {longest} printable characters without backslashes", field=name
                )


def _is_snomed_identifier(code: str) -> bool:
    """Return True if a code is 6 to 18 digits with a valid Verhoeff check digit (SNOMED CT identifiers, 2.3)."""
    if not re.fullmatch(r"[1-9]\d{5,17}", code):
        return False
    check = 0
    for place, digit in enumerate(map(int, reversed(code))):
        permuted = digit
        for _ in range(place % 8):
            permuted = _PERMUTATION[permuted]
        check = _PRODUCT[check][permuted]
    return check == 0


def find_code(codes: Sequence[ClassCode], target: Prediction, model: str) -> ClassCode | None:
    """Return the first code of a class, or None.

    Args:
        codes: The codes of the site.
        target: The class.
        model: Name of the model.
    """
    matching = (each for each in codes if each.model in (None, model))
    return next((each for each in matching if each.target in (target.index, target.label or None)), None)
