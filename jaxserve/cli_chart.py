"""Line charts as SVG, for benchmarks. Knows numbers and names, not what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[float]]
"""Name -> one value for each x."""

_COLOURS = ("#4f46e5", "#0d9488", "#d97706", "#be123c", "#6d28d9")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 260, 62, 34, 44


def line_charts(charts: Mapping[str, Series], x_name: str, x: Sequence[float]) -> str:
    """The charts, one below the other, over the same x."""
    parts = [_chart(title, series, x_name, x, _HEIGHT * i) for i, (title, series) in enumerate(charts.items())]
    size = f'width="{_WIDTH}" height="{_HEIGHT * len(parts)}"'
    style = 'font-family="system-ui, sans-serif" font-size="11" fill="#333"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}><rect {size} fill="white"/>{"".join(parts)}</svg>\n'


def _chart(title: str, series: Series, x_name: str, x: Sequence[float], top: int) -> str:
    most = max((value for values in series.values() for value in values), default=0) or 1.0
    low, high = min(x), max(x)
    right, bottom = _WIDTH - 16, _HEIGHT - _BOTTOM

    def px(value: float) -> float:
        return _LEFT + (right - _LEFT) * ((value - low) / (high - low) if high > low else 0.5)

    def py(value: float) -> float:
        return bottom - (bottom - _TOP) * value / most

    parts = [f'<text x="{_LEFT}" y="18" font-size="13" font-weight="600">{escape(title)}</text>']
    for tick in range(5):
        y = py(most * tick / 4)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * tick / 4:.3g}</text>')
    for value in x:
        parts.append(f'<text x="{px(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>')
    for i, (name, values) in enumerate(series.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="3" fill="{colour}"/>' for a, b in zip(x, values, strict=True)]
        parts.append(
            f'<text x="{right - 70 * (len(series) - i) + 70}" y="18" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
    return f'<g transform="translate(0 {top})">{"".join(parts)}</g>'
