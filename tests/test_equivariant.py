"""The classification heads against NumPy float64; what may change the equivariant one's logits, and what must not."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from niso import tree
from niso.models.equivariant import EquivariantHead, MLPHead, gram_entries

ORDER, CHANNELS, CLASSES = 12, 6, 5
# Float32: a unit in the last place is 1.2e-7 and the longest sum has 144 terms of both signs. The most that was seen is 4e-6 of
# the logits' root mean square (at the published size, K = 64); TensorFloat32 or bfloat16 would give 1e-3.
INVARIANCE = 1e-5


def equivariant(layers: int = 2, width: int = 16, dtype: str = "float32", gram: int = 8, seed: int = 0) -> EquivariantHead:
    """A small head whose parameters are all away from where they begin: scales not 1, biases not 0."""
    rngs = nnx.Rngs(params=seed)
    head = EquivariantHead(CHANNELS, layers, width, CLASSES, gram=gram, dtype=jnp.dtype(dtype), rngs=rngs)
    return disturbed(head)


def disturbed(model: nnx.Module) -> nnx.Module:
    graphdef, params = tree.flatten(model)
    keys = jax.random.split(jax.random.key(7), len(params))
    noise = {name: 0.1 * jax.random.normal(key, params[name].shape) for key, name in zip(keys, params, strict=True)}
    return tree.merge(graphdef, {name: leaf + noise[name] for name, leaf in params.items()})


def coefficients(batch: int = 7, order: int = ORDER, seed: int = 1) -> np.ndarray:
    """As of images: the first are the largest."""
    normal = np.random.default_rng(seed).normal(size=(batch, order, CHANNELS))
    return (normal / np.sqrt(np.arange(1, order + 1))[:, None]).astype(np.float32)


def orthogonal(batch: int, order: int, determinant: int, seed: int = 2) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(batch, order, order)))[0]
    q[:, :, 0] *= (determinant * np.sign(np.linalg.det(q)))[:, None]
    return q


def numbers(head: EquivariantHead, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the last vectors, the logits), compiled."""
    vectors, logits = jax.jit(lambda x: (head.vectors(x), head(x)))(jnp.asarray(x, jnp.float32))
    return np.asarray(vectors), np.asarray(logits)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def numbers64(head: EquivariantHead, coefficient_BxKxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the last vectors, the logits) in float64, one example and one channel after the other."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in tree.flatten(head)[1].items()}

    def layer(name: str, x_KxC: np.ndarray) -> np.ndarray:
        columns = []
        for c, column_K in enumerate(x_KxC.T):
            epsilon = p[f"{name}/norm/root_epsilon"][c] ** 2 + 1e-6
            columns.append(p[f"{name}/norm/scale"][c] * column_K / np.sqrt(column_K @ column_K / len(column_K) + epsilon))
        normed_KxC = np.stack(columns, axis=1)
        queries, keys = normed_KxC @ p[f"{name}/neuron/query/kernel"], normed_KxC @ p[f"{name}/neuron/key/kernel"]
        turned = [q + silu(-np.dot(q, k)) * k / (np.dot(k, k) + 1e-6) for q, k in zip(queries.T, keys.T, strict=True)]
        return np.stack(turned, axis=1)

    vectors, logits = [], []
    for coefficient_KxC in coefficient_BxKxC.astype(np.float64):
        x = coefficient_KxC
        for n in range(len(head.first)):
            x = layer(f"first/{n}", x)
        x = x + coefficient_KxC @ p["skip/kernel"]
        for n in range(len(head.second)):
            x = layer(f"second/{n}", x)
        x = layer("last", x)
        count = x.shape[1]
        gram = np.array([np.dot(x[:, i], x[:, j]) for i in range(count) for j in range(i, count)]) / np.sqrt(len(x))
        hidden = silu(gram @ p["hidden/kernel"] + p["hidden/bias"])
        vectors.append(x)
        logits.append(hidden @ p["output/kernel"] + p["output/bias"])
    return np.stack(vectors), np.stack(logits)


@pytest.mark.parametrize("layers,order", [(1, ORDER), (2, ORDER), (4, ORDER), (2, 1), (3, 3)])
def test_against_float64(layers: int, order: int) -> None:
    head, x = equivariant(layers), coefficients(order=order)
    vectors, logits = numbers64(head, x)
    found = numbers(head, x)
    assert (len(head.first) + len(head.second), vectors.shape, logits.shape) == (layers, (7, order, 8), (7, CLASSES))
    np.testing.assert_allclose(found[0], vectors, atol=1e-5)
    np.testing.assert_allclose(found[1], logits, atol=1e-5)


@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("order", [1, ORDER])
def test_no_orthogonal_map_changes_the_logits(determinant: int, order: int) -> None:
    """And the vectors before the Gram matrix turn with the coefficients. In float64 both hold to its rounding."""
    head, x, q = equivariant(4), coefficients(order=order), orthogonal(7, order, determinant)
    np.testing.assert_allclose(np.linalg.det(q), determinant, rtol=1e-6)
    (vectors, logits), (turned, same) = numbers(head, x), numbers(head, q @ x)
    np.testing.assert_allclose(turned, q @ vectors, atol=INVARIANCE * rms(vectors) * np.sqrt(order))
    np.testing.assert_allclose(same, logits, atol=INVARIANCE * rms(logits))
    vectors64, logits64 = numbers64(head, x)
    # The twin rounds nothing to float32 on its way in, for x and q @ x are float64 there.
    exactly = numbers64(head, q @ x.astype(np.float64))
    np.testing.assert_allclose(exactly[0], q @ vectors64, atol=1e-12)
    np.testing.assert_allclose(exactly[1], logits64, atol=1e-12)


@pytest.mark.parametrize("layer", ["first", "second", "last"])
def test_every_layer_is_equivariant_on_its_own(layer: str) -> None:
    head, q = equivariant(4), orthogonal(7, ORDER, -1)
    module = head.last if layer == "last" else getattr(head, layer)[0]
    inputs = module.norm.scale.shape[0]
    x = np.random.default_rng(3).normal(size=(7, ORDER, inputs))
    for part in (module.norm, module.neuron, module):
        expected = q @ np.asarray(part(jnp.asarray(x, jnp.float32)))
        found = part(jnp.asarray(q @ x, jnp.float32))
        np.testing.assert_allclose(found, expected, atol=INVARIANCE * rms(expected) * np.sqrt(ORDER))


def changes(ways: dict[str, np.ndarray], head: nnx.Module, x: np.ndarray) -> dict[str, float]:
    """The change of the logits by each of the inputs, in units of their root mean square."""
    logits = np.asarray(head(jnp.asarray(x)))
    return {name: rms(head(jnp.asarray(other, jnp.float32)) - logits) / rms(logits) for name, other in ways.items()}


def test_other_maps_change_the_logits() -> None:
    head, x = equivariant(), coefficients()
    stretch, shear = np.diag(np.linspace(0.5, 1.5, ORDER)), np.eye(ORDER) + np.eye(ORDER, k=1)
    ways = {
        "stretched": stretch @ x, "sheared": shear @ x, "shifted": x + 0.3, "twice": 2 * x, "channels": np.roll(x, 1, axis=-1),
        "turned channels": x @ orthogonal(1, CHANNELS, 1)[0], "another example": np.roll(x, 1, axis=0),
    }  # fmt: skip
    found = changes(ways, head, x)
    assert min(found.values()) > 0.1, found  # ten thousand times what orthogonal maps may


def test_the_ordinary_head_is_not_invariant() -> None:
    """So that the tests above say something about the network, not about the data."""
    x = coefficients()
    head = MLPHead(ORDER * CHANNELS, 2, 16, CLASSES, dtype=jnp.float32, rngs=nnx.Rngs(params=0))
    assert changes({"turned": orthogonal(7, ORDER, 1) @ x}, head, x)["turned"] > 0.1


def gradients(model: nnx.Module) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """The gradient of the cross-entropy with arbitrary labels, by parameter, and by the input under the name "input"."""
    graphdef, params = tree.flatten(model)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        logit_BxL = tree.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logit_BxL, jnp.arange(len(x)) % CLASSES).mean()

    @jax.jit
    def by_name(x: jax.Array) -> dict[str, jax.Array]:
        of_params, of_input = jax.grad(loss, argnums=(0, 1))(params, x)
        return of_params | {"input": of_input}

    return lambda x: by_name(jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_every_parameter_has_a_gradient(layers: int) -> None:
    """Every number of every parameter: a layer that is made and not run, as in the published code, has none."""
    found = gradients(equivariant(layers))(coefficients(16))
    assert len(found) == 4 * (layers + 1) + 5 + 1
    small = {name: float(jnp.abs(g).max()) for name, g in found.items() if not float(jnp.abs(g).max()) > 1e-5}
    assert small == {}
    assert {name: int((g == 0).sum()) for name, g in found.items() if (g == 0).any()} == {}


def test_gradient_against_finite_differences() -> None:
    """Of the float64 twin, along one random direction of the coefficients."""
    head, x = equivariant(4), coefficients()
    direction, weight = np.random.default_rng(4).normal(size=x.shape), np.random.default_rng(5).normal(size=(7, CLASSES))
    found = jax.jit(jax.grad(lambda x: jnp.sum(weight * head(x))))(x)
    above, below = (numbers64(head, x + sign * 1e-6 * direction)[1] for sign in (1, -1))
    expected = np.sum(weight * (above - below)) / 2e-6
    np.testing.assert_allclose(np.sum(np.asarray(found) * direction), expected, rtol=1e-4)


@pytest.mark.parametrize("order", [1, ORDER])
def test_zero_coefficients(order: int) -> None:
    """An empty picture: the logits of an empty Gram matrix, and no gradient that is not a number."""
    head, x = equivariant(), coefficients(3, order)
    np.testing.assert_allclose(head(jnp.zeros_like(x)), numbers64(head, 0 * x)[1], atol=1e-6)
    dead = np.array([1, 0, 1, 1, 0, 1])  # two channels
    gradient = gradients(head)
    for small in (0 * x, 1e-20 * x, 1e-4 * x, dead * x):
        assert {name for name, g in gradient(small).items() if not jnp.isfinite(g).all()} == set()


def test_epsilon_stays_positive() -> None:
    """Whatever its parameter becomes."""
    head = equivariant()
    for value in (-3.0, 0.0, 0.03):
        head.first[0].norm.root_epsilon[...] = jnp.full(CHANNELS, value, jnp.float32)
        assert all(np.isfinite(numbers(head, size * coefficients())[1]).all() for size in (0, 1e-3))


def test_gram_entries() -> None:
    """The upper triangle with the diagonal, of unit variance off it where the vectors have nothing to do with each other."""
    x = np.random.default_rng(6).normal(size=(200, 64, 3)).astype(np.float32)
    found = np.asarray(gram_entries(jnp.asarray(x)))
    gram = np.einsum("bkc,bkd->bcd", x, x) / 8
    expected = [gram[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-5)
    assert 0.9 < rms(found[:, [1, 2, 4]]) < 1.1


def test_bfloat16_is_for_the_layers() -> None:
    x = jnp.asarray(coefficients())
    plain, reduced = equivariant(), equivariant(dtype="bfloat16")
    assert plain(x).dtype == reduced(x).dtype == reduced.vectors(x).dtype == jnp.float32
    assert {leaf.dtype for leaf in tree.flatten(reduced)[1].values()} == {jnp.dtype("float32")}
    change = rms(plain(x) - reduced(x)) / rms(plain(x))
    assert 1e-4 < change < 0.02  # a handful of roundings of 2e-3
    model = MLPHead(ORDER * CHANNELS, 2, 16, CLASSES, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    assert model(x).dtype == jnp.float32


def test_published_sizes() -> None:
    """HMNIST (k = d = 32, 10 classes) and Conformal SHREC'11 (k = d = 64, 25 classes), with any K."""
    for channels, layers, classes, middle in ((32, 2, 10, 0), (64, 4, 25, 2)):
        make = functools.partial(EquivariantHead, channels, layers, 128, classes, dtype=jnp.float32)
        head = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(params=0)))
        logit_BxL = jax.eval_shape(lambda x, make=make: make(rngs=nnx.Rngs(params=0))(x), jnp.zeros((16, 100, channels)))
        assert logit_BxL.shape == (16, classes)
        vectors = 2 * channels + 2 * channels * 128 + channels * 128 + (1 + middle) * (2 * 128 + 2 * 128 * 128)
        output = (2 * 128 + 2 * 128 * 64) + (2080 + 1) * 8320 + (8320 + 1) * classes
        assert tree.count(tree.flatten(head)[1]) == vectors + output


def two_structures(key: jax.Array, batch: int, turned: bool) -> tuple[jax.Array, jax.Array]:
    """Q (A_class + noise) and the class, Q uniform in O(K) or I: the classes differ in which channels point the same way."""
    label_key, turn_key, noise_key = jax.random.split(key, 3)
    label_B = jax.random.randint(label_key, (batch,), 0, 2)
    c = np.arange(CHANNELS)
    same = np.zeros((2, ORDER, CHANNELS), np.float32)
    same[0, c // 2, c] = 1  # 0 with 1, 2 with 3, 4 with 5
    same[1, (c + 1) % CHANNELS // 2, c] = 1  # 1 with 2, 3 with 4, 5 with 0
    x_BxKxC = jnp.asarray(same)[label_B] + 0.2 * jax.random.normal(noise_key, (batch, ORDER, CHANNELS))
    if turned:
        x_BxKxC = jax.random.orthogonal(turn_key, ORDER, (batch,)) @ x_BxKxC
    return x_BxKxC, label_B


def accuracies(model: nnx.Module) -> tuple[float, float]:
    """(of coefficients as it was trained on, of turned ones) after 200 steps of Adam on coefficients that are not turned."""
    graphdef, params = tree.flatten(model)
    adam = optax.adam(3e-3)

    def loss(params: dict, x: jax.Array, label_B: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(tree.merge(graphdef, params)(x), label_B).mean()

    @jax.jit
    def step(params: dict, state: optax.OptState, key: jax.Array) -> tuple[dict, optax.OptState]:
        updates, state = adam.update(jax.grad(loss)(params, *two_structures(key, 32, turned=False)), state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def accuracy(x: jax.Array, label_B: jax.Array) -> jax.Array:
        return (jnp.argmax(tree.merge(graphdef, params)(x), axis=-1) == label_B).mean()

    state = adam.init(params)
    for key in jax.random.split(jax.random.key(8), 200):
        params, state = step(params, state, key)
    plain, turned = (accuracy(*two_structures(jax.random.key(9), 256, turned)) for turned in (False, True))
    return float(plain), float(turned)


@pytest.mark.slow
def test_it_learns_which_structure_it_sees() -> None:
    """And knows it again however it is turned."""
    assert min(accuracies(equivariant())) > 0.97


def test_the_ordinary_head() -> None:
    """Against NumPy; every parameter used; it learns the structures too, and does not know them again."""
    head = disturbed(MLPHead(ORDER * CHANNELS, 3, 16, CLASSES, dtype=jnp.float32, rngs=nnx.Rngs(params=0)))
    p = {name: np.asarray(leaf, np.float64) for name, leaf in tree.flatten(head)[1].items()}
    expected = coefficients(16).reshape(16, -1).astype(np.float64)
    for n in range(3):
        expected = silu(expected @ p[f"layers/{n}/kernel"] + p[f"layers/{n}/bias"])
    expected = expected @ p["output/kernel"] + p["output/bias"]
    assert expected.shape == (16, CLASSES)
    np.testing.assert_allclose(head(jnp.asarray(coefficients(16))), expected, atol=1e-5)
    assert {name for name, g in gradients(head)(coefficients(16)).items() if (g == 0).any()} == set()
    plain, turned = accuracies(head)
    assert plain > 0.97 and turned < 0.75
