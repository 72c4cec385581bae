"""The shipped networks and judges: folders, labels, and what they know about digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smcscale.models.diffusion import networks, schedules
from smcscale.models.diffusion.judges import load_judges, save_judges
from smcscale.models.diffusion.networks import PRETRAINED, ResidualMLP, Shape
from smcscale.run import _arrays

SMALL = Shape(size=5, width=8, num_layers=2, num_classes=3, num_frequencies=4)


def _saved(folder, **changes):
    network = ResidualMLP(SMALL, nnx.Rngs(0))
    networks.save_denoiser(folder, network, "x0", "vp_cosine", 1.0)
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return network


def test_a_folder_gives_back_its_network(tmp_path):
    network = _saved(tmp_path)
    denoiser = networks.load_denoiser(tmp_path, label=2)
    level = schedules.vp_cosine(10).level(4)
    x = jax.random.normal(jax.random.key(1), (5,))
    expected = jnp.clip(network(x, level.tau, 2), -1, 1)
    np.testing.assert_allclose(denoiser(x, level).x0, expected, atol=0.02)  # stored as bfloat16


def test_labels_and_levels_reach_the_network():
    network = ResidualMLP(SMALL, nnx.Rngs(0))
    x = jnp.ones(5)
    outputs = [network(x, jnp.asarray(t), c) for t in (0.1, 0.9) for c in (None, 0, 1, 2)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert jnp.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(network(x, jnp.asarray(0.1), -1), outputs[0])


def test_batches_are_rows():
    network = ResidualMLP(SMALL, nnx.Rngs(0))
    x, tau, label = jnp.arange(10.0).reshape(2, 5), jnp.asarray([0.2, 0.7]), jnp.asarray([1, -1])
    both = network(x, tau, label)
    for row in range(2):
        np.testing.assert_allclose(both[row], network(x[row], tau[row], label[row]), rtol=1e-5)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "unet"}, "model_type 'unet'"), ({"width": 9}, "does not hold the tensors")],
)
def test_other_folders_are_refused(tmp_path, changes, message):
    _saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        networks.load_denoiser(tmp_path)
    with pytest.raises(FileNotFoundError, match='pretrained\\("digits"\\)'):
        networks.load_denoiser("digits")


def test_judges_survive_their_folder(tmp_path):
    judges = load_judges(PRETRAINED / "digits-judges")
    save_judges(tmp_path, judges)
    again = load_judges(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, judges, again)


@pytest.mark.refusal
def test_a_judge_without_an_array_is_refused(tmp_path):
    networks.parameters.save(tmp_path / "model.safetensors", {"reward.bias": np.zeros(10)})
    with pytest.raises(ValueError, match="reward.weights"):
        load_judges(tmp_path)


@pytest.mark.refusal
@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_is_refused(label):
    with pytest.raises(ValueError, match="`label` must be 0 to 9 or None"):
        networks.load_denoiser(PRETRAINED / "digits", label=label)


def test_judges_know_the_half_that_they_never_saw():
    """Accuracy of each on the other's half: never seen, and far above what a poor judge has."""
    pytest.importorskip("sklearn")
    from smcscale.models.diffusion.train import digits

    reward, judge = load_judges(PRETRAINED / "digits-judges")
    images, labels = digits("B")
    assert (jax.vmap(reward)(images).argmax(axis=1) == labels).mean() > 0.93
    images, labels = digits("A")
    assert (jax.vmap(judge)(images) == labels).mean() > 0.97


def test_the_stored_judge_is_the_one_that_was_fitted():
    """The vote of 45 machines in JAX against scikit-learn's own `predict`."""
    pytest.importorskip("sklearn")
    from sklearn.svm import SVC

    from smcscale.models.diffusion.train import digits

    images, labels = digits("B")
    machines = SVC(C=10.0, gamma="scale").fit(images, labels)
    strange = np.random.default_rng(0).uniform(-1, 1, (300, 64)).astype(np.float32)
    tested = np.concatenate([digits("A")[0], strange])
    judge = load_judges(PRETRAINED / "digits-judges").judge
    # a vote may turn where a machine's value is zero up to rounding
    assert (jax.vmap(judge)(tested) == machines.predict(tested)).mean() > 0.998


def test_a_run_copies_no_parameters():
    """NumPy arrays become JAX arrays; a network's parameters, which are some, stay what they are."""
    given = {"network": nnx.Param(jnp.ones(3)), "data": np.ones(2)}
    found = _arrays(given)
    assert isinstance(found["network"], nnx.Param) and isinstance(found["data"], jax.Array)
    assert jax.tree.leaves(found["network"])[0] is jax.tree.leaves(given["network"])[0]
