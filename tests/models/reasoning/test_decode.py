"""Writing steps: the law by enumeration, any nesting of `vmap`, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale.models.reasoning import decode
from support.reasoning import tiny

LM = tiny.language_model()
GIVEN = LM.given(tiny.PROMPT)


def run(lm, state, key, steps):
    for index in range(steps):
        state = lm.next_step(state).sample(jax.random.fold_in(key, index))
    return state


def batch(state, *shape):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), state)


def test_texts_are_drawn_with_their_probabilities():
    number = 20_000
    texts = tiny.texts(LM, 2)
    expected = np.exp([tiny.log_probability(LM, tokens) for tokens, _ in texts])
    assert abs(expected.sum() - 1) < 1e-5
    states = batch(GIVEN.start(), number)
    for index in range(2):
        key = jax.random.key(index)
        states = jax.jit(
            lambda lm, key, states: jax.vmap(lambda s: lm.next_step(s).sample(key))(states)
        )(GIVEN, key, states)
    tokens, length = np.asarray(states.written.tokens), np.asarray(states.written.length)
    where = {text: i for i, (text, _) in enumerate(texts)}
    seen = np.bincount(
        [where[tuple(row[:n].tolist())] for row, n in zip(tokens, length, strict=True)],
        minlength=len(texts),
    )
    rare = expected * number < 5
    observed = np.append(seen[~rare], seen[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * number
    keep = wanted > 0
    wanted = wanted[keep] * observed[keep].sum() / wanted[keep].sum()
    assert scipy.stats.chisquare(observed[keep], wanted).pvalue > 1e-3


@pytest.mark.slow
def test_log_prob_is_that_of_a_full_pass_and_sums_to_one():
    state = GIVEN.start()
    total = 0.0
    for tokens, ends in tiny.texts(LM, 1):
        value = run(GIVEN, state, jax.random.key(0), 1)
        written = value.written
        written = decode.Written(
            jnp.zeros_like(written.tokens).at[: len(tokens)].set(jnp.asarray(tokens)),
            jnp.asarray(len(tokens), jnp.int32), jnp.zeros((), jnp.int32), written.finished,
            written.cache,
        )  # fmt: skip
        found = GIVEN.next_step(state).log_prob(type(value)(written))
        np.testing.assert_allclose(found, tiny.log_probability(LM, tokens), atol=1e-5)
        total += np.exp(float(found))
        assert ends == (len(tokens),)
    assert abs(total - 1) < 1e-5


def test_a_step_that_the_sampler_cannot_write_has_probability_zero():
    state = GIVEN.start()
    value = run(GIVEN, state, jax.random.key(0), 1)

    def log_prob(tokens):
        written = decode.Written(
            jnp.zeros(4, jnp.int32).at[: len(tokens)].set(jnp.asarray(tokens)),
            jnp.asarray(len(tokens), jnp.int32), value.written.begin, value.written.finished,
            value.written.cache,
        )  # fmt: skip
        return float(GIVEN.next_step(state).log_prob(type(value)(written)))

    assert log_prob([tiny.A]) == -np.inf  # stops before the end of a step
    assert log_prob([tiny.BREAK, tiny.A]) == -np.inf  # runs on past it
    assert log_prob([tiny.A, tiny.A, tiny.A]) == -np.inf  # longer than a step
    assert np.isfinite(log_prob([tiny.BREAK]))


def test_a_finished_text_stays_as_it_is():
    state = GIVEN.start()
    key = 0
    while not bool(state.finished):
        state = run(GIVEN, state, jax.random.key(key), 1)
        key += 1
    after = run(GIVEN, state, jax.random.key(99), 1)
    assert int(after.step_length) == 0
    np.testing.assert_array_equal(after.written.tokens, state.written.tokens)
    np.testing.assert_array_equal(after.written.cache.keys, state.written.cache.keys)
    assert float(GIVEN.next_step(state).log_prob(after)) == 0.0


def test_tokens_are_those_of_the_uniforms_and_full_passes():
    lm = tiny.language_model(step_tokens=6, max_tokens=6).given(tiny.PROMPT)
    key = jax.random.key(5)
    state = lm.next_step(lm.start()).sample(key)
    uniforms = jax.random.uniform(key, (1, 6))[0]
    length = int(state.written.length)
    tokens = [int(t) for t in state.written.tokens[:length]]
    for index in range(length):
        logits = lm.logits([*tiny.PROMPT, *tokens[:index]])[-1]
        assert int(decode.draw_tokens(uniforms[index][None], logits[None])[0]) == tokens[index]
    _, (keys, _) = lm.model(jnp.asarray([[*tiny.PROMPT, *tokens]]), keys_values=True)
    start = len(tiny.PROMPT) - 1
    np.testing.assert_allclose(
        np.swapaxes(state.written.cache.keys, 1, 2)[:, :length],
        keys[:, 0, start : start + length],
        atol=1e-5,
    )


@pytest.mark.parametrize("width", [5, 300, 1000])
def test_two_level_draws_equal_one_level_draws(width):
    logits = jax.random.normal(jax.random.key(0), (500, width)).at[:, ::3].set(-jnp.inf)
    uniforms = jax.random.uniform(jax.random.key(1), (500,)).at[0].set(0.0).at[1].set(0.99999994)
    two = decode.draw_tokens(uniforms, logits)
    one = decode.draw_tokens(uniforms, logits, block=10_000)
    assert np.isfinite(np.take_along_axis(np.asarray(logits), np.asarray(two)[:, None], 1)).all()
    assert (np.asarray(two) == np.asarray(one)).mean() > 0.99  # rounding at cell borders


def test_nested_vmap_equals_a_loop_and_runs_do_not_depend_on_their_number():
    states = batch(GIVEN.start(), 3, 5)
    keys = jax.random.split(jax.random.key(1), 3)

    @jax.jit
    def nested(lm, keys, states):
        inner = lambda key, run: jax.vmap(lambda s: lm.next_step(s).sample(key))(run)
        return jax.vmap(inner)(keys, states)

    together = nested(GIVEN, keys, states)
    alone = nested(GIVEN, keys[1:2], jax.tree.map(lambda x: x[1:2], states))
    np.testing.assert_array_equal(together.written.tokens[1], alone.written.tokens[0])
    rows = {tuple(row) for row in np.asarray(together.written.tokens[0]).tolist()}
    assert len(rows) > 1  # one key, yet each particle its own draw


def test_the_loop_is_never_mapped():
    def step(lm, key, states):
        return jax.vmap(lambda s: lm.next_step(s).sample(key))(states)

    mapped = jax.make_jaxpr(step)(GIVEN, jax.random.key(0), batch(GIVEN.start(), 7))
    text = str(mapped)
    assert text.count("while[") == 1
    assert "pred[7]" not in text  # a batched condition would select over the whole cache


def test_a_prompt_in_the_state_and_a_given_one_write_the_same():
    key = jax.random.key(3)
    given = GIVEN.next_step(GIVEN.start()).sample(key)
    carried = LM.next_step(LM.start(tiny.PROMPT)).sample(key)
    np.testing.assert_array_equal(given.written.tokens, carried.written.tokens)
    other = LM.start([tiny.B, tiny.A])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), LM.start(tiny.PROMPT), other)
    keys = jax.random.split(key, 2)
    mapped = jax.vmap(lambda k, s: LM.next_step(s).sample(k))(keys, both)
    for index, state in enumerate([LM.start(tiny.PROMPT), other]):
        alone = LM.next_step(state).sample(keys[index])
        np.testing.assert_array_equal(mapped.written.tokens[index], alone.written.tokens)


def test_mapped_weights_are_refused():
    many = jax.tree.map(lambda x: jnp.stack([x, x]), GIVEN)
    with pytest.raises(NotImplementedError, match="weights or temperature are mapped"):
        jax.vmap(lambda lm: lm.next_step(GIVEN.start()).sample(jax.random.key(0)))(many)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must be in \[0, 4\)"):
        LM.logits([0, 4])
    with pytest.raises(ValueError, match="one row of integers"):
        LM.logits([0.5])
    with pytest.raises(ValueError, match="the prompt is empty"):
        LM.start([])
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        LM.start([1] * 61)
    with pytest.raises(ValueError, match="needs a prompt"):
        LM.start()
    with pytest.raises(ValueError, match="without tokenizer"):
        LM.start("text")
    with pytest.raises(NotImplementedError, match="one step at a time"):
        GIVEN.next_step(GIVEN.start()).sample(jax.random.key(0), (3,))
    with pytest.raises(ValueError, match="temperature must be positive"):
        type(LM)(tiny.backbone(), None, np.ones(4, bool), temperature=0.0)
    assert LM.logits([]).shape == (0, 4)
