"""Draws bench/results/h100/*.json beside vLLM and the floor, as bench/results/h100.svg. Usage: python bench/plot.py

A bar is our speed over vLLM's in that case: the last run of the file that has the case, with the options of its first run. A
mark is the floor's, where there is one: bytes over the copy bandwidth, or operations over the fastest matrix product.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
OUT = HERE / "results" / "h100.svg"
VLLM = HERE / "vllm_0.26_h100.json"
CASES = {
    "decode_b1": "decode, 1 request",
    "decode_b64": "decode, 64",
    "decode_b256": "decode, 256",
    "decode_b64_kv4096": "decode, 64 x 4,096 tokens",
    "prefill_16x4096": "prefill, 16 x 4,096",
    "mixed_1000": "1,000 mixed requests",
    "shared_prefix": "shared prefix, warm",
}
ROW, LEFT, UNIT, RIGHT, TOP = 17, 190, 150, 210, 30  # pixels; UNIT is the length of a speed of 1
OURS, BELOW, INK, FAINT = "#2a78b5", "#9db8cc", "#333333", "#999999"


@dataclass(frozen=True)
class Bar:
    """One case: speeds in units of vLLM's.

    Attributes:
        text: both figures with their unit.
    """

    name: str
    speed: float
    floor: float | None
    text: str


def bars_of(runs: list[dict[str, Any]], vllm: dict[str, Any]) -> Iterator[Bar]:
    for name, label in CASES.items():
        found = [run["cases"][name] for run in runs if run["options"] == runs[0]["options"] and name in run["cases"]]
        if not found:
            continue
        ours, theirs = found[-1], vllm[name]
        if "decode_ms_per_step" in ours:
            a, b, floor = ours["decode_ms_per_step"], theirs["vllm_ms_per_step"], theirs["floor_ms"]
            yield Bar(label, b / a, b / floor, f"{a:.2f} against {b:.2f} ms a step")
        elif "prompt_tok_s" in ours:
            a, b, ceiling = ours["prompt_tok_s"], theirs["vllm_prompt_tok_s"], theirs["ceiling_prompt_tok_s"]
            yield Bar(label, a / b, ceiling / b, f"{a:,.0f} against {b:,.0f} tokens/s")
        else:
            a, b = warm(ours), warm(theirs)
            yield Bar(label, a / b, None, f"{a:.1f} against {b:.1f} requests/s")


def warm(case: dict[str, Any]) -> float:
    """Requests a second; of a case with a cold and a warm part, the warm one's."""
    found = case["warm"]["req_s"] if "warm" in case else case.get("warm_req_s", case.get("req_s"))
    return float(found)


def draw(groups: dict[str, list[Bar]]) -> str:
    longest = max(bar.floor or bar.speed for bars in groups.values() for bar in bars)
    width = int(LEFT + UNIT * longest + RIGHT)
    parts, y = [], TOP
    for title, bars in groups.items():
        parts.append(text(8, y + 12, title, weight="bold"))
        y += ROW + 4
        top = y
        for bar in bars:
            parts += row(bar, y)
            y += ROW
        parts.append(f'<line x1="{LEFT + UNIT}" x2="{LEFT + UNIT}" y1="{top - 2}" y2="{y}" stroke="{INK}"/>')
        y += 10
    head = text(LEFT + UNIT, TOP - 12, "vLLM 0.26", anchor="middle") + text(LEFT, TOP - 12, "0", anchor="middle")
    legend = text(
        8, y + 12, "Bars: jaxserve's speed over vLLM's, one H100. Small marks: the floor of bytes or operations.", fill=FAINT
    )
    size = f'width="{width}" height="{y + 24}" viewBox="0 0 {width} {y + 24}"'
    style = '<rect width="100%" height="100%" fill="white"/>'
    body = "\n".join([style, head, *parts, legend])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def row(bar: Bar, y: int) -> Iterator[str]:
    yield text(LEFT - 8, y + 12, bar.name, anchor="end")
    colour = OURS if bar.speed >= 1 else BELOW
    yield f'<rect x="{LEFT}" y="{y + 2}" width="{UNIT * bar.speed:.1f}" height="{ROW - 5}" fill="{colour}"/>'
    end = max(bar.speed, bar.floor or 0)
    if bar.floor is not None:
        at = LEFT + UNIT * bar.floor
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y + 1}" y2="{y + ROW - 2}" stroke="{FAINT}" stroke-width="2"/>'
    yield text(LEFT + UNIT * end + 8, y + 12, f"{bar.speed:.2f}: {bar.text}")


def text(x: float, y: float, value: str, *, anchor: str = "start", fill: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">{escape(value)}</text>'


def main() -> None:
    vllm = json.loads(VLLM.read_text())["cases"]
    groups = {}
    for file in sorted((HERE / "results" / "h100").glob("*.json")):
        model, dtype = file.stem.rsplit("_", 1)
        if (theirs := vllm.get(f"{model} {dtype}")) is not None:
            groups[f"{model}, {dtype}"] = list(bars_of(json.loads(file.read_text())["runs"], theirs))
    OUT.write_text(draw(groups))
    print(OUT)


if __name__ == "__main__":
    main()
