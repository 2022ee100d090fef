"""How long the isometric solve takes: forward, and forward + backward, of every method that niso has for it.

  python -m tests.benchmarks.solve --sizes 32,64,128,256 --batches 8,64 --json solve.json

A ratio is the baseline's time over the method's: above 1 is faster. `best` is that of the fastest rounds, not of medians: on a CPU
jaxlib runs a batch on one core or on several, changing from call to call, which moves medians by a factor of two. `baseline` is
U Vᵀ of jax's batched SVD with the derivative that jax has for it; `svd_batched` the same SVD with niso's derivative: on several CPU
devices niso's own goes matrix by matrix. Last come the eigenfunctions, one tall matrix: niso's mass-orthonormalisation against
U Vᵀ of the thin SVD. Leave a CPU at one device here: batches of LAPACK calls can deadlock on several (jax issues 39292, 38056).
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from niso.geometry.polar import METHODS, polar_factor
from niso.geometry.spectrum import mass_orthonormal
from tests.benchmarks import timing

Solve = Callable[[Array], Array]

COLUMNS = {
    "shape": 10, "method": 16, "batch": 5, "forward_ms": 12, "forward_ratio": 13, "forward_backward_ms": 19,
    "forward_backward_ratio": 22, "best_ms": 8, "best_ratio": 10,
}  # fmt: skip


def baseline(x_BxRxK: Array) -> Array:
    """U Vᵀ of jax's SVD, to be differentiated by jax."""
    u_BxRxK, _, vt_BxKxK = jnp.linalg.svd(x_BxRxK, full_matrices=False)
    return _matmul(u_BxRxK, vt_BxKxK)


@jax.custom_vjp
def svd_batched(x_BxKxK: Array) -> Array:
    """U Vᵀ of jax's batched SVD with the analytic derivative, X̄ = U [(W − Wᵀ) ∘ 1/(s_i + s_j)] Vᵀ, W = Uᵀ G V, damped at 1e-7."""
    return _forward(x_BxKxK)[0]


def _forward(x_BxKxK: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    u_BxKxK, s_BxK, vt_BxKxK = jnp.linalg.svd(x_BxKxK, full_matrices=False)
    return _matmul(u_BxKxK, vt_BxKxK), (u_BxKxK, s_BxK, vt_BxKxK)


def _backward(factors: tuple[Array, Array, Array], g_BxKxK: Array) -> tuple[Array]:
    u_BxKxK, s_BxK, vt_BxKxK = factors
    w_BxKxK = _matmul(_matmul(u_BxKxK.mT, g_BxKxK), vt_BxKxK.mT)
    sum_BxKxK = s_BxK[..., :, None] + s_BxK[..., None, :]
    inverse_BxKxK = sum_BxKxK / (sum_BxKxK**2 + (1e-7 * s_BxK[..., :1, None]) ** 2)
    return (_matmul(_matmul(u_BxKxK, (w_BxKxK - w_BxKxK.mT) * inverse_BxKxK), vt_BxKxK),)


svd_batched.defvjp(_forward, _backward)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def products(size: int, batch: int) -> Array:
    """Matrices as ill-conditioned as the products of latents are: singular values from 1 to 1e-4 by a power law, B x K x K."""
    random = np.random.default_rng((size, batch))
    u_BxKxK, vt_BxKxK = (np.linalg.qr(random.normal(size=(batch, size, size)))[0] for _ in range(2))
    return jnp.asarray((u_BxKxK * np.logspace(0, -4, size)) @ vt_BxKxK, jnp.float32)


def measure(solves: dict[str, Solve], x: Array, rounds: int) -> list[dict[str, Any]]:
    """One row per solve, all on the same matrices and in turn; ratios are to the first."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, solve in solves.items():
        calls[name, "forward"] = partial(jax.jit(solve), x)
        calls[name, "forward_backward"] = partial(jax.jit(partial(_forward_backward, solve)), x, g)
    taken = timing.times_ms(calls, rounds)
    times = {call: statistics.median(each) for call, each in taken.items()}
    best = {name: min(taken[name, "forward_backward"]) for name in solves}
    first = next(iter(solves))
    rows = []
    for name in solves:
        row: dict[str, Any] = {
            "shape": f"{x.shape[-2]}x{x.shape[-1]}",
            "method": name,
            "batch": x.shape[0] if x.ndim == 3 else 1,
        }
        for part in ("forward", "forward_backward"):
            row |= {f"{part}_ms": times[name, part], f"{part}_ratio": times[first, part] / times[name, part]}
        row |= {"best_ms": best[name], "best_ratio": best[first] / best[name]}
        rows.append(row)
        timing.print_line([row[column] for column in COLUMNS], list(COLUMNS.values()))
    return rows


def _forward_backward(solve: Solve, x: Array, g: Array) -> tuple[Array, Array]:
    q, pull = jax.vjp(solve, x)
    return q, pull(g)[0]


def eigenfunctions(points: int, rank: int) -> tuple[dict[str, Solve], Array]:
    """The two ways to orthonormalise free eigenfunctions under a mass, and some as they are at initialisation, N x K."""
    random = np.random.default_rng((points, rank))
    mass_N = jnp.asarray(random.uniform(0.5, 1.5, points), jnp.float32)
    root_Nx1 = jnp.sqrt(mass_N)[:, None]
    solves: dict[str, Solve] = {
        "thin_svd": lambda free_NxK: baseline(root_Nx1 * free_NxK) / root_Nx1,
        "mass_orthonormal": lambda free_NxK: mass_orthonormal(free_NxK, mass_N),
    }
    return solves, jnp.asarray(0.01 * random.normal(size=(points, rank)), jnp.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    timing.print_surroundings()
    timing.print_line(list(COLUMNS), list(COLUMNS.values()))
    solves: dict[str, Solve] = {"baseline": baseline, "svd_batched": svd_batched}
    solves |= {name: partial(polar_factor, method=name) for name in arguments.methods}
    rows = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            rows += measure(solves, products(size, batch), arguments.rounds)
    rows += measure(*eigenfunctions(*arguments.tall), arguments.rounds)
    timing.write(arguments.json, given, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.solve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=_integers, default=(32, 64, 128, 256), help="ranks k, default 32,64,128,256")
    parser.add_argument("--batches", type=_integers, default=(8, 64), help="matrices at a time, default 8,64")
    parser.add_argument("--methods", type=_methods, default=METHODS, help=f"default {','.join(METHODS)}")
    parser.add_argument("--tall", type=_tall, default=(1296, 128), help="points x rank of the eigenfunctions, default 1296x128")
    parser.add_argument("--rounds", type=timing.positive, default=7, help="times everything is measured, default 7")
    parser.add_argument("--json", type=timing.json_file, help="file that gets the rows as JSON")
    return parser


def _integers(text: str) -> tuple[int, ...]:
    return tuple(timing.positive(part) for part in text.split(","))


def _tall(text: str) -> tuple[int, int]:
    points, rank = _integers(text.replace("x", ",")) if text.count("x") == 1 else (0, 0)
    if not points >= rank > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not POINTSxRANK with at least as many points as ranks")
    return points, rank


def _methods(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
