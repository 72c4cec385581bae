"""Every form of reward model: equal to torch, and to itself however a text is cut."""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from smcscale.models.reasoning import cache, reward_forms
from smcscale.models.reasoning.decode import Written
from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.models.reasoning.reward_forms import Form
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.rewards import RewardFunction, SelfCertainty, self_evaluation
from support.reasoning import rewards, tiny
from support.reasoning.rewards import CASES, PROMPT, STEPS

HERE = Path(__file__).parent
TOLERANCE = 1e-4


def stored(name, path):
    """The reward model of the stored references, and torch's scores."""
    every = load_file(HERE / "reward_references.safetensors")
    tensors = {k.split("/", 1)[1]: v for k, v in every.items() if k.startswith(f"{name}/")}
    expected = tensors.pop("scores")
    case = CASES[name]
    rewards.write_folder(path, rewards.configuration(case), tensors)
    return ProcessRewardModel.from_pretrained(path, form=case.form), expected


@functools.cache
def language_model():
    words = rewards.tokenizer()
    model = tiny.backbone(3, words.vocabulary_size, 2.0)
    ends = words.ends_step("\n", model.config.vocabulary_size)
    return LanguageModel(model, words, ends, step_tokens=6, max_tokens=30)


def states(lm, steps=STEPS, end=True):
    """The states of a text that is written step by step; the last step ends it."""
    words, room = rewards.tokenizer(), lm.max_tokens
    tokens, lengths, found = [], [0], []
    for number, step in enumerate(steps):
        final = end and number == len(steps) - 1
        tokens += [*words.encode(step), 2] if final else words.encode(step + "\n")
        lengths.append(len(tokens))
        row = jnp.zeros(room, jnp.int32).at[: len(tokens)].set(jnp.asarray(tokens))
        written = Written(
            row, jnp.int32(len(tokens)), jnp.int32(lengths[-2]), jnp.asarray(final),
            cache.empty(lm.config, room),
        )  # fmt: skip
        found.append(TextState(written))
    return found


@eqx.filter_jit
def read(prm, judged, state, step_tokens):
    return prm.read(judged, state, step_tokens)


def read_all(prm, lm, steps=STEPS, end=True):
    judged, found, written = prm.start(lm, len(steps)), [], states(lm, steps, end)
    for state in written:
        judged = read(prm, judged, state, lm.step_tokens)
        found.append(float(judged.score))
    again = read(prm, judged, written[-1], lm.step_tokens)  # no newer step: nothing changes
    assert float(again.score) == found[-1] and int(again.spent) == 0
    return found


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_stored_scores_of_torch(name, tmp_path):
    prm, expected = stored(name, tmp_path)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(prm.score(PROMPT, STEPS, complete=False), expected, atol=TOLERANCE)
    lm = language_model()
    found = read_all(prm.given(PROMPT), lm, end=False)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_torch(name, seed, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    case = CASES[name]
    raw, tensors, score = rewards.torch_model(case, 100 + seed)
    rewards.write_folder(tmp_path, raw, tensors)
    prm = ProcessRewardModel.from_pretrained(tmp_path, form=case.form)
    expected = [score(text) for text in rewards.texts(name)]
    np.testing.assert_allclose(prm.score(PROMPT, STEPS, complete=False), expected, atol=TOLERANCE)


def test_the_whole_answer_as_one_step_equals_torch(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    raw, tensors, score = rewards.torch_model(CASES["qwen"], 7)
    rewards.write_folder(tmp_path, raw, tensors)
    prm = ProcessRewardModel.from_pretrained(tmp_path)
    expected = [score(text) for text in rewards.texts("whole qwen")]
    whole = prm.whole()
    np.testing.assert_allclose(whole.score(PROMPT, STEPS), expected, atol=TOLERANCE)
    lm = language_model()
    np.testing.assert_allclose(read_all(whole.given(PROMPT), lm), expected, atol=TOLERANCE)
    by_step = prm.score(PROMPT, STEPS)
    np.testing.assert_allclose(by_step[0], expected[0], atol=TOLERANCE)
    assert abs(float(by_step[-1]) - expected[-1]) > 10 * TOLERANCE  # another function of the text


def every_reward(path):
    """All rewards, each with what it is called."""
    for index, name in enumerate(CASES):
        folder = path / str(index)
        folder.mkdir()
        prm, _ = stored(name, folder)
        yield name, prm
        if name in ("qwen", "rlhflow"):
            yield f"whole {name}", prm.whole()
    lm = language_model()
    yield "self-evaluation", self_evaluation(lm, "right?", yes="yes", no="no")
    yield "certainty", SelfCertainty(lm)
    yield "entropy", SelfCertainty(lm, entropy=True)
    yield "function", RewardFunction(share_of_digits, rewards.tokenizer())


def share_of_digits(state):
    """The share of digits among the tokens of a text."""
    tokens = state.written.tokens
    digits = (tokens >= 4) & (tokens < 14) & (jnp.arange(len(tokens)) < state.written.length)
    return jnp.sum(digits) / state.written.length


@pytest.mark.slow
def test_a_prefix_has_the_same_score_alone_and_inside_a_longer_text(tmp_path):
    lm = language_model()
    for name, prm in every_reward(tmp_path):
        scores = np.asarray(prm.score(PROMPT, STEPS))
        assert scores.shape == (3,) and (scores > 0).all() and (scores < 1).all(), name
        alone = prm.score(PROMPT, STEPS[:2])
        np.testing.assert_allclose(alone, scores[:2], atol=1e-5, err_msg=name)
        assert prm.score(PROMPT, []).shape == (0,)
        if name not in ("certainty", "entropy"):  # these read what the writer remembers: see below
            given = prm.given(PROMPT)
            np.testing.assert_allclose(read_all(given, lm), scores, atol=1e-5, err_msg=name)


@eqx.filter_jit
def write(lm, state, key):
    return lm.next_step(state).sample(key)


@pytest.mark.parametrize("entropy", [False, True])
def test_certainty_of_what_was_written_equals_a_full_pass(entropy):
    lm = language_model().given(PROMPT)
    certainty = SelfCertainty(lm, entropy)
    state, judged = lm.start(), certainty.start(lm)
    assert float(judged.score) == 1
    for index in range(4):
        state = write(lm, state, jax.random.key(index))
        judged = read(certainty, judged, state, lm.step_tokens)
        begin, end = int(state.written.begin), int(state.written.length)
        tokens = [*rewards.tokenizer().encode_prompt(PROMPT), *state.written.tokens.tolist()[:end]]
        padded = np.pad(tokens, (0, 48 - len(tokens)))  # one compilation for all lengths
        log_probs = np.asarray(jax.nn.log_softmax(lm.logits(padded)), np.float64)
        rows = np.arange(len(tokens) - (end - begin), len(tokens))
        told = log_probs[rows - 1, np.asarray(tokens)[rows]]
        if entropy:
            told = np.sum(np.exp(log_probs) * log_probs, -1)[rows - 1]
        assert float(judged.score) == pytest.approx(np.exp(told.mean()), abs=1e-5)


def test_self_evaluation_is_the_share_of_yes_at_the_next_token():
    lm = language_model()
    prm = self_evaluation(lm, "right?", yes="yes", no="no")
    words = rewards.tokenizer()
    tokens = words.encode_prompt(PROMPT) + words.encode("2 + 3 = 5 right?")
    logits = np.asarray(lm.logits(tokens))[-1]
    yes, no = (np.exp(logits[words.encode(word)[0]]) for word in ("yes", "no"))
    np.testing.assert_allclose(prm.score(PROMPT, STEPS)[0], yes / (yes + no), atol=1e-5)
    with pytest.raises(ValueError, match="must be one token"):
        self_evaluation(lm, "right?", yes="yes yes", no="no")
    with pytest.raises(ValueError, match="needs a question"):
        self_evaluation(lm, "", yes="yes", no="no")


@eqx.filter_jit
def read_both(prm, judged, states, step_tokens):
    return jax.vmap(lambda j, s: prm.read(j, s, step_tokens))(judged, states)


def test_many_texts_are_read_at_once(tmp_path):
    """Under `vmap`, texts of other lengths, one of them finished before."""
    prm, _ = stored("qwen", tmp_path)
    lm = language_model()
    prm = prm.given(PROMPT)
    other = ("5 = 5", "Answer: 4")
    rows = [states(lm), [*states(lm, other), states(lm, other)[-1]]]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    judged = stack([prm.start(lm, 3)] * 2)
    for pair in zip(*rows, strict=True):
        judged = read_both(prm, judged, stack(pair), lm.step_tokens)
    expected = [prm.score(PROMPT, STEPS)[-1], prm.score(PROMPT, other)[-1]]
    np.testing.assert_allclose(judged.score, expected, atol=1e-5)
    assert judged.spent.tolist()[1] == 0


def test_marks_are_counted_and_newlines_are_not(tmp_path):
    prm, _ = stored("qwen", tmp_path)
    lm = language_model()
    prm = prm.given(PROMPT)
    judged = read(prm, prm.start(lm), states(lm)[0], lm.step_tokens)
    assert int(judged.seen) == 6 and int(judged.length) == int(judged.spent) == 6
    judged = read(prm, judged, states(lm)[1], lm.step_tokens)
    assert int(judged.seen) == 12 and int(judged.length) == 12
    whole = prm.whole().given(PROMPT)
    judged = read(whole, whole.start(lm), states(lm)[0], lm.step_tokens)
    assert int(judged.length) == 5 and int(judged.spent) == 6  # the newline comes with the next


def test_a_newline_that_comes_late_takes_no_room_from_a_step(tmp_path):
    """The second step is cut off at its last possible token, after a newline still to be read."""
    prm, _ = stored("qwen", tmp_path)
    lm, steps = language_model(), ("2 + 3 = 5", "5 - 1 = 4 4")
    whole = prm.whole().given(PROMPT)
    first, second = states(lm, steps, end=False)
    second = eqx.tree_at(lambda s: s.written.length, second, second.written.length - 1)
    assert int(second.step_length) == lm.step_tokens
    judged = read(whole, whole.start(lm), first, lm.step_tokens)
    judged = read(whole, judged, second, lm.step_tokens)
    np.testing.assert_allclose(judged.score, whole.score(PROMPT, steps)[1], atol=1e-5)


@pytest.mark.refusal
def test_a_form_that_is_not_known_or_does_not_fit_is_refused(tmp_path):
    _, tensors = _plain("qwen")
    write = functools.partial(rewards.write_folder, tmp_path)
    raw = rewards.configuration(CASES["qwen"])
    load = functools.partial(ProcessRewardModel.from_pretrained, tmp_path)

    head = {k: v for k, v in tensors.items() if k.startswith("score")}
    backbone = {k: v for k, v in tensors.items() if k not in head}
    write(raw | {"architectures": ["Qwen2ForCausalLM"]}, tensors)
    with pytest.raises(ValueError, match="does not say how its steps are marked"):
        load()
    write(raw | {"architectures": ["Qwen2ForCausalLM"]}, backbone)
    with pytest.raises(ValueError, match="plain Qwen2ForCausalLM"):
        load()
    with pytest.raises(ValueError, match="has no reward head, but `form` reads a head"):
        load(form=reward_forms.qwen_math_prm)
    load(form=reward_forms.rlhflow)
    write(raw, tensors)
    with pytest.raises(ValueError, match=r"the head 'score.2.weight', but `form` reads token"):
        load(form=reward_forms.rlhflow)
    write(raw, tensors | {"v_head.weight": np.ones((1, 16), np.float32)})
    with pytest.raises(ValueError, match=r"several reward heads: score.2.weight, v_head.weight"):
        load()
    write(raw, {k: v for k, v in tensors.items() if k != "score.0.weight"})
    with pytest.raises(ValueError, match=r"no tensor 'score.0.weight'"):
        load()
    write(raw, tensors | {"score.0.weight": np.ones((16, 15), np.float32)})
    with pytest.raises(ValueError, match="first layer has shapes"):
        load()
    write(raw, tensors | {"score.2.weight": np.ones((60, 16), np.float32)})
    with pytest.raises(ValueError, match=r"reward head has shape \(60, 16\)"):
        load()


@pytest.mark.refusal
def test_words_that_the_tokenizer_lacks_are_refused():
    words = rewards.word_level(["a"])
    for form in (reward_forms.qwen_math_prm, reward_forms.math_shepherd, reward_forms.rlhflow):
        with pytest.raises(ValueError, match="a mark must be one token"):
            form(words)


@pytest.mark.refusal
def test_a_prompt_in_a_chat_template_is_not_wrapped_again(tmp_path):
    prm, _ = stored("qwen", tmp_path)
    with pytest.raises(ValueError, match="would wrap it once more"):
        prm.prompted("<|im_start|>user\nhas<|im_end|>")
    wide = Form(mark=(1, 2), place=3)
    with pytest.raises(ValueError, match="reads token 3 of a mark of 2 tokens"):
        ProcessRewardModel(tiny.backbone(), np.zeros((1, 16)), np.zeros(1), None, form=wide)
    with pytest.raises(ValueError, match="takes no marks"):
        ProcessRewardModel(
            tiny.backbone(), np.zeros((1, 16)), np.zeros(1), None, np.ones((1, 2)),
            form=Form(mark=(1,), place=1),
        )  # fmt: skip


@pytest.mark.refusal
def test_a_function_must_give_one_number():
    lm = language_model()
    prm = RewardFunction(lambda state: state.written.tokens)
    with pytest.raises(ValueError, match=r"array of shape \(30,\)"):
        prm.read(prm.start(lm), states(lm)[0], lm.step_tokens)
    with pytest.raises(ValueError, match="without tokenizer"):
        prm.score(PROMPT, STEPS)


def _plain(name):
    every = load_file(HERE / "reward_references.safetensors")
    found = {k.split("/", 1)[1]: v for k, v in every.items() if k.startswith(f"{name}/")}
    return found.pop("scores"), found
