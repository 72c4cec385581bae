"""A* and AB-MCTS on trees whose answer is known, their budgets, and runs of the shipped models."""

from functools import cache, partial

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale.models.reasoning import tasks
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.search_problem import Budget, SearchProblem, Tree, row_of
from smcscale.models.reasoning.search_texts import answering, writing
from smcscale.models.reasoning.solve import (
    shipped,
    shipped_language_model,
    shipped_reward_model,
)
from smcscale.models.reasoning.thompson import Beta, MixedModel, NodeAggregation
from smcscale.models.reasoning.tree_search import (
    Request,
    a_star,
    ab_mcts,
    ask,
    newest,
    product,
    tell,
    weakest,
)
from support.compilations import compilations
from support.montecarlo import assert_mean
from support.reasoning import tiny

WIDTH, DEPTH = 3, 4
SIZE = sum(WIDTH**t for t in range(DEPTH + 1))
RULES = [NodeAggregation(), NodeAggregation(Beta()), MixedModel()]


def toy(seed=0, batch=WIDTH):
    """A full tree with known scores: child i of node v is `v * WIDTH + 1 + i`; leaves finish.

    Copies of a node lie side by side in a call, so a row's place says which child it is.
    """
    quality = np.random.default_rng(seed).uniform(0.2, 1.0, SIZE).astype(np.float32)
    table = jnp.asarray(quality)
    first_leaf = SIZE - WIDTH**DEPTH

    @jax.jit
    def expand(key, states, count):
        children = states * WIDTH + 1 + jnp.arange(batch) % WIDTH
        one = jnp.ones(batch)
        return children, table[children], {"tokens": 2 * one, "prm_tokens": one}

    problem = SearchProblem(
        jnp.zeros((), jnp.int32), expand, lambda states: states >= first_leaf, batch,
        {"tokens": 2.0, "prm_tokens": 1.0}, lambda state: str(int(state)),
    )  # fmt: skip
    # the best product of scores from each node down, itself left out
    rest = np.zeros(SIZE)
    for node in range(first_leaf - 1, -1, -1):
        below = range(node * WIDTH + 1, node * WIDTH + 1 + WIDTH)
        rest[node] = max(np.log(quality[i]) + rest[i] for i in below)
    return problem, quality, rest


def path_to(leaf):
    nodes = []
    while leaf:
        nodes.append(leaf)
        leaf = (leaf - 1) // WIDTH
    return nodes


# ---- A*


@pytest.mark.parametrize("seed", range(5))
def test_an_exact_heuristic_finds_the_best_leaf_and_opens_only_its_path(seed):
    problem, quality, rest = toy(seed)
    found = a_star(
        jax.random.key(0), problem, budget=Budget(expansions=1000), width=WIDTH, path=product,
        heuristic=lambda score, state: rest[int(state)],
    )  # fmt: skip
    leaves = range(SIZE - WIDTH**DEPTH, SIZE)
    best = max(leaves, key=lambda leaf: sum(np.log(quality[i]) for i in path_to(leaf)))
    assert found.texts == (str(best),)
    assert found.scores[0] == pytest.approx(quality[best])
    assert found.cost == {
        "expansions": WIDTH * DEPTH, "tokens": 2 * WIDTH * DEPTH, "prm_tokens": WIDTH * DEPTH,
    }  # fmt: skip
    assert (
        found.tree.visits > 0
    ).sum() == DEPTH  # the nodes of the path, and no other, were opened


@pytest.mark.parametrize("seed", range(5))
def test_without_a_heuristic_the_first_solution_is_still_the_best(seed):
    """h = 0 never underestimates; a node is opened if and only if it beats the solution."""
    problem, quality, rest = toy(seed)
    found = a_star(
        jax.random.key(0), problem, budget=Budget(expansions=1000), width=WIDTH, path=product,
        heuristic=lambda *_: 0.0,
    )  # fmt: skip
    earned = {0: 0.0}
    for node in range(1, SIZE):
        earned[node] = earned[(node - 1) // WIDTH] + np.log(quality[node])
    assert earned[int(found.texts[0])] == pytest.approx(rest[0], rel=1e-5)
    inner = range(SIZE - WIDTH**DEPTH)
    must = sum(earned[node] > rest[0] + 1e-9 for node in inner)
    assert found.cost["expansions"] == WIDTH * must


def test_more_solutions_come_in_order_and_ties_go_deeper():
    problem, quality, _ = toy()
    leaves = range(SIZE - WIDTH**DEPTH, SIZE)
    exact = {leaf: sum(np.log(quality[i]) for i in path_to(leaf)) for leaf in leaves}
    found = a_star(
        jax.random.key(0), problem, budget=Budget(tokens=10_000), width=WIDTH, path=product,
        heuristic=lambda *_: 0.0, num_solutions=4,
    )  # fmt: skip
    assert [int(text) for text in found.texts] == sorted(leaves, key=exact.get, reverse=True)[:4]
    equal = a_star(
        jax.random.key(0), problem, budget=Budget(tokens=10_000), width=WIDTH,
        path=lambda path, score: 0.0, heuristic=lambda *_: 0.0,
    )  # fmt: skip
    # all f are equal: straight down along first children
    assert equal.texts == (str(SIZE - WIDTH**DEPTH),)
    assert equal.cost["expansions"] == WIDTH * DEPTH


def test_several_nodes_at_once_find_the_same_solution():
    for seed in range(12):
        problem, _, _ = toy(seed, batch=3 * WIDTH)
        alone, _, _ = toy(seed)
        options = {"budget": Budget(tokens=10_000), "width": WIDTH, "path": product}
        one = a_star(jax.random.key(0), alone, heuristic=lambda *_: 0.0, **options)
        many = a_star(jax.random.key(0), problem, heuristic=lambda *_: 0.0, **options)
        assert one.texts == many.texts
        assert many.cost["expansions"] >= one.cost["expansions"]


def test_a_solution_waits_for_what_was_popped_before_it():
    """Two nodes at once: the finished 2 (0.8) must wait for 1 (0.9), whose child 3 has 0.855."""
    table = jnp.asarray([1.0, 0.9, 0.8, 0.95, 0.1])

    def expand(key, states, count):
        children = states * 2 + 1 + jnp.arange(4) % 2
        return children, table[jnp.minimum(children, 4)], {}

    problem = SearchProblem(
        jnp.zeros((), jnp.int32), expand, lambda states: states >= 2, 4, {},
        lambda state: str(int(state)),
    )  # fmt: skip
    found = a_star(
        jax.random.key(0), problem, budget=Budget(expansions=20), width=2, path=product,
        heuristic=lambda *_: 0.0, num_solutions=2,
    )  # fmt: skip
    assert found.texts == ("3", "2")


def test_the_default_f_is_the_weakest_step_and_the_newest():
    assert weakest(np.log(0.4), 0.7) == pytest.approx(np.log(0.4))
    assert weakest(np.log(0.4), 0.2) == pytest.approx(np.log(0.2))
    assert newest(0.5, None) == pytest.approx(np.log(0.5))
    assert np.isfinite(weakest(0.0, 0.0) + product(0.0, 0.0) + newest(0.0, None))


@pytest.mark.parametrize("budget", [Budget(tokens=15), Budget(prm_tokens=8), Budget(expansions=7)])
def test_a_budget_is_never_exceeded_and_all_but_used(budget):
    problem, _, _ = toy()
    for found in (
        a_star(jax.random.key(0), problem, budget=budget, width=WIDTH, heuristic=lambda *_: 0.0),
        ab_mcts(jax.random.key(0), problem, budget=budget),
    ):
        assert found.cost["expansions"] == found.tree.size - 1 == 7 + (budget.prm_tokens == 8)
        assert all(found.cost[name] <= limit for name, limit in budget._asdict().items())


def test_a_budget_too_small_for_a_solution_gives_none():
    problem, _, _ = toy()
    found = a_star(jax.random.key(0), problem, budget=Budget(expansions=3), width=WIDTH)
    assert found.texts == () and found.scores.shape == (0,) and found.tree.size == 4
    found = a_star(
        jax.random.key(0), problem, budget=Budget(tokens=10_000), width=WIDTH, max_steps=2
    )
    assert found.texts == () and found.tree.depths.max() == 2


# ---- AB-MCTS


def bandit(means, batch=4, noise=0.05):
    """Answers of the first level belong to arms of known means; their children share the arm."""
    means = jnp.asarray(means)

    @jax.jit
    def expand(key, states, count):
        arm_key, noise_key = jax.random.split(key)
        fresh = jax.random.randint(arm_key, (batch,), 0, len(means))
        arms = jnp.where(states < 0, fresh, states)
        scores = means[arms] + noise * jax.random.normal(noise_key, (batch,))
        return arms, jnp.clip(scores, 0, 1), {"tokens": jnp.ones(batch)}

    return SearchProblem(
        jnp.asarray(-1), expand, lambda states: states < -1, batch, {"tokens": 1.0},
        lambda state: str(int(state)),
    )  # fmt: skip


@pytest.mark.statistical
@pytest.mark.parametrize(
    "rule", [RULES[0], pytest.param(RULES[1], marks=pytest.mark.slow), RULES[2]]
)
def test_the_share_of_the_best_arm_rises(rule):
    """One answer of each arm is told; refining one stays in its arm, a fresh answer takes any."""
    means, shares = [0.1, 0.3, 0.5, 0.9], []
    for seed in range(8):
        rng, tree, taken = np.random.default_rng(seed), Tree.start(), []
        for mean in means:
            tree = tree.grown(0, 0, mean)
        arms = dict(enumerate(range(4), start=1))
        for call in range(12):
            tree, requests = ask(jax.random.fold_in(jax.random.key(seed), call), tree, rule, 4)
            for request in requests:
                arm = arms[request.parent] if request.parent else int(rng.integers(4))
                arms[request.node] = arm
                taken.append(arm == 3)
                score = float(np.clip(means[arm] + 0.05 * rng.normal(), 0, 1))
                tree = tell(tree, request, score)
        shares.append((np.mean(taken[:12]), np.mean(taken[-24:])))
    early, late = np.array(shares).T
    # a search that learned nothing would stay at a quarter
    assert scipy.stats.ttest_1samp(late, 0.25, alternative="greater").pvalue < 1e-4
    assert scipy.stats.ttest_rel(late, early, alternative="greater").pvalue < 0.01


@pytest.mark.statistical
@pytest.mark.parametrize("posterior", [0, 1])
def test_first_walks_have_their_exact_chances(posterior):
    """Two answers told: where the third request goes, against the laws of the posteriors."""
    rule = RULES[posterior]
    tree, runs = Tree.start().grown(0, 0, 0.2).grown(0, 0, 0.9), 1500

    def law(scores):
        n, total = len(scores), sum(scores)
        if posterior:
            return scipy.stats.beta(0.5 + total, 0.5 + n - total)
        mean, deviation = total / max(n, 1), np.var(scores) * n if n else 0.0
        tau2 = (0.1 + deviation + n * mean**2 / (1 + n)) / (1 + n)
        return scipy.stats.t(1 + n, total / (1 + n), np.sqrt(tau2 / (1 + n)))

    def beats(one, other):
        return scipy.integrate.quad(lambda u: other.cdf(one.ppf(u)), 0, 1, limit=200)[0]

    new = beats(law([0.2, 0.9]), law([]))
    second = beats(law([0.9]), law([0.2]))
    exact = [new, (1 - new) * (1 - second), (1 - new) * second]
    keys = jax.random.split(jax.random.key(1), runs)
    parents = np.array([ask(key, tree, rule)[1][0].parent for key in keys])
    chosen = (parents[:, None] == np.arange(3)).astype(float)
    assert_mean(chosen, exact, family=6, smallest_bias=0.08)


def answer_of(request: Request) -> float:
    """A score that depends on the request alone, so that orders can be compared."""
    return float(np.random.default_rng(request.node).uniform())


@hypothesis.given(st.permutations(range(5)), st.integers(0, 3))
@hypothesis.settings(max_examples=10)
def test_the_order_of_telling_does_not_matter(order, repeated):
    rule = RULES[0]
    tree = Tree.start()
    for score in (0.3, 0.6, 0.65, 0.9, 0.1):
        tree = tree.grown(0, 0, score)
    asked, more = ask(jax.random.key(1), tree, rule, 5)
    assert len(more) == 5
    straight, shuffled = asked, asked
    for request in more:
        straight = tell(straight, request, answer_of(request))
    for index in order:
        shuffled = tell(shuffled, more[index], answer_of(more[index]))
    assert straight == shuffled
    assert tell(shuffled, more[repeated], answer_of(more[repeated])) == shuffled
    after = ask(jax.random.key(2), shuffled, rule, 4)
    assert after == ask(jax.random.key(2), straight, rule, 4)
    read = Tree.from_json(shuffled.to_json())
    assert read == shuffled and ask(jax.random.key(2), read, rule, 4) == after


def test_partly_told_trees_go_on_and_survive_text():
    rule = RULES[2]
    tree = Tree.start().grown(0).grown(0, 0, 0.1 + 0.2).grown(0).grown(2, 0, 1.0).grown(2)
    read = Tree.from_json(tree.to_json())
    assert read == tree and np.isnan(read.scores[[1, 3, 5]]).all()
    parents = []
    for seed in range(20):
        grown, requests = ask(jax.random.key(seed), read, rule, 6)
        assert len(requests) == 2 and grown.size == 8  # two were told
        parents += [request.parent for request in requests]
    assert set(parents) == {0, 2, 4}  # never below an answer that is not there
    # what is awaited changes no choice
    clean = Tree.start().grown(0, 0, 0.1 + 0.2).grown(1, 0, 1.0)
    for seed in range(20):
        one, other = (ask(jax.random.key(seed), t, rule, 2)[1] for t in (read, clean))
        assert [{0: 0, 2: 1, 4: 2}[r.parent] for r in one] == [r.parent for r in other]


def test_wrong_tellings_are_refused():
    tree, (request,) = ask(jax.random.key(0), Tree.start(), RULES[0])
    for wrong in (request._replace(node=7), request._replace(parent=1), request._replace(node=0)):
        with pytest.raises(ValueError, match="made no Request"):
            tell(tree, wrong, 0.5)
    for score in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"scores must be in \[0, 1\]"):
            tell(tree, request, score)
    told = tell(tree, request, 0.5)
    with pytest.raises(ValueError, match="was told 0.5 and now 0.75"):
        tell(told, request, 0.75)
    for text in ("[]", "{", '{"parents": [0], "actions": [0], "scores": [0.1]}'):
        with pytest.raises(ValueError, match="no saved tree"):
            Tree.from_json(text)


@pytest.mark.statistical
def test_a_batch_that_starts_slowly_does_not_widen_the_root():
    """Children of the root after 64 answers that improve by refining, 16 asked at a time."""
    rule = RULES[2]

    def width(batch, seed, slowly=True):
        key, tree, rng = jax.random.key(seed), Tree.start(), np.random.default_rng(seed)
        means = {0: None}
        while tree.size <= 64:
            step = jax.random.fold_in(key, tree.size)
            if slowly:
                tree, requests = ask(step, tree, rule, batch)
            else:  # the published batch, full from the first call on
                keys = jax.random.split(step, batch)
                requests = [ask(k, tree, rule)[1][0] for k in keys]
                requests = [r._replace(node=tree.size + i) for i, r in enumerate(requests)]
                for request in requests:
                    tree = tree.grown(request.parent)
            for node, parent, action in requests:
                drift = rng.uniform(0.1, 0.5) if parent == 0 else means[parent] + 0.1 * rng.normal()
                means[node] = float(np.clip(drift, 0, 1))
                tree = tell(tree, Request(node, parent, action), means[node])
        return (tree.parents[:65] == 0).sum()

    alone, slow, published = (
        [width(batch, seed, slowly) for seed in range(6)]
        for batch, slowly in ((1, True), (16, True), (16, False))
    )
    assert scipy.stats.ttest_ind(published, slow, alternative="greater").pvalue < 1e-3
    assert abs(np.mean(slow) - np.mean(alone)) < np.mean(published) - np.mean(alone)


def test_actions_are_learned():
    """Two actions over one tree: the better one is asked more often."""
    good, bad = bandit([0.9], batch=4), bandit([0.2], batch=4)
    found = ab_mcts(jax.random.key(0), (bad, good), budget=Budget(expansions=60))
    share = (found.tree.actions[1:] == 1).mean()
    assert share > 0.7 and set(found.tree.actions[1:]) == {0, 1}


def test_wrong_options_are_refused():
    problem, _, _ = toy()
    with pytest.raises(ValueError, match="may never end"):
        a_star(jax.random.key(0), problem, budget=Budget())
    with pytest.raises(ValueError, match="may never end"):
        ab_mcts(jax.random.key(0), problem, budget=Budget())
    with pytest.raises(ValueError, match=r"width must be in \[1, 3\]"):
        a_star(jax.random.key(0), problem, budget=Budget(tokens=9), width=4)
    with pytest.raises(ValueError, match=r"batch must be in \[1, 3\]"):
        ab_mcts(jax.random.key(0), problem, budget=Budget(tokens=9), batch=4)
    broken = problem._replace(
        expand=lambda *args: (problem.expand(*args)[0], jnp.full(WIDTH, jnp.nan), {})
    )
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\], the problem gave"):
        a_star(jax.random.key(0), broken, budget=Budget(tokens=9), width=3)


# ---- language models


LM, PRM = tiny.language_model(step_tokens=1), tiny.reward_model()


def tokens_of(text_state):
    written = text_state.written
    return tuple(np.asarray(written.tokens)[: int(written.length)].tolist())


@cache
def tiny_scores():
    return {
        tokens: tiny.scores(PRM, tokens, ends) for tokens, ends in tiny.texts(LM, LM.max_tokens)
    }


@pytest.mark.slow
def test_texts_of_a_search_have_the_scores_of_a_full_pass():
    problem = writing(LM, PRM, tiny.PROMPT, batch=4)._replace(text=None)
    found = a_star(jax.random.key(0), problem, budget=Budget(tokens=200), num_solutions=6, width=4)
    table = tiny_scores()
    assert len({tokens_of(text) for text, _ in found.states}) == 6  # copies are merged
    for (text, _), score in zip(found.states, found.scores, strict=True):
        assert score == pytest.approx(table[tokens_of(text)][-1], abs=1e-5)
    assert found.cost["tokens"] == found.cost["prm_tokens"] <= 200


def test_answers_and_their_repairs_have_the_scores_of_a_full_pass():
    (problem,) = answering(LM, PRM, tiny.PROMPT, max_steps=4, batch=4)
    problem = problem._replace(text=None)
    found = ab_mcts(jax.random.key(1), problem, budget=Budget(expansions=40), batch=3)
    table = tiny_scores()
    assert found.tree.depths.max() > 1
    rewritten = 0
    for node, (state, score) in enumerate(zip(found.states, found.scores, strict=True), start=1):
        tokens = tokens_of(state.text)
        steps = table[tokens]
        assert score == pytest.approx(steps[-1], abs=1e-5)
        number = int(state.steps)
        assert number == len(steps)
        marks = np.asarray(state.marks[1].score)[: number + 1]
        np.testing.assert_allclose(marks, [1.0, *steps], atol=1e-5)
        parent = int(found.tree.parents[node])
        if parent:  # what comes before the step that fell most is kept
            before = found.states[parent - 1]
            logs = np.log(np.asarray(before.marks[1].score)[: int(before.steps) + 1])
            kept = int(np.argmax(logs[:-1] - logs[1:]))
            length = int(np.asarray(before.marks[0].length)[kept])
            assert tokens[:length] == tokens_of(before.text)[:length]
            rewritten += length > 0
    assert rewritten > 0
    assert found.cost["tokens"] == found.cost["prm_tokens"]


@pytest.mark.slow
def test_a_repair_costs_what_it_writes():
    (problem,) = answering(LM, PRM, tiny.PROMPT, max_steps=4, batch=4)
    found = ab_mcts(jax.random.key(1), problem._replace(text=None), budget=Budget(expansions=30))
    written = 0
    for node, state in enumerate(found.states, start=1):
        kept = 0
        if parent := int(found.tree.parents[node]):
            before = found.states[parent - 1]
            logs = np.log(np.asarray(before.marks[1].score)[: int(before.steps) + 1])
            kept = int(np.asarray(before.marks[0].length)[np.argmax(logs[:-1] - logs[1:])])
        written += int(state.text.written.length) - kept
    assert found.cost["tokens"] == written


@pytest.mark.statistical
@pytest.mark.slow
def test_fresh_answers_follow_the_language_model():
    """Children of the root are plain samples: their texts have the model's probabilities."""
    (problem,) = answering(LM, PRM, tiny.PROMPT, max_steps=4, batch=500)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 500), problem.root)
    texts = {tokens: i for i, (tokens, _) in enumerate(tiny.texts(LM, 4))}
    exact = np.exp([tiny.log_probability(LM, tokens) for tokens in texts])
    counts = np.zeros(len(texts))
    for seed in range(8):
        children, _, _ = problem.expand(jax.random.key(seed), states, 500)
        written = children.text.written
        for row, n in zip(np.asarray(written.tokens), np.asarray(written.length), strict=True):
            counts[texts[tuple(row[:n].tolist())]] += 1
    common = exact * counts.sum() > 5
    observed = [*counts[common], counts[~common].sum()]
    expected = np.array([*exact[common], exact[~common].sum()])
    assert scipy.stats.chisquare(observed, expected / expected.sum() * sum(observed)).pvalue > 1e-3


def test_other_networks_cannot_continue_an_answer():
    with pytest.raises(ValueError, match="are different networks"):
        answering((LM, tiny.language_model(seed=5)), PRM, tiny.PROMPT)
    with pytest.raises(ValueError, match="must be text"):
        answering(LM, PRM, tiny.PROMPT, refine=lambda question, answer, score: question)


@pytest.mark.compile
def test_a_growing_tree_compiles_nothing_after_the_first_sizes():
    writer = writing(LM, PRM, tiny.PROMPT, batch=4)._replace(text=None)
    (answerer,) = answering(LM, PRM, tiny.PROMPT, max_steps=4, batch=4)
    answerer = answerer._replace(text=None)
    search = partial(a_star, problem=writer, budget=Budget(expansions=30), num_solutions=20)
    grow = partial(ab_mcts, problems=answerer, budget=Budget(expansions=40))
    other = writing(LM, PRM, [*tiny.PROMPT, tiny.A], batch=4)._replace(text=None)
    search(jax.random.key(0))
    grow(jax.random.key(0))
    assert compilations(lambda: search(jax.random.key(1))) == 0, "another key"
    assert compilations(lambda: search(jax.random.key(1), problem=other)) == 0, (
        "another prompt of the same padded length"
    )
    # another tree may have a node with more children than any before: one more power of two
    assert compilations(lambda: grow(jax.random.key(1))) <= 1


# ---- the shipped models


STORIES = tasks.problems(seed=11, count=2)


@pytest.fixture(scope="module")
def models():
    return shipped_language_model(), shipped_reward_model()


@pytest.mark.parametrize(
    "story", [STORIES[0], pytest.param(STORIES[1], marks=pytest.mark.slow)], ids=["first", "second"]
)
def test_a_star_solves_and_accounts_for_every_token(models, story):
    lm, prm = models
    problem = writing(lm, prm, story.question + "\n", batch=4)
    states = []

    def recorded(key, parents, count):
        children, scores, cost = problem.expand(key, parents, count)
        states.append((parents, children, count))
        return children, scores, cost

    watched = problem._replace(expand=recorded)
    found = a_star(jax.random.key(0), watched, budget=Budget(tokens=1200))
    written = sum(int((c[0].written.length - p[0].written.length)[:n].sum()) for p, c, n in states)
    assert found.cost["tokens"] == found.cost["prm_tokens"] == written <= 1200
    assert found.cost["expansions"] == sum(n for *_, n in states) == found.tree.size - 1
    assert len(found.texts) == 1 and "Answer:" in found.texts[0]
    lines = found.texts[0].strip().split("\n")
    np.testing.assert_allclose(
        found.scores[0], prm.score(story.question + "\n", lines)[-1], atol=2e-3
    )
    for parents, children, n in states:  # padding is not written
        written = children[0].written
        assert (np.asarray(written.length - written.begin)[n:] == 0).all()


@pytest.mark.parametrize(
    "story", [STORIES[0], pytest.param(STORIES[1], marks=pytest.mark.slow)], ids=["first", "second"]
)
def test_ab_mcts_answers_and_accounts_for_every_token(models, story):
    lm, prm = models
    (problem,) = answering(lm, prm, story.question + "\n", batch=4)
    found = ab_mcts(jax.random.key(0), problem, budget=Budget(tokens=1500))
    written = 0
    for node, state in enumerate(found.states, start=1):
        kept = 0
        if parent := int(found.tree.parents[node]):
            before = found.states[parent - 1]
            logs = np.log(np.asarray(before.marks[1].score)[: int(before.steps) + 1])
            kept = int(np.asarray(before.marks[0].length)[np.argmax(logs[:-1] - logs[1:])])
        written += int(state.text.written.length) - kept
    assert found.cost["tokens"] == found.cost["prm_tokens"] == written <= 1500
    best = int(np.argmax(found.scores))
    lines = found.texts[best].strip().split("\n")
    np.testing.assert_allclose(
        found.scores[best], prm.score(story.question + "\n", lines)[-1], atol=2e-3
    )


@pytest.mark.slow
def test_refining_by_prompt_writes_to_that_prompt(models):
    """A refinement that asks another question gets the other question's answers."""
    lm, prm = models
    first, second = (story.question + "\n" for story in STORIES)
    asked = []

    def refine(question, answer, score):
        asked.append((question, answer, score))
        return second

    (problem,) = answering(lm, prm, first, batch=4, refine=refine)
    (other,) = answering(lm, prm, second, batch=4)
    key = jax.random.key(3)
    roots = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), problem.root)
    fresh, scores, cost = problem.expand(key, roots, 2)
    assert asked == [] and set(cost) == {"tokens", "prm_tokens", "prompt_tokens"}
    refined, _, _ = problem.expand(key, fresh, 2)
    expected, _, _ = other.expand(
        key, jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), other.root), 2
    )
    for row in range(2):
        assert lm.text(row_of(refined, row).text) == lm.text(row_of(expected, row).text)
        question, answer, score = asked[row]
        assert question == first and answer == lm.text(row_of(fresh, row).text)
        assert score == pytest.approx(float(scores[row]))
    with pytest.raises(ValueError, match="prompt_tokens is 32"):
        answering(lm, prm, first, batch=4, refine=refine, prompt_tokens=32)[0].expand(key, fresh, 2)


def test_two_temperatures_are_two_actions(models):
    lm, prm = models
    cool = LanguageModel.from_pretrained(shipped("reasoner"), temperature=0.5)
    cool = eqx.tree_at(lambda lm: lm.weights, cool, lm.weights)  # the same arrays
    problems = answering((lm, cool), prm, STORIES[0].question + "\n", batch=4)
    found = ab_mcts(jax.random.key(0), problems, budget=Budget(expansions=8))
    assert set(found.tree.actions[1:].tolist()) <= {0, 1} and found.tree.size == 9
