"""The texts of all particles as one tree: steps that particles share are written once.

    smc = SMC(ParticleFilter(reason, store="paths"), num_particles=16)
    smc.run(key, lm, prm, prompt, max_steps=12)
    tree = from_run(smc, lm)             `grow.py`
    tree                                 a picture, in a notebook
    print(to_text(tree))                 the same in a terminal

| name | what it is |
|---|---|
| `Tree` | a step, how many particles wrote it, its score, what became of it, the steps after it |
| `to_text`, `to_svg` | the tree in lines of a terminal; as a picture |

A run tells more than its final texts: where the population was split, and which branch was given up
when it was resampled.  In the picture a branch is as thick as the share of particles that wrote the
step; its color is the score, blue for 1, orange for 0, a scale that the color-blind can read.

Texts come from a model, so they are never trusted: characters that steer a terminal or a browser are
shown as such.  Read next: `grow.py`, `pictures.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
from rich.cells import cell_len, set_cell_size

#: a narrower terminal has no room for a step beside its numbers
NARROWEST = 40


@dataclass(frozen=True, repr=False)
class Tree:
    """A step of text and all that was written after it; the root is the question.

    Attributes:
        text: of the step.
        num_particles: how many particles wrote it, right after they did, before any resampling.
        num_final: how many of the final particles hold it; 0 where the branch died out.
        weight: their share of the final weight, in [0, 1].
        score: of the step, in [0, 1]; None where there is none.
        children: the steps that follow it, those of most particles first.
    """

    text: str
    num_particles: int
    num_final: int
    weight: float
    score: float | None = None
    children: tuple["Tree", ...] = ()

    @property
    def depth(self) -> int:
        """The most steps of a text, this one not counted."""
        return max((1 + child.depth for child in self.children), default=0)

    def __repr__(self) -> str:
        return f"Tree({shown(self.text)!r}, num_particles={self.num_particles}, depth={self.depth})"

    def _repr_html_(self) -> str:
        """The picture, in a frame that scrolls sideways."""
        return f'<div style="overflow-x: auto">{to_svg(self)}</div>'


# ---- in a terminal


def to_text(
    tree: Tree, width: int = 92, *, mark: Callable[[tuple[str, ...]], str] | None = None
) -> str:
    """The tree in lines, one for each step; a branch is indented where its text parts from others.

    Args:
        tree: see `from_run`.
        width: columns of the terminal, at least `NARROWEST`; longer steps are cut.
        mark: `steps up to this one -> remark`, shown after the step.
    Returns:
        Under a header, of each step: the text, how many particles wrote it, its score, its share
        of the final weight or "died".
    Raises:
        ValueError: a terminal that is too narrow.
    """
    if width < NARROWEST:
        raise ValueError(f"smcscale: `width` must be at least {NARROWEST}, got {width}.")
    room = width - len(_numbers("", "", ""))
    lines = [_cut("step", room) + _numbers("particles", "score", "weight")]

    def grow(children: tuple[Tree, ...], before: tuple[str, ...], bars: str) -> None:
        for number, child in enumerate(children):
            joint = below = ""
            if len(children) > 1:
                last = number == len(children) - 1
                joint, below = ("`- ", "   ") if last else ("|- ", "|  ")
            held = (*before, child.text)
            remark = f"  ({mark(held)})" if mark is not None and mark(held) else ""
            remark = shown(remark) and f"  {shown(remark)}"
            step = _cut(bars + joint + shown(child.text), room - cell_len(remark)).rstrip()
            score = "" if child.score is None else f"{child.score:.2f}"
            weight = f"{child.weight:.0%}" if child.num_final else "died"
            numbers = _numbers(f"{child.num_particles}", score, weight)
            lines.append(_cut(step + remark, room) + numbers)
            grow(child.children, held, bars + below)

    grow(tree.children, (), "")
    return "\n".join(lines)


def shown(text: str) -> str:
    """A text on one line, without characters that do not print (they would steer a terminal)."""
    line = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )


def _numbers(particles: str, score: str, weight: str) -> str:
    return f"{particles:>11}{score:>7}{weight:>8}"


def _cut(text: str, room: int) -> str:
    """A text in exactly so many columns, with dots where it was cut."""
    if cell_len(text) > room:
        text = set_cell_size(text, max(room - 3, 0)).rstrip() + "..."
    return set_cell_size(text, room)


# ---- as a picture

_LETTER, _TEXT = 6.1, 10  # width and size of a letter, pixels
_LONGEST = 34  # letters of a step
_GAP = 26  # between steps, for the curve
_THICKEST = 14
_FOOT = 34  # for the legend
#: orange, grey, blue at the scores 0, 1/2 and 1 (vermillion and blue of Okabe and Ito)
_SCALE = np.array([[213, 94, 0], [185, 185, 185], [0, 114, 178]], float)
_NO_SCORE = "#8c8c8c"
_MEANING = (
    "1   thickness: particles that wrote the step   faint: died   %: share of the final weight"
)
_LEGEND = 165 + len(_MEANING) * _LETTER  # where it ends


def to_svg(tree: Tree) -> str:
    """The tree as a picture, from left to right, in the words of SVG 1.1.

    A branch is as thick as its share of the particles, and colored by its score; branches that died
    are faint, the others end with their share of the final weight.  Resting on a step shows it whole.

    Args:
        tree: see `from_run`.
    Returns:
        An element `<svg>`, all texts escaped.
    """
    wide = [0.0] * (tree.depth + 1)
    _measure(tree, 0, wide)
    left = np.concatenate([[10.0], 10.0 + np.cumsum(np.array(wide) + _GAP)])
    high = _THICKEST + 2 * _TEXT + 8
    body = ElementTree.Element("g", {"fill": "none", "stroke-linecap": "butt"})
    rows = 0

    def place(node: Tree, level: int) -> float:
        """Draw a branch and what follows it; return how far down it is."""
        nonlocal rows
        if node.children:
            heights = [place(child, level + 1) for child in node.children]
            y = (heights[0] + heights[-1]) / 2
        else:
            heights, y = [], (rows + 0.5) * high + 4
            rows += 1
        begin, end = left[level], left[level] + wide[level]
        for child, there in zip(node.children, heights, strict=True):
            middle, far = end + _GAP / 2, left[level + 1]
            curve = f"M{end:.1f},{y:.1f} C{middle:.1f},{y:.1f} {middle:.1f},{there:.1f} {far:.1f},{there:.1f}"
            body.append(_line(curve, child, tree))
        body.append(_branch(node, tree, begin, end, y, level == 0))
        return y

    place(tree, 0)
    width, height = max(left[-1], _LEGEND) + 10, rows * high + _FOOT + 8
    svg = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "font-family": "monospace",
            "role": "img",
            "aria-label": f"tree of {tree.num_particles} particles",
        },
    )
    ElementTree.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    svg.append(body)
    _legend(svg, height - _FOOT / 2)
    return ElementTree.tostring(svg, encoding="unicode")


def color(score: float | None) -> str:
    """Color of a score as `#rrggbb`: orange at 0, grey at 1/2, blue at 1; None: a darker grey."""
    if score is None:
        return _NO_SCORE
    place = np.clip(score, 0, 1)
    channels = [round(float(np.interp(place, [0, 0.5, 1], _SCALE[:, c]))) for c in range(3)]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _short(node: Tree, root: bool) -> str:
    text = "question" if root else shown(node.text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3].rstrip() + "..."


def _measure(node: Tree, level: int, wide: list[float]) -> None:
    """The widest step of each level, with room for what is said at the end of a text."""
    end = "" if node.children else " 100%"
    wide[level] = max(wide[level], cell_len(_short(node, level == 0) + end) * _LETTER)
    for child in node.children:
        _measure(child, level + 1, wide)


def _line(path: str, node: Tree, tree: Tree) -> ElementTree.Element:
    thick = max(1.5, _THICKEST * node.num_particles / tree.num_particles)
    return ElementTree.Element(
        "path",
        {
            "d": path,
            "stroke": color(node.score),
            "stroke-width": f"{thick:.1f}",
            "stroke-opacity": "1" if node.num_final else "0.5",
        },
    )


def _branch(
    node: Tree, tree: Tree, begin: float, end: float, y: float, root: bool
) -> ElementTree.Element:
    """A step: its bar, its text above, its numbers below, all of it when rested upon."""
    group = ElementTree.Element("g")
    score = "" if node.score is None else f"{node.score:.2f}"
    fate = f"{node.weight:.0%}" if node.num_final else "died"
    told = f"{shown(node.text)}\n{node.num_particles} particles wrote it"
    told += f", score {score}" if score else ""
    told += f"\n{node.num_final} final particles hold it, share of the weight {node.weight:.0%}"
    ElementTree.SubElement(group, "title").text = shown(node.text) if root else told
    if not node.children:
        end -= len(" 100%") * _LETTER
    group.append(_line(f"M{begin:.1f},{y:.1f} H{end:.1f}", node, tree))
    ink = "#000000" if node.num_final else "#6b6b6b"
    above, below = y - _THICKEST / 2 - 3, y + _THICKEST / 2 + _TEXT - 1
    _write(group, begin, above, _short(node, root), ink)
    _write(
        group, begin, below, f"\N{MULTIPLICATION SIGN}{node.num_particles}  {score}", "#555555", 9
    )
    if not node.children:
        _write(group, end + _LETTER / 2, y + 4, fate, ink)
    return group


def _legend(svg: ElementTree.Element, y: float) -> None:
    """What color, thickness and the rest mean."""
    x = 10.0
    _write(svg, x, y + 4, "score 0", "#333333", 10)
    for number in range(11):
        ElementTree.SubElement(
            svg,
            "rect",
            {
                "x": f"{x + 50 + 9 * number:.0f}", "y": f"{y - 5:.0f}", "width": "9",
                "height": "10", "fill": color(number / 10),
            },
        )  # fmt: skip
    _write(svg, x + 155, y + 4, _MEANING, "#333333", 10)


def _write(
    parent: ElementTree.Element, x: float, y: float, text: str, fill: str, size: int = _TEXT
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-size": f"{size}", "fill": fill}
    element = ElementTree.SubElement(parent, "text", place | {"xml:space": "preserve"})
    element.text = text
