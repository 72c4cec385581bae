"""A real server, `transformers serve`, on a model small enough to enumerate: the law is exact there too."""

import contextlib
import functools
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from smcscale import SMC, ParticleFilter
from smcscale.kernels.triggers import always
from smcscale.models.reasoning import remote
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.remote_program import remote_reason, texts_of
from smcscale.models.reasoning.server import RemoteError, Server
from smcscale.models.reasoning.tokenizer import word_level
from smcscale.models.reasoning.train import save_model
from smcscale.models.reasoning.transformer import Transformer
from support.montecarlo import assert_mean

pytestmark = pytest.mark.slow

PROMPT, STEPS, STEP_TOKENS, END = "a b", 2, 2, 2


def score(text):
    """Likes letters, and a text that says something."""
    return 0.05 + 0.9 * (1 + 2 * text.count("a") + text.count("b")) / (3 + 3 * len(text))


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers", reason="needs the parity extra")
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    words = word_level(["a", "b"])
    config = Config(
        family="Llama", vocabulary_size=words.vocabulary_size, hidden_size=16, num_layers=2,
        num_heads=4, num_kv_heads=2, head_size=4, mlp_size=24, max_length=64, end_tokens=(END,),
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...] * 3
    place = tmp_path / "tiny"
    save_model(place, model, words)
    return place


SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": END}


@contextlib.contextmanager
def serving(folder):
    """The address of a server of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", folder, "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def evidence(folder):
    """`E[score(text)]` over all that the served model can write, text by text as it is read again."""
    lm = LanguageModel.from_pretrained(folder, step_tokens=STEP_TOKENS, max_tokens=32)
    vocabulary = range(lm.config.vocabulary_size)

    @functools.cache
    def law(tokens):
        # one length, so that one program serves
        padded = np.array([*tokens, *[0] * (16 - len(tokens))])
        return np.asarray(jax.nn.softmax(lm.logits(padded)[len(tokens) - 1]), np.float64)

    def steps(text):
        begin = tuple(lm.encode(PROMPT + text)[0][: int(lm.encode(PROMPT + text)[1])].tolist())
        for first in vocabulary:
            chance = law(begin)[first]
            if first == END:
                yield text, True, chance
                continue
            for second in vocabulary:
                both = chance * law((*begin, first))[second]
                # the server's own words; a step is cut at its line's end
                written = lm.decode([first] if second == END else [first, second])
                cut = written.find("\n")
                done = second == END and cut < 0
                yield text + (written if cut < 0 else written[: cut + 1]), done, both

    reached = {("", False): 1.0}
    for _ in range(STEPS):
        after: dict = {}
        for (text, over), mass in reached.items():
            for new, done, chance in [(text, True, 1.0)] if over else steps(text):
                after[new, done] = after.get((new, done), 0.0) + mass * chance
        reached = after
    assert abs(sum(reached.values()) - 1) < 1e-4
    return sum(mass * score(text) for (text, _), mass in reached.items())


def test_the_law_is_that_of_the_served_model(folder):
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    with serving(folder) as url:
        lm = remote.connect(
            url, str(folder), prompt=PROMPT, step_tokens=STEP_TOKENS, max_concurrency=8
        )
        assert not lm.abilities.names_stop and not lm.abilities.several
        program = remote_reason(
            lm, lambda prompt, texts: [score(text) for text in texts], PROMPT, max_steps=STEPS
        )
        smc = SMC(
            ParticleFilter(program, trigger=always, store="last"),
            num_particles=4, num_runs=400, progress_bar=False,
        )  # fmt: skip
        smc.run(jax.random.key(0))
        lm.server.close()
    assert len(texts_of(smc)) == 1600 and smc.cost["tokens"] > 1600
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64)) / evidence(folder)
    assert_mean(ratio, 1.0, family=1, smallest_bias=0.1)


def test_a_server_that_does_not_sample_is_refused(folder):
    with serving(folder) as url:
        place = Server(url, str(folder))
        with pytest.raises(RemoteError, match="same text for every seed"):
            remote.connect(place, prompt=PROMPT)
        place.close()
