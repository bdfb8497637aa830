"""Mathematics: the answer is boxed and compared by value."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy.study.tables import PresetSource


class Math500Source(PresetSource):
    """MATH-500."""

    use: ClassVar[str] = "math-500"
    size: ClassVar[int | None] = 500

    id: str = "HuggingFaceH4/MATH-500"
    question: str = "problem"


class Gsm8kSource(PresetSource):
    """GSM8K."""

    use: ClassVar[str] = "gsm8k"
    size: ClassVar[int | None] = 1319

    id: str = "openai/gsm8k"
    config: str | None = "main"
    answer_after: str | None = "####"


class Aime2024Source(PresetSource):
    """AIME 2024, I and II."""

    use: ClassVar[str] = "aime-2024"
    size: ClassVar[int | None] = 30

    id: str = "HuggingFaceH4/aime_2024"
    split: str = "train"
    question: str = "problem"


class Aime2025Source(PresetSource):
    """AIME 2025, I and II, as MathArena has it."""

    use: ClassVar[str] = "aime-2025"
    size: ClassVar[int | None] = 30

    id: str = "MathArena/aime_2025"
    split: str = "train"
    question: str = "problem"


class Aime2026Source(PresetSource):
    """AIME 2026, I and II, as MathArena has it."""

    use: ClassVar[str] = "aime-2026"
    size: ClassVar[int | None] = 30

    id: str = "MathArena/aime_2026"
    split: str = "train"
    question: str = "problem"


class Hmmt2025Source(PresetSource):
    """HMMT of February and of November 2025, as MathArena has them."""

    use: ClassVar[str] = "hmmt-2025"
    size: ClassVar[int | None] = 60
    also: ClassVar[tuple[str, ...]] = ("MathArena/hmmt_nov_2025",)

    id: str = "MathArena/hmmt_feb_2025"
    split: str = "train"
    question: str = "problem"
