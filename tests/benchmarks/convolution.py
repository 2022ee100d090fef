"""The 3 x 3 convolutions of the residual blocks: milliseconds of the convolution and of its derivatives.

  python -m tests.benchmarks.convolution --json convolution.json
  python -m tests.benchmarks.convolution --shapes 4,144,64,64 48,40,16,16

A shape is images, pixels along an edge, channels in, channels out; those of pose_encode's levels at batch 2 by default, and
hmnist_encode's small ones. Columns: the convolution, its derivative by the input, that by the kernel as XLA computes it, and by
blocks (niso.models.convolution), all in turns, medians. Each of the four does the same number of operations: GFLOP/s are the
convolution's.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax

from niso.models import convolution
from tests.benchmarks import timing

SHAPES = ("4,144,64,64", "4,72,128,128", "4,36,256,256", "4,144,128,64", "48,40,16,16", "48,20,32,32")
COLUMNS = {"shape": 14, "forward": 8, "by_input": 8, "by_kernel": 9, "by_blocks": 9, "gflop": 6, "gflop_s": 7}


def shape(text: str) -> tuple[int, ...]:
    """An argument such as 4,144,64,64."""
    parts = tuple(timing.positive(part) for part in text.split(","))
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not images,pixels,inputs,outputs")
    return parts


def measure(images: int, pixels: int, inputs: int, features: int, rounds: int) -> dict[str, float | str]:
    """One row of the table."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BxHxWxC = jax.random.normal(keys[0], (images, pixels, pixels, inputs))
    g_BxHxWxD = jax.random.normal(keys[1], (images, pixels, pixels, features))
    kernel_3x3xCxD = jax.random.normal(keys[2], (3, 3, inputs, features))
    programs = {
        "forward": functools.partial(jax.jit(convolution.convolve), x_BxHxWxC, kernel_3x3xCxD),
        "by_input": functools.partial(jax.jit(convolution.input_gradient), kernel_3x3xCxD, g_BxHxWxD),
        "by_kernel": functools.partial(jax.jit(convolution.whole), x_BxHxWxC, g_BxHxWxD),
        "by_blocks": functools.partial(jax.jit(convolution.by_blocks), x_BxHxWxC, g_BxHxWxD),
    }
    found = timing.median_ms(programs, rounds)
    gflop = 2 * 9 * images * pixels**2 * inputs * features / 1e9
    name = ",".join(map(str, (images, pixels, inputs, features)))
    return {"shape": name, **found, "gflop": gflop, "gflop_s": 1e3 * gflop / found["forward"]}


def main(argv: Sequence[str]) -> int:
    """Prints the table; 0."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[shape(text) for text in SHAPES])
    parser.add_argument("--rounds", type=timing.positive, default=9)
    parser.add_argument("--json", type=timing.json_file)
    options = parser.parse_args(argv)
    timing.print_surroundings()
    widths = list(COLUMNS.values())
    timing.print_line(list(COLUMNS), widths)
    rows = []
    for sizes in options.shapes:
        rows.append(measure(*sizes, options.rounds))
        timing.print_line([rows[-1][name] for name in COLUMNS], widths)
    timing.write(options.json, argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
