"""Draw docs/decode.svg, quality.svg and matrix.svg from what the benchmarks and the conformance matrix found.

    python benchmarks/plots.py                 # from benchmarks/results, into docs
    python benchmarks/plots.py --pack results  # first: what tests/conformance/matrix.py left there, as one file

Nothing is measured here: every number of a picture stands in the file that it names.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DECODE, QUALITY, MATRIX = (
    HERE / "results" / name for name in ("2026-11-24-cpu.json", "2026-11-26-quality.json", "2026-11-26-matrix.json")
)
DOCS = HERE.parent / "docs"
LINES = {"DynamicCache": "theirs", "growing": "growing", "fixed": "fixed", "fixed compiled": "compiled"}
STORES = {  # of quality.py, those that round
    "int8": "one",
    "fp8": "two",
    "bfloat16 states": "three",
    "int8, bfloat16 states": "both",
}
CELLS = {".": ("right", "right"), "W": ("wrong", "wrong, no error"), "F": ("missing", "refused or missing")}
PANELS = {"transformers": "transformers' own caches", "prepared": "StateCache, prepared"}
STYLE = """
svg.{name}:root {{ color: #24292f }}
@media (prefers-color-scheme: dark) {{ svg.{name}:root {{ color: #e6edf3 }} }}
.{name} {{ width: 100%; height: auto; max-width: 820px; display: block; margin: 0 auto }}
.{name} text {{ fill: currentColor; font-size: {size}px }}
.{name} .head {{ font-size: 13px; font-weight: 600 }}
.{name} .end {{ text-anchor: end }}
.{name} .mid {{ text-anchor: middle }}
.{name} .axis {{ stroke: currentColor; stroke-opacity: .25; fill: none }}
"""


def picture(name: str, height: int, title: str, text: str, style: str, parts: list[str], size: int) -> str:
    """A whole SVG, as the others of the docs are: colours of light and dark pages, a title and a description."""
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" class="{name}" viewBox="0 0 820 {height}" role="img" '
                f'aria-labelledby="{name}-title {name}-text" font-family="system-ui, sans-serif">'
            ),
            f'<title id="{name}-title">{title}</title>',
            f'<desc id="{name}-text">{text}</desc>',
            f"<style>{STYLE.format(name=name, size=size)}{style}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, said: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:g}" y="{y:g}">{said}</text>'


# ---- decode time over context


def decode_svg(data: dict[str, Any]) -> str:
    """Milliseconds per token over the context, a panel for each shape; the contexts stand at their logarithms."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for cell in data["cells"]:
        shapes.setdefault(cell["shape"], []).append(cell)
    lines = {name: kind for name, kind in LINES.items() if all(name in c["milliseconds"] for c in data["cells"])}
    most = max(c["milliseconds"][name] for c in data["cells"] for name in lines)
    top = 10 * math.ceil(most / 10)
    left, width, floor, height = 44, 226, 250, 190

    def up(ms: float) -> float:
        return round(floor - height * ms / top, 1)

    parts, said = [], []
    for n, name in enumerate(lines):
        x = left + 150 * n
        parts += [f'<path class="{lines[name]}" d="M{x} 14 h26"/>', text(x + 32, 18, name)]
    for n, (shape, cells) in enumerate(shapes.items()):
        x = left + n * (width + 32)
        low, high = (math.log2(cells[at]["context"]) for at in (0, -1))
        at = [round(x + 10 + (width - 20) * (math.log2(c["context"]) - low) / (high - low), 1) for c in cells]
        parts.append(text(x, 48, shape, "head"))
        for ms in range(0, top + 1, 10):
            parts.append(f'<path class="axis" d="M{x} {up(ms):g} h{width}"/>')
            if not n:
                parts.append(text(x - 6, up(ms) + 4, str(ms), "end"))
        parts += [text(px, floor + 18, f"{c['context']:,}", "mid") for px, c in zip(at, cells, strict=True)]
        for name, kind in lines.items():
            points = " L".join(f"{px:g} {up(c['milliseconds'][name]):g}" for px, c in zip(at, cells, strict=True))
            parts.append(f'<path class="{kind}" d="M{points}"/>')
            figures = ", ".join(f"{c['milliseconds'][name]:.1f} at {c['context']:,}" for c in cells)
            said.append(f"{shape}, {name}: {figures}.")
    parts.append(text(820 - 44, floor + 38, "tokens before; milliseconds for the next one", "end"))
    style = (
        ".decode .theirs { stroke: currentColor; stroke-opacity: .6 }\n.decode .growing { stroke: #7986cb }\n"
        ".decode .fixed { stroke: #e8710a }\n.decode .compiled { stroke: #2e9e5b }\n"
        ".decode .theirs, .decode .growing, .decode .fixed, .decode .compiled { fill: none; stroke-width: 2.5 }\n"
    )
    return picture("decode", 296, "Decode time over context", " ".join(said), style, parts, 12)


# ---- what stores that round cost


def quality_svg(data: dict[str, Any]) -> str:
    """Divergence and agreement over the context, a line for each store; the contexts stand at their logarithms."""
    lines = {name: [c for c in data["cells"] if c["way"] == name] for name in STORES}
    every = [c for cells in lines.values() for c in cells]
    most = 100 * math.ceil(max(1e4 * c["divergence"] for c in every))
    least = math.floor(2 * min(100 * c["agree"] for c in every)) / 2
    left, width, floor, height = 52, 330, 250, 180
    parts, said = [], []
    for n, (name, kind) in enumerate(STORES.items()):
        x = left + 160 * n
        parts += [f'<path class="{kind}" d="M{x} 14 h26"/>', text(x + 32, 18, name)]
    panels = (
        ("divergence, millionths of a bit a token", "divergence", 1e6, 0.0, float(most)),
        (f"% of {data['new']} greedy tokens that agree", "agree", 100.0, least, 100.0),
    )
    for n, (title, of, unit, low, high) in enumerate(panels):
        x = left + n * (width + 76)
        parts.append(text(x, 48, title, "head"))
        for step in range(5):
            value, y = low + (high - low) * step / 4, floor - height * step / 4
            parts += [f'<path class="axis" d="M{x} {y:g} h{width}"/>', text(x - 6, y + 4, f"{value:g}", "end")]
        contexts = [c["context"] for c in lines["int8"]]
        span = math.log2(contexts[-1] / contexts[0])
        at = [round(x + 14 + (width - 28) * math.log2(c / contexts[0]) / span, 1) for c in contexts]
        parts += [text(px, floor + 18, f"{c:,}", "mid") for px, c in zip(at, contexts, strict=True)]
        for name, cells in lines.items():
            ups = [round(floor - height * (unit * c[of] - low) / (high - low), 1) for c in cells]
            points = " L".join(f"{px:g} {up:g}" for px, up in zip(at, ups, strict=True))
            parts.append(f'<path class="{STORES[name]}" d="M{points}"/>')
            figures = ", ".join(f"{unit * c[of]:.2f} at {c['context']:,}" for c in cells)
            said.append(f"{name}, {title}: {figures}.")
    parts.append(text(820 - 32, floor + 38, "tokens before", "end"))
    style = (
        ".quality .one { stroke: #7986cb }\n.quality .two { stroke: #e8710a }\n.quality .three { stroke: #2e9e5b }\n"
        ".quality .both { stroke: currentColor; stroke-opacity: .6 }\n"
        ".quality .one, .quality .two, .quality .three, .quality .both { fill: none; stroke-width: 2.5 }\n"
    )
    return picture("quality", 296, "What stores that round cost", " ".join(said), style, parts, 12)


# ---- the conformance matrix


def matrix_svg(data: dict[str, Any]) -> str:
    """A square for each capability and model, of both subjects side by side."""
    families, wide, high, left, head = data["families"], 8, 13, 208, 152
    parts, said = [], []
    squares: dict[str, list[str]] = {mark: [] for mark in CELLS}
    for n, (subject, title) in enumerate(PANELS.items()):
        x, grid = left + n * (len(families) * wide + 42), data["cells"][subject]
        cells = "".join(grid.values())
        figures = ", ".join(f"{cells.count(mark)} {told}" for mark, (_, told) in CELLS.items())
        said.append(f"{title}: {figures}.")
        parts.append(text(x, 16, title, "head"))
        for column, family in enumerate(families):
            at = x + column * wide + wide - 1
            parts.append(f'<text class="family" transform="translate({at} {head - 6}) rotate(-90)">{family}</text>')
        for row, (capability, marks) in enumerate(grid.items()):
            y = head + row * high
            if not n:
                parts.append(text(left - 8, y + 10, capability.replace("_", " "), "end"))
            for column, mark in enumerate(marks):
                squares[mark].append(f"M{x + column * wide} {y}h{wide - 1}v{high - 2}h{1 - wide}z")
    parts += [f'<path class="{CELLS[mark][0]}" d="{"".join(drawn)}"/>' for mark, drawn in squares.items()]
    floor = head + len(next(iter(data["cells"].values()))) * high + 18
    for n, (kind, told) in enumerate(CELLS.values()):
        x = left + 150 * n
        parts += [f'<rect class="{kind}" x="{x}" y="{floor - 10}" width="11" height="11"/>', text(x + 17, floor, told)]
    style = (
        ".matrix text.family { font-size: 8px }\n"
        ".matrix .right { fill: #2e9e5b; fill-opacity: .55 }\n.matrix .wrong { fill: #d93025 }\n"
        ".matrix .missing { fill: currentColor; fill-opacity: .15 }\n"
    )
    return picture("matrix", floor + 12, "What caches get right", " ".join(said), style, parts, 10)


def pack(folder: Path) -> dict[str, Any]:
    """What the matrix wrote, folder/SUBJECT/FAMILY.json, as one string of marks for each capability."""
    found = {s: {f.stem: json.loads(f.read_text()) for f in (folder / s).glob("*.json")} for s in PANELS}
    families = json.loads(MATRIX.read_text())["families"]
    marks = {"PASS": ".", "WRONG": "W"}
    cells = {
        subject: {
            capability: "".join(marks.get(by_family[family][capability]["status"], "F") for family in families)
            for capability in next(iter(by_family.values()))
        }
        for subject, by_family in found.items()
    }
    return {"families": families, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="take the matrix from there, and keep it as a file")
    asked = parser.parse_args()
    if asked.pack is not None:
        MATRIX.write_text(json.dumps(pack(asked.pack), indent=1) + "\n")
    (DOCS / "decode.svg").write_text(decode_svg(json.loads(DECODE.read_text())))
    (DOCS / "quality.svg").write_text(quality_svg(json.loads(QUALITY.read_text())))
    (DOCS / "matrix.svg").write_text(matrix_svg(json.loads(MATRIX.read_text())))


if __name__ == "__main__":
    main()
