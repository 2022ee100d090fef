"""The pose head against NumPy float64, where it begins, and what it computes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from niso import tree
from niso.geometry import se3
from niso.models.heads import PoseHead


def head(order: int = 6, layers: int = 3, width: int = 16, dtype: str = "float32") -> PoseHead:
    return PoseHead(order, layers, width, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0))


def orthogonal(count: int, order: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(count, order, order)))[0].astype(np.float32)


def numbers64(model: PoseHead, tau_BxKxK: np.ndarray) -> np.ndarray:
    """The head in float64, from its parameters."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in tree.flatten(model)[1].items()}
    x = np.sqrt(tau_BxKxK.shape[-1]) * tau_BxKxK.reshape(len(tau_BxKxK), -1).astype(np.float64)
    outputs = []
    for n in range(len(model.layers)):
        x = x @ p[f"layers/{n}/kernel"] + p[f"layers/{n}/bias"]
        x = x / (1 + np.exp(-x))
        outputs.append(x)
    return (outputs[0] + outputs[-1]) @ p["output/kernel"] + p["output/bias"]


@pytest.mark.parametrize("layers", [2, 5])
def test_against_float64(layers: int) -> None:
    model, tau = head(layers=layers), orthogonal(7, 6)
    for layer in model.layers:
        layer.bias[...] = 0.1 * jax.random.normal(jax.random.key(2), layer.bias.shape)
    found = model(jnp.asarray(tau))
    assert found.shape == (7, 9)
    np.testing.assert_allclose(found, numbers64(model, tau), atol=1e-5)


def test_it_begins_near_the_identity() -> None:
    """Whatever the map: within two degrees, with translations small but of all directions."""
    found = head(64, 5, 64)(jnp.asarray(orthogonal(16, 64)))
    rotation, translation = se3.pose_from_numbers(found)
    assert float(se3.rotation_distance(rotation, jnp.eye(3)).max()) < 2
    assert 1e-5 < float(jnp.abs(translation).mean()) < 0.02


def test_the_input_has_unit_variance() -> None:
    """So the first layer's outputs have the size that its initialisation is made for, at any k."""
    for order in (4, 32, 128):
        model, tau = head(order, 2, 64), orthogonal(4, order)
        kernel = model.layers[0].kernel[...]
        np.testing.assert_allclose(np.sqrt(order) * np.linalg.norm(tau, axis=(1, 2)), order, rtol=1e-5)
        outputs = np.sqrt(order) * tau.reshape(4, -1) @ kernel
        assert 0.7 < np.sqrt(np.mean(np.square(outputs))) < 1.4


def test_bfloat16_is_for_the_layers() -> None:
    tau = jnp.asarray(orthogonal(3, 6))
    plain, reduced = head()(tau), head(dtype="bfloat16")(tau)
    assert plain.dtype == reduced.dtype == jnp.float32
    assert {leaf.dtype for leaf in tree.flatten(head(dtype="bfloat16"))[1].values()} == {jnp.dtype("float32")}
    assert 0 < float(jnp.abs(plain - reduced).max()) < 1e-3  # the layers' rounding, times the small last kernel


def test_published_size() -> None:
    params = tree.flatten(nnx.eval_shape(lambda: head(128, 5, 512)))[1]
    assert tree.count(params) == (128**2 + 1) * 512 + 4 * 513 * 512 + 513 * 9
