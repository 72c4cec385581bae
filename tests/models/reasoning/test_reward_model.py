"""The reward model: incremental reading equals a full pass; broken folders are refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import processors

from smcscale.models import parameters
from smcscale.models.reasoning import reason, transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.solve import (
    shipped,
    shipped_language_model,
    shipped_reward_model,
)
from smcscale.models.reasoning.tokenizer import word_level
from smcscale.models.reasoning.transformer import Transformer
from support.reasoning import tiny


@pytest.mark.parametrize(
    "confidence", [None, pytest.param(np.array([[0.1, 0.3]]), marks=pytest.mark.slow)]
)
def test_reading_step_by_step_equals_a_full_pass(confidence):
    lm = tiny.language_model(step_tokens=3, max_tokens=12).given(tiny.PROMPT)
    prm = tiny.reward_model(confidence=confidence).given(tiny.PROMPT)
    state, judged, ends, found = lm.start(), prm.start(lm), [], []
    for index in range(5):
        state = lm.next_step(state).sample(jax.random.key(index))
        judged = prm.read(judged, state, lm.step_tokens)
        if int(state.step_length):
            ends.append(int(state.written.length))
            found.append(float(judged.score))
    tokens = [int(t) for t in state.written.tokens[: ends[-1]]]
    np.testing.assert_allclose(found, tiny.scores(prm, tokens, ends), atol=1e-5)


def test_shipped_scores_are_probabilities_and_see_an_error():
    prm = shipped_reward_model()
    question = "Ana has 14 apples. Then she buys 7 more apples. Later, Ana gives 5 apples away. "
    question += "How many apples does Ana have now?\n"
    right = prm.score(question, ["Ana: 14 + 7 = 21", "Ana: 21 - 5 = 16", "Answer: 16"])
    wrong = prm.score(question, ["Ana: 14 + 7 = 29", "Ana: 29 - 5 = 24", "Answer: 24"])
    assert right.shape == (3,)
    assert ((right >= 0) & (right <= 1)).all()
    assert right[-1] > wrong[-1]
    assert prm.score(question, []).shape == (0,)


def test_a_step_does_not_depend_on_later_ones():
    prm = shipped_reward_model()
    both = prm.score("Ana has 4 eggs.\n", ["Ana: 4 + 7 = 11", "Ana: 11 - 5 = 6"])
    first = prm.score("Ana has 4 eggs.\n", ["Ana: 4 + 7 = 11"])
    np.testing.assert_allclose(both[0], first[0], atol=1e-5)


def test_shipped_scores_are_those_that_the_filter_sees():
    lm, prm = shipped_language_model(), shipped_reward_model()
    question = "Ana has 14 apples. She buys 7 more apples. How many apples does Ana have now?\n"
    lm, given = lm.given(lm.read(question)), prm.given(question)
    state, judged, seen = lm.start(), given.start(lm), []
    for index in range(2):
        state = lm.next_step(state).sample(jax.random.key(index))
        judged = given.read(judged, state, lm.step_tokens)
        seen.append(float(judged.score))
    steps = lm.text(state).rstrip("\n").split("\n")
    np.testing.assert_allclose(prm.score(question, steps), seen, atol=1e-4)


@pytest.mark.refusal
def test_steps_must_be_a_list():
    with pytest.raises(TypeError, match="needs a list"):
        shipped_reward_model().score("question", "Answer: 3")


def test_a_head_of_another_width_is_refused():
    model = tiny.backbone()
    for head in (np.zeros((3, 16)), np.zeros((1, 15))):
        with pytest.raises(ValueError, match="reward head has shape"):
            ProcessRewardModel(model, head, np.zeros(len(head)), None)
    with pytest.raises(ValueError, match="confidence has shape"):
        ProcessRewardModel(model, np.zeros((1, 16)), np.zeros(1), None, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="bias has shape"):
        ProcessRewardModel(model, np.zeros((1, 16)), np.zeros(2), None)
    sure = ProcessRewardModel(model, np.zeros((1, 16)), np.zeros(1), None, np.ones((1, 2)))
    with pytest.raises(ValueError, match="reads how likely the text is"):
        sure.value(np.ones(16, np.float32))
    two = ProcessRewardModel(model, np.zeros((2, 16)), np.array([0.0, np.log(3)]), None)
    np.testing.assert_allclose(two.value(np.ones(16, np.float32)), 0.75, rtol=1e-6)


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(ValueError, match=r"no tensor 'score.weight'.*plain Qwen2ForCausalLM"):
        ProcessRewardModel.from_pretrained(shipped("reasoner"))


def test_a_folder_with_a_wide_head_is_refused(tmp_path):
    source = shipped("reasoner-prm")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    tensors = parameters.load(source)
    tensors |= {"score.weight": np.zeros((5, tensors["score.weight"].shape[1]), np.float32)}
    parameters.save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"reward head has shape \(5,"):
        ProcessRewardModel.from_pretrained(tmp_path)
    assert Config.from_hf(parameters.read_json(source / "config.json")).tied


def test_an_untied_backbone_needs_no_logits(tmp_path):
    config = replace(tiny.backbone().config, tied=False)
    model = Transformer(config, rngs=nnx.Rngs(1))
    tensors = transformer.to_hf(model)
    del tensors["lm_head.weight"]
    tensors["score.weight"] = np.ones((1, config.hidden_size), np.float32)
    parameters.save(tmp_path / "model.safetensors", tensors, np.float32)
    raw = config.to_hf("ForTokenClassification")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    words = word_level(["a"])
    words.save(tmp_path / "tokenizer.json")
    prm = ProcessRewardModel.from_pretrained(tmp_path)
    hidden = model(jnp.arange(3)[None])[0, -1]
    np.testing.assert_allclose(prm.value(hidden), jax.nn.sigmoid(jnp.sum(hidden)), rtol=1e-5)


def test_models_that_read_other_tokens_are_refused():
    words = [word_level(["apples", "pears"]), word_level(["pears", "apples"])]
    assert words[0].within(word_level(["apples", "pears", "figs"]))
    lm = LanguageModel(tiny.backbone(), words[0], np.zeros(4, bool))
    prm = ProcessRewardModel(tiny.backbone(), np.zeros((1, 16)), np.zeros(1), words[1])
    with pytest.raises(ValueError, match="mean other words"):
        reason(lm, prm, [1, 2], max_steps=2)


def test_a_prompt_gets_the_first_token_of_its_tokenizer():
    words = word_level(["a", "b"])
    words._backend.post_processor = processors.TemplateProcessing(
        single="[PAD] $A <end>", special_tokens=[("[PAD]", 0), ("<end>", 2)]
    )
    plain = words.encode("a b")
    assert words.encode_prompt("a b") == [0, *plain]  # what follows a text is not written yet
    assert words.encode_prompt("[PAD] a b") == [0, *plain]
