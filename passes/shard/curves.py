"""Measured curves: times at a few sizes, read between and beyond them.

A `Curve` is ((bytes, seconds), ...) with ascending bytes. Cluster files that `aicc calibrate` writes have them for collectives and for
element-wise kernels; where there is one, it is taken instead of the formula.
"""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["Curve", "curve_seconds", "rising"]

Curve = tuple[tuple[float, float], ...]


def curve_seconds(curve: Curve, nbytes: float) -> float:
    """Seconds at `nbytes`: linear between samples; beyond the last one at the rate between the last two; below the first one its time."""
    if nbytes <= curve[0][0]:
        return curve[0][1]
    i = min(max(1, bisect_left(curve, (nbytes,))), len(curve) - 1)
    (a, t), (b, u) = curve[i - 1], curve[i]
    return t + (u - t) * (nbytes - a) / (b - a)


def rising(curve: Curve) -> Curve:
    """The curve with no time below that of a smaller message: disturbed samples are pulled to the mean of those they contradict."""
    blocks: list[tuple[float, int]] = []
    for _, seconds in curve:
        blocks.append((seconds, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:  # pool adjacent violators
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    pooled = [s for s, n in blocks for _ in range(n)]
    return tuple((size, s) for (size, _), s in zip(curve, pooled, strict=True))
