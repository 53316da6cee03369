"""What a measure is called and how it is read, and the figure that is not there."""

from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class MetricInfo:
    """A measure, for tables.

    Args:
        name: key in files, and what a user asks for.
        title: head of a column.
        better: best "higher", "lower", at "zero" (a signed figure) or at "one" (a ratio).
        unit: "dB", "1/255", or "" for none.
        digits: after the point.
        smallest: px; shorter sides give NaN.
    """

    name: str
    title: str
    better: Literal["higher", "lower", "zero", "one"]
    unit: str = ""
    digits: int = 2
    smallest: int = 1

    def badness(self, value: float) -> float:
        """The same for all measures: the smaller, the better."""
        return {"higher": -value, "lower": value, "zero": abs(value), "one": abs(value - 1)}[self.better]


class Missing(float):
    """NaN that says why: what a measure returns where there is nothing to measure, so that a table has a gap and not a guess.

    `reason` is lost by arithmetic and by copies to arrays; read it before.
    """

    reason: str

    def __new__(cls, reason: str) -> Self:
        value = super().__new__(cls, "nan")
        value.reason = reason
        return value

    def __reduce__(self) -> tuple[type["Missing"], tuple[str]]:
        return type(self), (self.reason,)
