"""A language model and a reward model so small that every text can be enumerated."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.transformer import Transformer

STOP, BREAK, A, B = range(4)  # end of text, end of step, two letters
PROMPT = [A, B, B]


def backbone(seed: int = 0, vocabulary: int = 4, sharpness: float = 4.0) -> Transformer:
    """Random two-layer network; `sharpness` scales the embedding, hence the logits."""
    config = Config(
        family="Qwen2", vocabulary_size=vocabulary, hidden_size=16, num_layers=2, num_heads=4,
        num_kv_heads=2, head_size=4, mlp_size=24, max_length=64, end_tokens=(STOP,),
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(seed))
    model.embedding[...] = model.embedding[...] * sharpness
    return model


def language_model(seed: int = 0, step_tokens: int = 2, max_tokens: int = 4) -> LanguageModel:
    """Four tokens; steps of at most `step_tokens`, texts of at most `max_tokens`."""
    ends = np.array([True, True, False, False])
    return LanguageModel(backbone(seed), None, ends, step_tokens=step_tokens, max_tokens=max_tokens)


def reward_model(seed: int = 1, confidence=None) -> ProcessRewardModel:
    """A head that spreads scores over (0, 1)."""
    head = 0.15 * jax.random.normal(jax.random.key(seed), (1, 16))
    return ProcessRewardModel(backbone(seed), head, jnp.zeros(1), None, confidence)


def texts(lm: LanguageModel, max_steps: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every text after `max_steps` steps, as `(tokens, ends of its steps)`."""
    found = []
    room, longest = lm.max_tokens, lm.step_tokens
    vocabulary = range(lm.config.vocabulary_size)

    def steps(length):
        for size in range(1, longest + 1):
            for body in itertools.product(vocabulary, repeat=size):
                inner = body[:-1]
                if any(token in (STOP, BREAK) for token in inner) or length + size > room:
                    continue
                closed = body[-1] in (STOP, BREAK) or size == longest or length + size == room
                if closed:
                    yield body

    def go(tokens, ends):
        over = bool(tokens) and (tokens[-1] == STOP or len(tokens) == room)
        if over or len(ends) == max_steps:
            found.append((tokens, ends))
            return
        for step in steps(len(tokens)):
            go((*tokens, *step), (*ends, len(tokens) + len(step)))

    go((), ())
    return found


def log_probability(lm: LanguageModel, tokens, prompt=PROMPT) -> float:
    """Log probability of a text's tokens, by full passes only."""
    logits = np.asarray(jax.nn.log_softmax(lm.logits([*prompt, *tokens])), np.float64)
    start = len(prompt) - 1
    return float(sum(logits[start + i, token] for i, token in enumerate(tokens)))


def scores(prm: ProcessRewardModel, tokens, ends, prompt=PROMPT) -> list[float]:
    """Score at each step's end, by one full pass."""
    whole = jnp.asarray([*prompt, *tokens])
    hidden, told = _full_pass(prm, whole)
    told = np.asarray(told)[np.arange(len(whole) - 1), whole[1:]]  # of the token after each
    found = []
    for end in ends:
        last = len(prompt) + end
        so_far = np.append(told[len(prompt) : last - 1], 0.0)  # the first token is not counted
        found.append(float(prm.value(hidden[last - 1], np.array([so_far.sum(), so_far.min()]))))
    return found


@eqx.filter_jit
def _full_pass(prm: ProcessRewardModel, tokens):
    hidden = prm.model(tokens[None])[0]
    return hidden, jax.nn.log_softmax(prm.model.logits(hidden))
