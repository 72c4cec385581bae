"""A model behind a server: exact laws, broken answers, a killed run, on a fake of a known chain."""

import json
import math
import warnings

import jax
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.engine.host import wait_for
from smcscale.kernels.triggers import always, never
from smcscale.models.reasoning import remote, remote_program, server
from smcscale.models.reasoning.potentials import odds
from smcscale.models.reasoning.server import RemoteError, Server
from support.montecarlo import assert_mean
from support.reasoning import fake_server
from support.reasoning.fake_server import FakeServer, serving

STEPS, STEP_TOKENS = 3, 2
TEXTS = fake_server.texts(STEP_TOKENS, STEPS)
PROMPT = ";"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server, "_PAUSE", 0.001)
    monkeypatch.setattr(server, "_LONGEST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def closed_connections(monkeypatch):
    connected, made = Server._connected, []

    def recorded(place):
        made.append(connected(place))
        return made[-1]

    monkeypatch.setattr(Server, "_connected", recorded)
    yield
    for client in made:
        wait_for(client.close())


def judge(prompt, texts):
    return [fake_server.score(text) for text in texts]


def run(
    url,
    *,
    key=0,
    num_particles=4,
    num_runs=3,
    scores=judge,
    journal=None,
    trigger=always,
    **options,
):
    """A finished run; `options` go to `remote_reason`."""
    place = Server(url, "fake", timeout=1.0, max_retries=4, journal=journal)
    lm = remote.connect(place, delimiter=";", step_tokens=STEP_TOKENS, prompt=PROMPT)
    program = remote_program.remote_reason(lm, scores, PROMPT, max_steps=STEPS, **options)
    smc = SMC(
        ParticleFilter(program, trigger=trigger, store="last"),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(key), num_steps=STEPS)
    return smc


def same(one, other):
    assert np.array_equal(one.log_evidence, other.log_evidence)
    assert remote_program.texts_of(one) == remote_program.texts_of(other)


def test_the_texts_are_all_there():
    assert abs(sum(p for p, _ in TEXTS.values()) - 1) < 1e-12


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("several", "names_stop"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_evidence_and_law_are_exact(several, names_stop):
    exact = sum(p * fake_server.score(prefixes[-1]) for p, prefixes in TEXTS.values())
    ended = sum(
        p * fake_server.score(prefixes[-1]) for t, (p, prefixes) in TEXTS.items() if t[-1] == "!"
    )
    fake = FakeServer(several=several, names_stop=names_stop)
    with serving(fake) as url:
        smc = run(url, num_runs=150)
        assert any("stop" in r for r in fake.requests[7:]) == names_stop
        assert any(r.get("n", 1) > 1 for r in fake.requests[7:]) == several
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    assert_mean(evidence / exact, 1.0, family=8, smallest_bias=0.06)
    # the share of finished texts shows whether a stop was taken for an end
    _, log_weights = smc.get_samples(weighted=True)
    weights = np.exp(np.asarray(log_weights, np.float64)).reshape(150, -1)
    done = np.asarray(smc._population.leaves[-1]).reshape(150, -1)
    share = evidence * (weights * done).sum(1) / weights.sum(1)
    assert_mean(share / ended, 1.0, family=8, smallest_bias=0.25)


def test_another_potential_weighs_by_it():
    with serving(FakeServer()) as url:
        smc = run(url, num_particles=1, num_runs=6, potential=odds, finished="absorb")
    for text, evidence in zip(
        remote_program.texts_of(smc), np.asarray(smc.log_evidence), strict=True
    ):
        prefixes = next(p for t, (_, p) in TEXTS.items() if t.rstrip("!") == text)
        scores = np.array([fake_server.score(p) for p in prefixes])
        assert evidence == pytest.approx(np.log(scores / (1 - scores)).sum(), abs=1e-5)


@pytest.mark.parametrize(
    "fault", ["timeout", "429", "500", "truncated", "malformed", "fewer", "no finish"]
)
def test_a_broken_answer_is_asked_again(fault):
    with serving(FakeServer()) as url:
        whole = run(url)
    fake = FakeServer(faults={number: fault for number in (7, 9, 10, 12)})
    with serving(fake) as url:
        broken = run(url)
    same(whole, broken)
    # no answer is lost, none counted twice
    assert len(fake.requests) == fake.answered + 4
    for name in ("tokens", "prompt_tokens"):
        assert broken.cost[name] == whole.cost[name]


def test_a_bad_request_is_not_repeated():
    fake = FakeServer(faults={8: "400"})
    with serving(fake) as url, pytest.raises(RemoteError, match=r"400.*\n.*try"):
        run(url)
    bodies = [json.dumps(r, sort_keys=True) for r in fake.requests]
    assert bodies.count(bodies[8]) == 1


def test_a_killed_run_goes_on_from_its_journal(tmp_path):
    journal = tmp_path / "run.jsonl"
    fake = FakeServer()
    with serving(fake) as url:
        whole = run(url)
    needed = len(fake.requests)
    with serving(FakeServer(gone_after=14)) as url:
        with pytest.raises(
            RemoteError, match=r"no usable answer in 5 attempts(?s:.*)answers are kept"
        ):
            run(url, journal=journal)
        port = url
    kept = len(journal.read_text().splitlines())
    assert 0 < kept < needed
    with journal.open("a") as file:
        file.write('{"request": "torn')  # killed while it wrote
    fake = FakeServer()
    with serving(fake) as url, pytest.warns(UserWarning, match="torn"):
        again = run(url, journal=journal)
    assert port != url  # the journal knows requests, not addresses
    same(whole, again)
    assert len(fake.requests) == needed - kept
    with warnings.catch_warnings(), serving(FakeServer(gone_after=0)) as url:
        warnings.simplefilter("error")
        same(whole, run(url, journal=journal))  # nothing left to ask


def test_a_broken_journal_is_refused_by_line(tmp_path):
    journal = tmp_path / "run.jsonl"
    journal.write_text('{"request": "a", "answer": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"line 2 of the journal"):
        Server("http://127.0.0.1:1/v1", "fake", journal=journal)


def test_a_server_that_is_not_there():
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:1/v1/completions.*in 3 attempts"):
        remote.connect("http://127.0.0.1:1/v1", "fake", max_retries=2, timeout=0.5)


def test_a_server_that_counts_no_tokens_is_refused():
    with serving(FakeServer(usage=False)) as url, pytest.raises(RemoteError, match="usage"):
        remote.connect(url, "fake")


def test_a_server_that_does_not_sample_is_refused():
    with serving(FakeServer(greedy=True)) as url, pytest.raises(RemoteError, match="every seed"):
        remote.connect(url, "fake")


def test_a_remote_reward_model_scores_alike():
    with serving(FakeServer()) as url:
        here = run(url)
        there = run(url, scores=remote.RemoteRewardModel(
            Server(url, "judge"), mark="#", delimiter=";",
            render=lambda prompt, steps: "".join(s + ";#" for s in steps[:-1]) + steps[-1] + "#",
        ))  # fmt: skip
    # the fake's score counts letters only, so a delimiter more or less is no matter
    assert np.allclose(here.log_evidence, there.log_evidence, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.2, None, True])
def test_a_score_that_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="no probability"):
        remote._probability(bad)


def test_finished_texts_are_left_alone():
    fake = FakeServer(several=False)
    with serving(fake) as url:
        smc = run(url, num_particles=8, trigger=never)
    steps = {t.rstrip("!"): len(prefixes) for t, (_, prefixes) in TEXTS.items()}
    made = sum(steps[text] for text in remote_program.texts_of(smc))
    assert made == len(fake.requests) - 7 < 3 * 8 * STEPS  # seven were trial requests


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"finished": "no"}, ValueError, "finished"),
        ({"unfinished": "no"}, ValueError, "unfinished"),
        ({"scores": 3}, TypeError, "judge"),
        ({"scores": lambda p, t: [0.5]}, TypeError, r"reward of \d+ texts has shape"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with serving(FakeServer()) as url, pytest.raises(error, match=message):
        run(url, **change)
