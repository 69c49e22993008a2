"""Optimizers as optax transformations: the chain of a run, LARS, and the target network's moving average."""

import collections
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ssl_jax.config import Optim
from ssl_jax.errors import UserError

Transformation: TypeAlias = optax.GradientTransformationExtraArgs


class FollowState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    inner: Any


def follow(schedule: Callable[[Any], Any], make: Callable[[Any], optax.GradientTransformation]) -> Transformation:
    """`make(value)` with the value of `schedule` at the current step: tx.update(updates, state, params, step=step).

    A run passes the step of its TrainState to the whole chain, so that all schedules follow one counter, even after a
    skipped step. Without `step` the transformation counts its own updates.
    """

    def init(params):
        return FollowState(jnp.zeros([], jnp.int32), make(0.0).init(params))

    def update(updates, state, params=None, *, step=None, **extra):
        del extra
        value = schedule(state.count if step is None else step)
        updates, inner = make(value).update(updates, state.inner, params)
        return updates, FollowState(state.count + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


class TrackTargetState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]
    target_params: Any


def track_target(
    tau: float | Callable[[jax.Array], jax.Array], select: Callable[[Any], Any] = lambda params: params
) -> Transformation:
    """Keeps a target network: target <- tau * target + (1 - tau) * parameters, after each step.

    Updates pass through unchanged. It averages the parameters after the step, so it must come last in a chain and
    inside `optax.MultiSteps`. The average is kept in float32, because a bfloat16 average would never move with a tau
    of 0.996; cast it to the type of the parameters where you read it.

    Args:
      tau: momentum in [0, 1], or a schedule of the step (see `follow`).
      select: picks the parameters that have a target, such as all but the predictor's.

    Read it with `target_of(opt_state)`. Source: BYOL, section 3.1, https://arxiv.org/abs/2006.07733.
    """

    def init(params):
        # A copy, because a donated state must not hold one buffer twice.
        target = jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), select(params))
        return TrackTargetState(jnp.zeros([], jnp.int32), target)

    def update(updates, state, params=None, *, step=None, **extra):
        del extra
        if params is None:
            raise ValueError("track_target needs params: call update(updates, state, params)")
        t = tau(state.count if step is None else step) if callable(tau) else tau
        after = select(optax.apply_updates(params, updates))
        target = jax.tree.map(lambda old, new: t * old + (1 - t) * new.astype(old.dtype), state.target_params, after)
        return updates, TrackTargetState(state.count + 1, target)

    return optax.GradientTransformationExtraArgs(init, update)


def frozen(inner: optax.GradientTransformation, steps: int) -> Transformation:
    """`inner`, but the parameters stay during the first `steps` steps, and so does its state, such as the momentum: as
    in PyTorch, where parameters without a gradient are left out. Source: DINO, main_dino.py; SwAV, main_swav.py."""
    return optax.conditionally_mask(
        inner, lambda count, step=None, **_: (count if step is None else step) >= steps, forward_extra_args=True
    )


def by_name(make: Callable[[Any], optax.GradientTransformation], kinds: Mapping[str, Any]) -> Transformation:
    """make(kinds[name]) for the parameters with each top-level name, make(None) for all others; each has its state."""

    def labels(params):
        return {k: jax.tree.map(lambda _, k=k: str(kinds.get(k)), v) for k, v in params.items()}

    return optax.partition({str(kind): make(kind) for kind in (None, *kinds.values())}, labels)


def clip_each(limit: float) -> optax.GradientTransformation:
    """Limits the norm of each tensor's gradient. Source: facebookresearch/dino, utils.py, clip_gradients."""

    def clip(updates, params=None):
        del params
        return jax.tree.map(lambda g: g * jnp.minimum(1, limit / (jnp.linalg.norm(g.ravel()) + 1e-6)), updates)

    return optax.stateless(clip)


def target_of(opt_state: Any) -> Any:
    """The target network's parameters in an optimizer state, or None if its chain has no `track_target`."""
    return optax.tree.get(opt_state, "target_params")


def cosine_momentum(base: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """A momentum that rises from `base` to 1: 1 - (1 - base)(cos(pi k / K) + 1) / 2. Source: BYOL, section 3.3.

    >>> schedule = cosine_momentum(0.9, 100)
    >>> round(float(schedule(0)), 4), round(float(schedule(50)), 4), round(float(schedule(100)), 4)
    (0.9, 0.95, 1.0)
    """
    rest = optax.cosine_decay_schedule(1 - base, steps)
    return lambda count: 1 - rest(count)


def lars(
    lr: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    momentum: float = 0.9,
    trust: float = 1e-3,
    mask: Callable[[Any], Any] | None = None,
) -> Transformation:
    """LARS: g <- (g + wd p) * trust |p| / |g + wd p| for each tensor under `mask`, then SGD with momentum.

    The learning rate is applied after the momentum, as in MoCo v3's code. SimCLR's code applies it inside; the two
    differ only while the rate changes. Tensors outside the mask get neither weight decay nor the trust ratio; by
    default these are all with less than two dimensions. A norm of zero leaves the ratio at 1.

    Source: https://arxiv.org/abs/1708.03888; facebookresearch/moco-v3, moco/optimizer.py.
    """
    mask = mask or matrices
    return optax.chain(
        _decay(weight_decay, mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), mask),
        optax.trace(decay=momentum),
        _scale(lr),
    )


def _scale(lr: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return follow(lr, optax.scale_by_learning_rate) if callable(lr) else optax.scale_by_learning_rate(lr)


def _decay(weight_decay: optax.ScalarOrSchedule, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    def decay(value):
        return optax.add_decayed_weights(value, mask=mask)

    return follow(weight_decay, decay) if callable(weight_decay) else decay(weight_decay)


def matrices(params: Any) -> Any:
    """A mask of the tensors with two or more dimensions: all but biases and norm scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def learning_rate(optim: Optim, batch: int, steps: int, warmup: int) -> Callable[[Any], Any]:
    """The schedule of a run of `steps`: linear warm-up, then `optim.schedule`; peak = lr * batch / lr_batch.

    A share of the run in `optim.drops` that is shorter than the warm-up counts from its end.
    """
    if warmup >= steps:
        raise UserError(f"config.optim.warmup={optim.warmup!r}: {warmup} steps; allowed: fewer than the run's {steps}")
    peak = optim.lr * batch / optim.lr_batch if optim.lr_batch else optim.lr
    rest = steps - warmup
    body: Callable[[Any], Any]
    if optim.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, alpha=optim.lr_end)
    elif optim.schedule == "step":
        at = collections.Counter(max(0, int(steps * share + 1e-6) - warmup) for share in optim.drops)
        body = optax.piecewise_constant_schedule(peak, {place: 0.1**count for place, count in at.items()})
    else:
        body = optax.constant_schedule(peak)
    rise = optax.linear_schedule(optim.lr_start * peak, peak, warmup)
    return optax.join_schedules([rise, body], [warmup]) if warmup else body


_BLOCK = re.compile(r"(blocks|layer|stages)_?\d")


def layers(encoder: Any) -> tuple[dict[str, int], int]:
    """The layer of each top-level module of an encoder's params, and their number; 0: what comes before the blocks.

    The blocks follow in their order (the stages of a ConvNeXt), then the last norm; heads come after all. Source:
    microsoft/unilm, beit/optim_factory.py.
    """
    blocks = sorted(filter(_BLOCK.match, encoder), key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    last = len(blocks) + 1
    places = {name: last if "norm" in name else 0 for name in encoder}
    return places | {name: place for place, name in enumerate(blocks, 1)}, last


def by_layer(decay: float, frozen: int) -> optax.GradientTransformation:
    """Multiplies the updates of params["encoder"] by decay ** (layers after this one), and by 0 in the first `frozen`.

    Raises UserError if no layer would learn.
    """

    def scale(updates, params=None):
        del params
        if "encoder" not in updates:
            raise UserError("config.optim: layer_decay and freeze need a method with params['encoder']")
        places, last = layers(updates["encoder"])
        if frozen > last:
            raise UserError(f"config.optim.freeze={frozen}: more layers than the encoder has; allowed: 0 to {last}")
        factors = {name: decay ** (last - place) if place >= frozen else 0.0 for name, place in places.items()}
        scaled = {name: jax.tree.map(lambda u, f=factors[name]: f * u, u) for name, u in updates["encoder"].items()}
        return {**updates, "encoder": scaled}

    return optax.stateless(scale)


def optimizer(
    optim: Optim,
    schedule: Callable[[Any], Any],
    last: optax.GradientTransformation,
    steps: int = 1,
    constant_lr: Collection[str] = (),
    first_frozen: Mapping[str, int] | None = None,
) -> Transformation:
    """The optimizer of a run of `steps`; `last` is the method's own transformation (`track_target` or identity).

    constant_lr: top-level names of the parameters whose learning rate stays at the schedule's peak.
    first_frozen: top-level name -> first steps in which these parameters stay (`frozen`).
    """
    mask = (lambda params: jax.tree.map(lambda _: True, params)) if optim.decay_all else matrices
    decay: Any = optim.weight_decay
    if (end := optim.weight_decay_end) >= 0:
        rest = optax.cosine_decay_schedule(optim.weight_decay - end, steps)
        decay = lambda count: end + rest(count)  # noqa: E731

    def core(lr: Any) -> optax.GradientTransformation:
        if optim.name == "sgd":
            trace = optax.trace(decay=optim.momentum, nesterov=optim.nesterov)
            return optax.chain(_decay(decay, mask), trace, _scale(lr))
        if optim.name == "adamw":
            adam = optax.scale_by_adam(b1=optim.momentum, b2=optim.b2)
            return optax.chain(adam, _decay(decay, mask), _scale(lr))
        return lars(lr, weight_decay=decay, momentum=optim.momentum, mask=mask)

    scaled = core(schedule)
    if constant_lr:
        peak = max(float(schedule(count)) for count in range(0, steps, max(1, steps // 1000)))
        scaled = by_name(lambda kind: core(peak if kind else schedule), dict.fromkeys(constant_lr, "constant"))
    if first_frozen:
        inner = core(schedule)
        scaled = by_name(lambda count: frozen(inner, count) if count else inner, first_frozen)
    clip = optax.identity()
    if optim.clip_norm:
        clip = clip_each(optim.clip_norm) if optim.clip_each else optax.clip_by_global_norm(optim.clip_norm)
    vectors = optax.identity()
    if optim.vector_lr != 1:
        vectors = optax.masked(optax.scale(optim.vector_lr), lambda p: jax.tree.map(lambda x: x.ndim <= 1, p))
    layered = by_layer(optim.layer_decay, optim.freeze) if optim.layer_decay != 1 or optim.freeze else optax.identity()
    return optax.with_extra_args_support(optax.chain(clip, scaled, vectors, layered, last))
