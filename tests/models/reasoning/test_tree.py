"""Trees of particles: exact counts on populations made by hand, texts that nobody trusts, refusals."""

import functools
import re
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.cells import cell_len

from smcscale import SMC, ParticleFilter
from smcscale.engine.store import Ancestry, Paths
from smcscale.kernels import annealing, triggers
from smcscale.models.reasoning import pictures, reason
from smcscale.models.reasoning.decode import TextState, Written
from smcscale.models.reasoning.grow import from_run, from_texts
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.tree import Tree, color, to_svg, to_text
from support.reasoning import tiny

SVG = "{http://www.w3.org/2000/svg}"
TEXTS = [("a", "b", "x"), ("a", "b", "x"), ("a", "b", "y"), ("a", "c"), ("d",)]
SCORES = [(0.9, 0.8, 0.7), (0.9, 0.8, 0.7), (0.9, 0.8, 0.1), (0.9, 0.2), (0.4,)]
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4, 0.0])


@functools.cache
def language_model() -> LanguageModel:
    """Without a tokenizer; a step is a token."""
    return tiny.language_model(step_tokens=1)


def by_hand() -> Tree:
    with np.errstate(divide="ignore"):
        return from_texts(TEXTS, SCORES, np.log(WEIGHTS) - 7.0, question="why?")


def nodes(tree: Tree, level: int = 0):
    """Every node but the root, with its level."""
    for child in tree.children:
        yield level + 1, child
        yield from nodes(child, level + 1)


def test_shared_steps_are_one_branch():
    tree = by_hand()
    assert (tree.text, tree.num_particles, tree.depth) == ("why?", 5, 3)
    a, d = tree.children
    b, c = a.children
    x, y = b.children
    found = [(n.text, n.num_particles, n.num_final) for n in (a, b, c, d, x, y)]
    assert found == [
        ("a", 4, 4), ("b", 3, 3), ("c", 1, 1), ("d", 1, 1), ("x", 2, 2), ("y", 1, 1),
    ]  # fmt: skip
    assert [n.score for n in (a, b, c, d, x, y)] == pytest.approx([0.9, 0.8, 0.2, 0.4, 0.7, 0.1])
    assert tree.score is None
    shares = [n.weight for n in (tree, a, b, c, d, x, y)]
    np.testing.assert_allclose(shares, [1, 1, 0.6, 0.4, 0, 0.3, 0.3])


def test_a_step_is_shared_only_by_texts_that_agree_before_it():
    tree = from_texts([("a", "same"), ("b", "same")])
    assert [n.num_particles for _, n in nodes(tree)] == [1, 1, 1, 1]
    assert all(n.score is None for _, n in nodes(tree))


STEPS = [  # (tokens, begin) of four particles in three rows; 0 ends a text, 1 a step
    [([2, 1], 0), ([2, 1], 0), ([3, 1], 0), ([3, 0], 0)],
    # the third particle died, the fourth waits and was copied
    [([2, 1, 2, 1], 2), ([2, 1, 3, 1], 2), ([3, 0], 2), ([3, 0], 2)],
    # the first branch of the second row died
    [([2, 1, 3, 1, 0], 4), ([2, 1, 3, 1, 2], 4), ([3, 0], 2), ([3, 0], 2)],
]
ROW_SCORES = [[0.5, 0.5, 0.25, 0.75], [0.1, 0.9, 0.75, 0.75], [1.0, 0.0, 0.75, 0.75]]


FINAL = np.log([1.0, 1.0, 2.0, 1e-30])


def kept(log_weights: Any = FINAL, sites: Any = None, history: Any = None) -> SimpleNamespace:
    """What a run of `reason` leaves behind: the second run of two, the first is all zeros."""
    shape = (3, 2, 4)
    tokens = np.zeros((*shape, 6), np.int32)
    lengths, begins, scores = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape)
    for row, particles in enumerate(STEPS):
        for n, (text, begin) in enumerate(particles):
            tokens[row, 1, n, : len(text)] = text
            lengths[row, 1, n], begins[row, 1, n] = len(text), begin
            scores[row, 1, n] = ROW_SCORES[row][n]
    text = TextState(Written(tokens, lengths, begins, None, None))
    sites = {"step": text, "score": scores} if sites is None else sites
    history = history or Paths(sites, jnp.zeros(shape), jnp.zeros(shape, jnp.int32))
    final = np.stack([np.zeros(4), log_weights])
    found = {"history": history, "log_weights": final, "num_runs": 2, "store": history.kind}
    return SimpleNamespace(result=SimpleNamespace(**found))


def test_a_run_tells_what_died():
    tree = from_run(kept(), language_model(), 1)
    assert (tree.num_particles, tree.num_final) == (4, 4)
    found = {(level, n.text): n for level, n in nodes(tree)}
    expected = {  # particles when written, final ones, weight, score
        (1, "2 1"): (2, 2, 0.5, 0.5), (1, "3 1"): (1, 0, 0.0, 0.25), (1, "3 0"): (1, 2, 0.5, 0.75),
        (2, "2 1"): (1, 0, 0.0, 0.1), (2, "3 1"): (1, 2, 0.5, 0.9),
        (3, "0"): (1, 1, 0.25, 1.0), (3, "2"): (1, 1, 0.25, 0.0),
    }  # fmt: skip
    assert {
        place: (n.num_particles, n.num_final, round(n.weight, 9), n.score)
        for place, n in found.items()
    } == expected
    assert "died" in to_text(tree) and to_svg(tree).count(">died<") == 2
    # one of four particles wrote the step that two of them hold in the end
    (bar,) = re.findall(
        r"<title>3 1\n1 particles wrote it, score 0.9.*?</g>", to_svg(tree), re.DOTALL
    )
    whole = ElementTree.fromstring(to_svg(tree)).find(f".//{SVG}g/{SVG}path[@stroke-width='14.0']")
    assert 'stroke-width="3.5"' in bar and whole is not None


def test_all_dead_particles_have_no_weight():
    tree = from_run(kept([-np.inf] * 4), language_model(), 1)
    assert tree.weight == 0 and all(n.weight == 0 for _, n in nodes(tree))


@functools.cache
def finished_run() -> SMC:
    """A run of the tiny models, resampled and annealed at every row."""
    cooled = annealing.Entropic(4, annealing.FromProgress(), ess_threshold=1.0, early_phase=1.0)
    method = ParticleFilter(reason, store="paths", trigger=triggers.always, annealing=cooled)
    smc = SMC(method, num_particles=40, progress_bar=False)
    smc.run(jax.random.key(0), language_model(), tiny.reward_model(), tiny.PROMPT, max_steps=4)
    return smc


def test_counts_add_up_at_every_level_of_a_run():
    smc = finished_run()
    tree = from_run(smc, language_model())
    written = smc.result.history.states["step"].written
    wrote = np.sum(np.asarray(written.length > written.begin)[:, 0], axis=-1)
    assert wrote[0] == 40 > wrote[-1] > 0
    for level, count in enumerate(wrote, 1):
        assert sum(n.num_particles for at, n in nodes(tree) if at == level) == count
    survivors = 0
    for _, node in [(0, tree), *nodes(tree)]:
        ended = node.num_final - sum(child.num_final for child in node.children)
        share = node.weight - sum(child.weight for child in node.children)
        assert ended >= 0 and share >= -1e-9
        survivors += ended
    assert survivors == 40 and tree.weight == pytest.approx(1)
    died = [n for _, n in nodes(tree) if n.num_final == 0]
    assert all(child.num_final == 0 for n in died for child in n.children)
    # a step of the last row has the weight and score of the particles that wrote it
    end = np.asarray(written.tokens)[-1, 0, 0, :4]
    node = tree
    for token in end[: int(written.length[-1, 0, 0])]:
        node = next(child for child in node.children if child.text == str(token))
    same = [
        n for n in range(40)
        if (np.asarray(written.tokens)[-1, 0, n, :4] == end).all()
    ]  # fmt: skip
    weights = np.asarray(jax.nn.softmax(smc.result.log_weights[0]))
    assert node.num_final == len(same) and node.weight == pytest.approx(
        weights[same].sum(), rel=1e-5
    )
    assert node.score == pytest.approx(float(smc.result.final["score"][0, 0]), rel=1e-5)


EVIL = "<script>alert('&')</script>\x1b[2J\x00\u202eabc\ud800\nnext"


def test_text_of_a_model_is_escaped_in_the_picture():
    tree = from_texts([(EVIL,), ("]]> --> & < \" '",)], question=EVIL)
    picture = tree._repr_html_()
    assert "<script" not in picture and "\x1b" not in picture and "&lt;script" in picture
    picture.encode()  # no half of a surrogate pair
    root = ElementTree.fromstring(to_svg(tree))
    assert root.tag == f"{SVG}svg" and not list(root.iter(f"{SVG}script"))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert sum("<script>alert('&')</script>" in title for title in titles) == 2


def test_text_of_a_model_does_not_steer_a_terminal():
    lines = to_text(from_texts([(EVIL,)]), mark=lambda _: EVIL).split("\n")
    assert len(lines) == 2 and all(letter.isprintable() for line in lines for letter in line)


@pytest.mark.parametrize("width", [40, 57, 120])
def test_lines_keep_to_the_width(width):
    wide = "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 70
    texts = [("start", *("abcdefgh"[: n + 1]), wide, "y" * 200) for n in range(8)]
    tree = from_texts(texts, [np.linspace(0, 1, len(text)) for text in texts])
    lines = to_text(tree, width, mark=lambda _: "wrong").split("\n")
    assert len(lines) == 1 + sum(1 for _ in nodes(tree))
    assert {cell_len(line) for line in lines} == {width}
    assert sum("(wrong)" in line for line in lines) == len(lines) - 1


def test_lines_say_everything():
    lines = to_text(by_hand(), 60, mark=lambda held: "end" if held == ("a", "c") else "").split(
        "\n"
    )
    assert [line.split() for line in lines] == [
        ["step", "particles", "score", "weight"],
        ["|-", "a", "4", "0.90", "100%"],
        ["|", "|-", "b", "3", "0.80", "60%"],
        ["|", "|", "|-", "x", "2", "0.70", "30%"],
        ["|", "|", "`-", "y", "1", "0.10", "30%"],
        ["|", "`-", "c", "(end)", "1", "0.20", "40%"],
        ["`-", "d", "1", "0.40", "0%"],
    ]


def test_the_picture_shows_particles_by_thickness_and_scores_by_color():
    root = ElementTree.fromstring(to_svg(by_hand()))
    bars = {}
    for group in root.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            path = group.find(f"{SVG}path")
            assert path is not None
            bars[(title.text or "").split("\n")[0]] = path.attrib
    thick = {name: float(bar["stroke-width"]) for name, bar in bars.items()}
    assert thick["a"] == pytest.approx(4 * thick["d"]) == pytest.approx(0.8 * thick["why?"])
    assert bars["b"]["stroke"] == color(0.8) and bars["y"]["stroke"] == color(0.1)
    # the scale runs from orange to blue, which no kind of color blindness confuses
    assert (color(0.0), color(1.0)) == ("#d55e00", "#0072b2") and color(None) != color(0.5)
    # nothing sticks out
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    letter = 0.61  # width of a letter of the font over its size
    for text in root.iter(f"{SVG}text"):
        at = {name: float(text.attrib[name]) for name in ("x", "y", "font-size")}
        assert at["x"] + len(text.text or "") * letter * at["font-size"] <= width, text.text
        assert 0 < at["y"] < height


def test_a_run_that_forgot_its_particles_is_refused():
    lm = language_model()
    with pytest.raises(ValueError, match=r'store="ancestry"(.|\n)*store="paths"'):
        from_run(kept(history=Ancestry([], [], None)), lm)
    last = SimpleNamespace(history=None, store="last")
    with pytest.raises(ValueError, match=r'store="last"(.|\n)*store="paths"'):
        from_run(SimpleNamespace(result=last), lm)


def test_what_has_no_tree_is_refused():
    lm = language_model()
    with pytest.raises(TypeError, match='no `TextState` at a site "step"'):
        from_run(kept(sites={"x": np.zeros((3, 2, 4))}), lm)
    with pytest.raises(IndexError, match=r"\[0, 2\), got 2"):
        from_run(kept(), lm, 2)
    with pytest.raises(ValueError, match="at least 40, got 39"):
        to_text(by_hand(), 39)
    with pytest.raises(ValueError, match="needs a text"):
        from_texts([])
    with pytest.raises(ValueError, match="one number for each step"):
        from_texts(TEXTS, SCORES[:-1])
    with pytest.raises(ValueError, match=r"shape \(2,\), there are 5"):
        from_texts(TEXTS, log_weights=np.zeros(2))


@pytest.mark.slow
def test_the_picture_of_annealing_has_a_mark_for_each_resampling():
    plt.switch_backend("Agg")
    smc = finished_run()
    ax = pictures.annealing(smc)
    lines = {line.get_label(): line for line in ax.get_lines()}
    ess = np.asarray(smc.diagnostics.ess)[0]
    np.testing.assert_allclose(lines["ESS / N"].get_ydata(), ess / 40)
    rows, betas = lines["inverse temperature"].get_data()
    # resampled after each row but the last, by the temperature 2 - progress
    assert rows.tolist() == [0, 1, 2] and (ess < 40).all()
    np.testing.assert_allclose(betas, 1 / (2 - np.arange(1, 4) / 4), rtol=1e-5)
    plt.close(ax.figure)
