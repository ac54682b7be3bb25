"""How many examples a property test tries."""

from __future__ import annotations

from hypothesis import settings


def examples(num: int, **options: object) -> settings:
    """`num` of them where the profile has its usual hundred, and in proportion elsewhere."""
    scaled = max(num * settings.default.max_examples // 100, 1)
    return settings(max_examples=scaled, **options)  # type: ignore[arg-type]
