"""`host_reason`: a Python judge of a model small enough to enumerate; judged once; refusals."""

import asyncio

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.reasoning.host_program import host_reason, texts_of
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.potentials import Potential, difference, product
from smcscale.models.reasoning.tokenizer import Tokenizer
from support.compilations import compilations
from support.montecarlo import assert_mean
from support.reasoning import tiny

STEPS = 3
WORDS = {"<end>": tiny.STOP, "<next>": tiny.BREAK, "a": tiny.A, "b": tiny.B}
PROMPT = "a b b"


def language_model() -> LanguageModel:
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = np.array([True, True, False, False])
    words = Tokenizer(backend, (tiny.STOP,))
    return LanguageModel(tiny.backbone(0), words, ends, step_tokens=2, max_tokens=4)


LM = language_model()
TEXTS = tiny.texts(LM, STEPS)
PROBABILITY = np.exp([tiny.log_probability(LM, tokens) for tokens, _ in TEXTS])


def score(words) -> float:
    """Likes `b`, and a text that goes on."""
    return 0.1 + 0.7 * (words.count("b") + 1) / (len(words) + 2) - 0.05 * words.count("<end>")


def judge(prompt, texts):
    assert prompt == PROMPT and len(set(texts)) == len(texts)
    return [score(text.split()) for text in texts]


def run(potential=difference, num_particles=8, num_runs=1, judge=judge, **options):
    program = host_reason(LM, judge, PROMPT, max_steps=STEPS, potential=potential, **options)
    smc = SMC(
        ParticleFilter(program, trigger=triggers.always, store="last"),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(5))
    return smc


def scores_of(tokens, ends):
    names = list(WORDS)
    return [score([names[token] for token in tokens[:end]]) for end in ends]


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("potential", "options"),
    [(difference, {}), (product, {}), (difference, {"unfinished": "drop"})],
    ids=["difference", "product", "dropped"],
)
def test_evidence_is_that_of_all_texts(potential, options):
    terms = [scores_of(*text) for text in TEXTS]
    weights = np.array([s[-1] if potential is difference else np.prod(s) for s in terms])
    if options:  # texts that do not end count as nothing
        ended = [tokens[-1] == tiny.STOP for tokens, _ in TEXTS]
        weights = weights * ended
    smc = run(potential, 8, 1500, **options)
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64)) / (PROBABILITY @ weights)
    assert_mean(ratio, 1.0, family=3, smallest_bias=0.06)


def test_texts_scores_and_costs_are_told():
    smc = run(num_particles=6)
    samples, _ = smc.get_samples(weighted=True)
    texts = texts_of(smc, LM)
    expected = [score(text.split()) for text in texts]
    np.testing.assert_allclose(np.asarray(samples["score"]), expected, rtol=1e-6)
    assert smc.cost["tokens"] >= sum(len(text.split()) for text in texts) > 0


@pytest.mark.slow
def test_a_judge_may_be_async():
    async def later(prompt, texts):
        return judge(prompt, texts)

    now, then = run(), run(judge=later)
    np.testing.assert_array_equal(now.log_evidence, then.log_evidence)


def test_a_temperature_may_be_an_array():
    hot, same = (
        run(potential=Potential(difference, temperature=t)).log_evidence
        for t in (2.0, np.array(2.0))
    )
    np.testing.assert_allclose(hot, same, rtol=1e-6)


def test_a_judge_may_run_a_loop_of_its_own():
    async def answer(texts):
        return judge(PROMPT, texts)

    mine, plain = run(judge=lambda prompt, texts: asyncio.run(answer(texts))), run()
    np.testing.assert_array_equal(mine.log_evidence, plain.log_evidence)


@pytest.mark.compile
def test_another_prompt_compiles_nothing():
    """Programs of two prompts of one size share what is compiled."""

    def other(prompt, texts):
        return [0.5] * len(texts)

    def once(prompt):
        program = host_reason(LM, other, prompt, max_steps=STEPS)
        smc = SMC(ParticleFilter(program, store="last"), num_particles=4, progress_bar=False)
        smc.run(jax.random.key(0))

    once("a a b")
    assert compilations(lambda: once("b a a")) == 0


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match=r"the reward of \d texts has shape \(1,\)"):
        run(judge=lambda prompt, texts: [0.5])
    with pytest.raises(ValueError, match=r"the judge gives 7.0 to '[ab<>; a-z]*'"):
        run(judge=lambda prompt, texts: [7.0] * len(texts))
    program = host_reason(LM, judge, PROMPT, max_steps=STEPS)
    with pytest.raises(ValueError, match="this model has 3 rows, and the run asks for 2"):
        SMC(ParticleFilter(program), num_particles=2).run(jax.random.key(0), num_steps=2)
    with pytest.raises(TypeError, match="`judge` must be a function, got int"):
        run(judge=3)
    with pytest.raises(ValueError, match='`finished` must be "absorb" or "reweigh"'):
        run(finished="never")
    with pytest.raises(ValueError, match="has no tokenizer"):
        host_reason(tiny.language_model(), judge, PROMPT, max_steps=2)
