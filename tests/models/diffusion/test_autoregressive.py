"""Next-scale images: evidence and law against enumeration, the codec, clusters, the shipped model."""

import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import potentials
from smcscale.models.diffusion.autoregressive import Diversity, PatchCodec, clusters, draw_scales
from smcscale.models.diffusion.judges import load_judges
from smcscale.models.diffusion.networks import PRETRAINED
from smcscale.models.diffusion.potentials import Interval, Steering
from smcscale.models.diffusion.scale_networks import ScaleMLP, Shape, load_scales, save_scales
from smcscale.weights import ess
from support.rules import OneRule
from support.sequences import assert_sequences, sequence_masses

V, COUNTS, RUNS = 3, (1, 2, 1), 4000
K, L = len(COUNTS), sum(COUNTS)
SCALE_OF = np.repeat(np.arange(K), COUNTS)
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
RNG = np.random.default_rng(6)
WEIGHTS, BIAS = RNG.normal(size=(K, L, V, L, V)), RNG.normal(size=(3, L, V))
#: of every image, unfinished ones too
REWARD = 0.6 * RNG.normal(size=(V + 1,) * L) - 0.2
STRENGTH = 0.9
#: comparisons of evidence and chi-squares of law in this file
FAMILY = 70


class Linear(eqx.Module):
    """A network whose logits are linear in the tokens that are known."""

    weights: jax.Array
    bias: jax.Array  # of labels 0, 1 and, last, of any

    def __call__(self, tokens, scale, label):
        known = jax.nn.one_hot(tokens, V)  # nothing where not drawn yet
        return jnp.einsum("lv,lvmw->mw", known, self.weights[scale]) + self.bias[label]


class Letters(eqx.Module):
    """Tokens as their own image: 0 where nothing is drawn, 1 to V."""

    counts: tuple = eqx.field(static=True, default=COUNTS)
    vocabulary: int = eqx.field(static=True, default=V)

    def decode(self, tokens):
        return jnp.where(tokens == V, 0, tokens + 1).astype(float)


class TableReward(eqx.Module):
    values: jax.Array

    def __call__(self, image):
        return self.values[tuple(image.astype(int))]


class OneTrigger(eqx.Module):
    """A trigger chosen by an array, so that all share one program: 0 never, 2 always, else by ESS."""

    share: jax.Array

    def __call__(self, log_weights, time):
        return ess(log_weights) < self.share * log_weights.size


NETWORK = Linear(jnp.asarray(WEIGHTS), jnp.asarray(BIAS))
REWARDS = TableReward(jnp.asarray(REWARD))


def law_of(label):
    """Probability of every sequence, scale by scale, in NumPy."""
    out = np.ones(len(SEQUENCES))
    for row, x in enumerate(SEQUENCES):
        for k in range(K):
            logits = BIAS[label].copy()
            for position in np.flatnonzero(SCALE_OF < k):
                logits += WEIGHTS[k, position, x[position]]
            table = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            for position in np.flatnonzero(SCALE_OF == k):
                out[row] *= table[position, x[position]]
    return out


def tilted(label):
    rewards = REWARD[tuple((SEQUENCES + 1).T)]
    return law_of(label) * np.exp(STRENGTH * rewards)


def run(num_particles=4, num_runs=RUNS, seed=3, steering=None, label=None, **kernels):
    smc = SMC(
        ParticleFilter(draw_scales, store="last", **kernels),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), NETWORK, Letters(), steering, label=label)
    return smc


def steering_by(rule=0, **options):
    return Steering(REWARDS, OneRule(jnp.asarray(rule)), jnp.asarray(STRENGTH), **options)


def trigger_at(share):
    return OneTrigger(jnp.asarray(share))


def assert_target(smc, target, bias):
    mass = sequence_masses(smc, L, V)
    assert_sequences(mass, target, family=FAMILY, smallest_bias=bias)


# ---- the law


@pytest.mark.statistical
@pytest.mark.parametrize("label", [None, 1])
def test_scales_are_drawn_given_the_coarser_ones(label):
    smc = run(1, 3 * RUNS, label=label, trigger=triggers.never)
    target = law_of(-1 if label is None else label)
    np.testing.assert_allclose(target.sum(), 1.0)
    assert_target(smc, target, 0.05)


@pytest.mark.statistical
@pytest.mark.parametrize("numbers", [4, pytest.param([6, 6, 3], marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("rule", range(4))
def test_every_rule_has_the_same_target(rule, share, numbers):
    smc = run(numbers, steering=steering_by(rule), label=0, trigger=trigger_at(share))
    assert_target(smc, tilted(0), 0.12)


@pytest.mark.slow
@pytest.mark.statistical
def test_intervals_and_tempering_change_no_target():
    scored = Interval(start=2, every=2)
    steering = steering_by(1, scored=scored, tempering=potentials.Polynomial(0.4))
    smc = run([5, 3, 3], steering=steering, label=0, trigger=triggers.always)
    assert_target(smc, tilted(0), 0.12)
    assert smc.cost["denoiser_calls"] == RUNS * (5 + 3 + 3)
    assert smc.cost["reward_calls"] == RUNS * (3 + 3)


@pytest.mark.slow
@pytest.mark.statistical
def test_a_running_value_at_the_end_would_be_seen(monkeypatch):
    """The published last potential of `maximum`: the rule's own."""
    score = potentials.score

    def at_the_end_as_before(seen, reward, rule, strength, last):
        return score(seen, reward, rule, strength, jnp.asarray(False))

    monkeypatch.setattr(potentials, "score", at_the_end_as_before)
    steering = Steering(REWARDS, potentials.maximum, STRENGTH)
    smc = run(steering=steering, label=0, trigger=triggers.always)
    with pytest.raises(AssertionError):
        assert_target(smc, tilted(0), 0.12)


# ---- clusters


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(
    ("numbers", "sizes", "share"), [([8, 4, 3], (0, 4, 3), 0.0), (6, (0, 3, 4), 2.0)]
)
def test_clusters_with_their_weights_leave_the_target(numbers, sizes, share):
    smc = run(
        numbers, steering=steering_by(), label=0, trigger=trigger_at(share),
        lookahead=Diversity(sizes),
    )  # fmt: skip
    assert_target(smc, tilted(0), 0.12)


class Unmarked(Diversity):
    """The published selection passed off as a kernel with a target."""

    @property
    def bias(self):
        return None


@pytest.mark.slow
@pytest.mark.statistical
def test_the_published_selection_has_no_target():
    options = {"steering": steering_by(), "label": 0, "trigger": triggers.never}
    smc = run([8, 4, 3], lookahead=Diversity((0, 4, 3), corrected=False), **options)
    with pytest.raises(ValueError, match="no log evidence: Diversity"):
        _ = smc.log_evidence
    assert smc.get_samples()["tokens"].shape[-1] == L
    unmarked = run([8, 4, 3], lookahead=Unmarked((0, 4, 3), corrected=False), **options)
    with pytest.raises(AssertionError):
        assert_target(unmarked, tilted(0), 0.12)


BLOBS = jnp.asarray(
    np.repeat([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], [5, 2, 1], axis=0)
    + np.random.default_rng(0).normal(size=(8, 2))
)
BLOB_OF = np.repeat([0, 1, 2], [5, 2, 1])


def test_clusters_are_the_blobs():
    member, distance = (
        np.asarray(x) for x in clusters(BLOBS, jnp.ones(8, bool), jnp.asarray(3), 10)
    )
    assert len(set(zip(member, BLOB_OF, strict=True))) == 3
    for blob in range(3):
        points = np.asarray(BLOBS)[blob == BLOB_OF]
        expected = ((points - points.mean(0)) ** 2).sum(1)
        np.testing.assert_allclose(distance[blob == BLOB_OF], expected, atol=1e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_each_cluster_counts_alike(corrected):
    look = Diversity((0, 3), corrected, features=lambda point: point)
    log_weights = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3, 0.0, 0.6, 1.2, 0.7]))
    tilted = np.exp(np.asarray(look(log_weights, BLOBS, None, 1)))
    sums = [tilted[blob == BLOB_OF].sum() for blob in range(3)]
    np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    assert tilted[4] == 0
    if corrected:
        np.testing.assert_allclose(tilted[:4], [0.1, 0.4, 0.2, 0.3], rtol=1e-5)
    else:
        points = np.asarray(BLOBS)[:4]
        nearest = ((points - points.mean(0)) ** 2).sum(1).argmin()
        kept = np.flatnonzero(tilted)  # both members of the second blob are as near to their mean
        assert list(kept) in ([nearest, 5, 7], [nearest, 6, 7])
    np.testing.assert_array_equal(look(log_weights, BLOBS, None, 0), log_weights)


def test_clusters_of_few_or_no_living_points():
    look = Diversity((0, 5), features=lambda point: point)
    two = jnp.full(8, -jnp.inf).at[jnp.array([2, 6])].set(jnp.asarray([-1.0, 3.0]))
    found = np.asarray(look(two, BLOBS, None, 1))
    np.testing.assert_allclose(found[[2, 6]], 0.0, atol=1e-6)
    assert np.isneginf(np.delete(found, [2, 6])).all()
    dead = look(jnp.full(8, -jnp.inf), BLOBS, None, 1)
    assert np.isneginf(np.asarray(dead)).all()
    same = look(jnp.zeros(8), jnp.zeros((8, 2)), None, 1)
    np.testing.assert_allclose(same, -np.log(8), rtol=1e-6)  # one cluster, whatever was asked


# ---- tokens and images


def small_codec(seed=0):
    rng = np.random.default_rng(seed)
    books = [rng.normal(size=(4, pixels)).astype(np.float32) / 4 for pixels in (16, 4, 1)]
    return PatchCodec(tuple(jnp.asarray(b) for b in books), 4)


def test_a_token_is_a_patch_at_its_place():
    codec = small_codec()
    assert codec.counts == (1, 4, 16)
    nothing = jnp.full(21, 4)
    np.testing.assert_array_equal(codec.decode(nothing), np.zeros(16))
    image = np.asarray(codec.decode(nothing.at[2].set(3))).reshape(4, 4)  # upper right quarter
    np.testing.assert_array_equal(image[:2, 2:], np.asarray(codec.codebooks[1][3]).reshape(2, 2))
    assert np.count_nonzero(image) == 4
    image = np.asarray(codec.decode(nothing.at[5 + 6].set(1))).reshape(4, 4)
    assert image[1, 2] == codec.codebooks[2][1, 0] and np.count_nonzero(image) == 1
    summed = codec.decode(nothing.at[0].set(1).at[2].set(3))
    one, other = codec.decode(nothing.at[0].set(1)), codec.decode(nothing.at[2].set(3))
    np.testing.assert_allclose(summed, jnp.clip(one + other, -1, 1), atol=1e-6)


def test_codes_are_the_nearest_patches_of_what_is_left():
    codec = small_codec()
    image = np.random.default_rng(1).uniform(-1, 1, 16)
    tokens, left = np.asarray(codec.encode(jnp.asarray(image))), image.reshape(4, 4).copy()
    start = 0
    for book, grid in zip(codec.codebooks, (1, 2, 4), strict=True):
        side = 4 // grid
        for i, j in itertools.product(range(grid), repeat=2):
            place = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
            gaps = ((left[place].reshape(-1) - np.asarray(book)) ** 2).sum(1)
            assert tokens[start] == gaps.argmin()
            left[place] -= np.asarray(book)[tokens[start]].reshape(side, side)
            start += 1


# ---- the shipped model


@pytest.fixture(scope="module")
def model():
    return load_scales(PRETRAINED / "digits-scales")


@pytest.fixture(scope="module")
def judges():
    return load_judges(PRETRAINED / "digits-judges")


def test_decoding_undoes_encoding_up_to_its_error(model):
    """Root mean squared error of a pixel in [-1, 1], all digits: 0.008; a grey level is 0.125."""
    pytest.importorskip("sklearn")
    from smcscale.models.diffusion.train import digits

    images, _ = digits()
    again = jax.jit(jax.vmap(lambda x: model.codec.decode(model.codec.encode(x))))(images)
    assert np.sqrt(np.mean((np.asarray(again) - images) ** 2)) < 0.012


def drawn(model, num_particles, num_runs, steering=None, label=None, seed=0, **kernels):
    smc = SMC(
        ParticleFilter(draw_scales, store="last", **kernels),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), model, model.codec, steering, label=label)
    return smc


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.statistical
def test_digits_of_a_class_are_read_as_that_class(model, judges):
    """Judge's share over classes is that of the card."""
    right = []
    for label in range(10):
        smc = drawn(model, 1, 60, label=jnp.asarray(label), seed=label, trigger=triggers.never)
        images = smc.result.final["image"][:, 0]
        right.append(np.asarray(jax.vmap(judges.judge)(images)) == label)
    share = np.mean(right)
    error = np.sqrt(share * (1 - share) / np.size(right))
    assert abs(share - 0.94) < 4 * error, f"judge reads {share:.3f} +- {error:.3f} as asked"


@pytest.mark.slow
@pytest.mark.statistical
def test_steering_beats_the_best_of_as_many_network_calls(model, judges):
    """Share of eights by a judge that the reward has never met, at 32 network calls an image."""
    runs, share, calls = 1000, {}, {}
    for name, trigger, start in [
        ("best of 8", triggers.never, K + 2),
        ("steered", triggers.ess_below(0.9), 0),
    ]:
        steering = Steering(Eight(judges.reward), strength=3.0, scored=Interval(start=start))
        smc = drawn(model, 8, runs, steering, seed=1, trigger=trigger)
        final = smc.result.final
        best = jnp.argmax(final["reward"], axis=1)
        images = final["image"][jnp.arange(runs), best]
        share[name] = np.mean(np.asarray(jax.vmap(judges.judge)(images)) == 8)
        calls[name] = smc.cost["denoiser_calls"]
    assert calls["steered"] == calls["best of 8"] == runs * 32
    error = np.sqrt(sum(p * (1 - p) for p in share.values()) / runs)
    assert share["steered"] - share["best of 8"] > 3 * error, share


class Eight(eqx.Module):
    classify: eqx.Module

    def __call__(self, image):
        return self.classify(image)[8]


# ---- folders and refusals

SMALL = Shape(size=16, counts=(1, 4, 16), vocabulary=4, width=8, num_layers=1, num_classes=3)


def test_a_folder_gives_back_its_network(tmp_path):
    network, codec = ScaleMLP(SMALL, nnx.Rngs(0)), small_codec()
    save_scales(tmp_path, network, codec)
    loaded = load_scales(tmp_path)
    for book, other in zip(codec.codebooks, loaded.codec.codebooks, strict=True):
        np.testing.assert_allclose(book, other, rtol=0.01)
    tokens = jnp.arange(21) % 4
    outputs = []
    for scale, label in itertools.product(range(3), (-1, 0, 2)):
        told = jnp.asarray(scale), jnp.asarray(label)
        outputs.append(np.asarray(loaded(tokens, *told)))
        expected = network(loaded.codec.decode(tokens), *told)
        np.testing.assert_allclose(outputs[-1], expected, atol=0.03)  # stored as bfloat16
    for one, other in itertools.combinations(outputs, 2):
        assert np.abs(one - other).max() > 1e-3  # scales and labels are told


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "unet"}, "model_type 'unet'"), ({"width": 9}, "does not hold the tensors")],
)
def test_other_folders_are_refused(tmp_path, changes, message):
    save_scales(tmp_path, ScaleMLP(SMALL, nnx.Rngs(0)), small_codec())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_scales(tmp_path)


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`steering` of draw_scales reads the image so far"):
        run(2, 2, steering=Steering(REWARDS, num_guesses=2))
    with pytest.raises(ValueError, match=r"the reward of one particle has shape \(4,\)"):
        run(2, 2, steering=Steering(lambda image: image))
    with pytest.raises(ValueError, match="`counts` of the codec must list the tokens"):
        smc = SMC(ParticleFilter(draw_scales), num_particles=2, progress_bar=False)
        smc.run(jax.random.key(0), NETWORK, Letters(()))
    with pytest.raises(ValueError, match="`codebooks` of a PatchCodec have shapes"):
        PatchCodec((jnp.zeros((4, 16)), jnp.zeros((3, 4))), 4)
    with pytest.raises(ValueError, match="`sizes` of Diversity must be a number of clusters"):
        Diversity((0, -1))
    with pytest.raises(ValueError, match="lists 2 numbers; there are 3 rows"):
        run([4, 2], 2)
