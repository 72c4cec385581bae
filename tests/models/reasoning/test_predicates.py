"""`obeying`: a Python predicate on a model small enough to enumerate."""

import itertools

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from smcscale import SMC, ParticleFilter
from smcscale.models.reasoning.host_program import texts_of
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.predicates import obeying
from smcscale.models.reasoning.tokenizer import Tokenizer
from support.montecarlo import assert_mean
from support.reasoning import tiny

ROOM = 4
WORDS = {"<end>": tiny.STOP, ";": tiny.BREAK, "a": tiny.A, "b": tiny.B}


def language_model(**options) -> LanguageModel:
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = Tokenizer(backend, (tiny.STOP,))
    return LanguageModel(
        tiny.backbone(0), words, np.zeros(4, bool), step_tokens=1, max_tokens=ROOM, **options
    )


LM = language_model()


def obeys(text, finished):
    """No two of a kind in a row; a whole text has a `b`."""
    words = text.split()
    apart = all(first != second for first, second in itertools.pairwise(words))
    return apart and (not finished or "b" in words)


def late(text, finished):
    """The same, asked only in the end."""
    return not finished or obeys(text, True)


def evidence() -> float:
    """Probability that the model obeys, over all texts of at most `ROOM` tokens."""
    total, names = 0.0, list(WORDS)
    for length in range(1, ROOM + 1):
        for tokens in itertools.product(range(4), repeat=length):
            if tiny.STOP in tokens[:-1] or (length < ROOM and tokens[-1] != tiny.STOP):
                continue
            words = [names[token] for token in tokens if token != tiny.STOP]
            if obeys(" ".join(words), True):
                total += np.exp(tiny.log_probability(LM, tokens))
    return total


def run(accepts=obeys, lm=LM, num_particles=8, num_runs=1, **options):
    program = obeying(lm, accepts, tiny.PROMPT, **options)
    smc = SMC(
        ParticleFilter(program, store="last"),
        num_particles=num_particles, num_runs=num_runs, on_dead="return", progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(3))
    return smc


@pytest.mark.statistical
@pytest.mark.parametrize(
    "accepts", [obeys, pytest.param(late, marks=pytest.mark.slow)], ids=["early", "late"]
)
def test_evidence_is_the_probability_to_obey(accepts):
    smc = run(accepts, num_runs=1200)
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64)) / evidence()
    assert_mean(ratio, 1.0, family=2, smallest_bias=0.15)


def test_texts_obey_and_calls_are_counted():
    calls = []

    def counted(text, finished):
        calls.append(text)
        return obeys(text, finished)

    smc = run(counted, num_particles=40)
    _, log_weights = smc.get_samples(weighted=True)
    alive = [
        t for t, w in zip(texts_of(smc, LM), np.asarray(log_weights), strict=True) if w > -np.inf
    ]
    assert alive and all(obeys(text.replace("<end>", ""), True) for text in alive)
    assert smc.cost["predicate_calls"] == len(calls)


@pytest.mark.slow
def test_the_prior_may_be_the_model_itself():
    """Temperature changes the law of the texts only where it is part of the prior."""
    by_model = run(lm=language_model(temperature=3.0, prior="model"), num_particles=64)
    np.testing.assert_allclose(by_model.log_evidence, run(num_particles=64).log_evidence)
    heated = run(lm=language_model(temperature=3.0), num_particles=64)
    assert abs(float(heated.log_evidence[0] - by_model.log_evidence[0])) > 1e-3


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"num_tokens must be in \[1, max_tokens=4\], got 5"):
        run(num_tokens=5)
    with pytest.raises(TypeError, match="`accepts` must be a function, got str"):
        run("a+")
    with pytest.raises(ValueError, match="has no tokenizer"):
        run(lm=tiny.language_model())
