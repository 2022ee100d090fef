"""AdamW with warm-up and cosine decay, as published, on flat parameter dicts."""

import dataclasses
import math

import optax

from niso import tree
from niso.errors import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW's numbers.

    Learning rate: linear from 0 to `peak` over `warmup` updates, then cosine to `final` at update `decay_steps` (0: the run's
    length, as the paper; the reference code decays over 1,000,000 whatever the run's length).
    decay: regular expression over the paths of parameters that weight decay applies to. clip: global gradient norm, 0: none.
    accumulate: micro-batches that one update's batch is cut into.
    """

    peak: float
    final: float
    warmup: int
    decay_steps: int
    b1: float
    b2: float
    weight_decay: float
    decay: str
    clip: float
    accumulate: int

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(f"optimizer.accumulate={self.accumulate}: must be at least 1")

    def schedule(self, steps: int) -> optax.Schedule:
        """Update count -> learning rate. Update n uses the rate at n + 1, so that the first one moves."""
        total = self.decay_steps or steps
        if total <= self.warmup:
            raise UserError(f"optimizer.warmup={self.warmup} leaves nothing of the {total} steps: shorten it")
        base = optax.warmup_cosine_decay_schedule(0.0, self.peak, self.warmup, total, self.final)
        return lambda count: base(count + 1)

    def rate(self, steps: int, count: int) -> float:
        """`schedule` on the host: read off a device, it would wait there for the steps that are under way."""
        total, n = self.decay_steps or steps, count + 1
        if n < self.warmup:
            return self.peak * n / self.warmup
        share = min((n - self.warmup) / (total - self.warmup), 1.0)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * share))

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax chain for a run of `steps` updates."""
        # Without clipping an identity stands in its place, so that a run can be resumed with clipping switched on.
        return optax.chain(
            optax.clip_by_global_norm(self.clip) if self.clip else optax.identity(),
            optax.scale_by_adam(self.b1, self.b2),
            optax.add_decayed_weights(
                self.weight_decay, mask=lambda params: {name: tree.match(self.decay, name) for name in params}
            ),
            optax.scale_by_learning_rate(self.schedule(steps)),
        )
