"""From a config and a data set to the compiled step: the method, its optimizer, the initial state and the gradient.

The way of a batch: data.order -> raw uint8 images -> (inside the step) views -> method.forward -> method.loss ->
gradient -> optimizer -> method.post_update. The data order and all randomness are functions of (seed, step), so a run
continues from its TrainState alone.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ssl_jax import parallel
from ssl_jax.augment import check_no_warp, finish_views, make_views, resolve_views
from ssl_jax.collapse import embedding_std
from ssl_jax.config import Config, View, method_module, to_steps
from ssl_jax.data import Source
from ssl_jax.data import batches as host_batches
from ssl_jax.encoder import Encoder, build, encoder_metadata, given_encoder, plain, started_from
from ssl_jax.errors import UserError
from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.methods.base import Context, Method, RunInfo, State
from ssl_jax.models import low_rank, merge
from ssl_jax.network import KEYS, Network, hold, with_keys
from ssl_jax.transforms import learning_rate, optimizer, target_of

SEEN = ("image", "pair", "crops", "boxes")  # what views are made of, where a batch has it


class TrainState(NamedTuple):
    step: jax.Array  # the only counter: schedules, data order and randomness follow it
    params: Any
    opt_state: Any
    model_state: State  # the method's: BatchNorm statistics, queue, ...
    probe: Any  # the online linear probe and its optimizer; () without labels


class Setup(NamedTuple):
    """Everything that a config and a data set determine."""

    method: Method
    encoder: Network
    tx: optax.GradientTransformationExtraArgs
    schedule: Callable[[Any], Any]  # the learning rate at a step
    views: tuple[View, ...]
    steps: int
    shape: tuple[int, int, int]
    classes: int  # of the online probe; 0 without labels or without a probe


def set_up(config: Config, source: Source, encoder: Network | None = None) -> Setup:
    """Builds the method and its optimizer. If config and data do not fit, it fails here, before anything compiles.

    encoder: replaces the network that config.model describes.
    """
    examples, batch, shape = len(source), config.train.batch, source.shape
    if batch > examples:
        raise UserError(f"config.train.batch={batch}: larger than the data set; allowed: 1 to {examples}")
    _check_parts(config)
    module = method_module(config.method_name)
    classes = len(source.classes) if source.labels is not None else 0
    steps = to_steps(config.train.duration, examples, batch)
    if steps < 1:
        raise UserError(f"config.train.duration={config.train.duration!r}: less than one step; allowed: 1 step or more")
    size = min(shape[:2])
    micro_batch = config.train.part if config.train.part < batch else 0
    bn_batch = config.train.bn_group or micro_batch
    if encoder is None:
        encoder = build(config.model, shape[2], size)
    if config.model.init:
        encoder = started_from(encoder, config.model.init)
    if config.model.lora:
        encoder = low_rank(encoder, config.model.lora)
    student = encoder  # what differs in training alone, and must not be in the encoder that the run returns
    if config.model.drop_path:
        if not encoder.drop_path:
            key = f"config.model.drop_path={config.model.drop_path:g}"
            raise UserError(f"{key}: leaves out branches of a ViT or ConvNeXt; allowed for other networks: 0")
        student = with_keys(student)
    if config.optim.freeze:
        student = hold(student, config.optim.freeze)
    given = functools.partial(given_encoder, size=size, channels=shape[2])
    run = RunInfo(steps, examples // batch, examples, classes, bn_batch if bn_batch < batch else 0, given)
    method: Method = module.make(config.method, student, run)
    if "label" in method.needs and not classes:
        raise UserError(
            f"config.method.name={config.method_name!r}: needs labels, but the data set "
            f"{config.data.path or config.data.name!r} has none; use data with class folders or a label column"
        )
    schedule = learning_rate(config.optim, batch, steps, to_steps(config.optim.warmup, examples, batch))
    tx = optimizer(config.optim, schedule, method.transform, steps, method.constant_lr, method.frozen)
    views = resolve_views(config.augment, method.views, size, method.local_views)
    if config.data.crops == "file":
        check_no_warp(views)
        if config.data.engine == "memory":
            raise UserError("config.data.engine='memory': holds no files; allowed with config.data.crops='file': disk")
    return Setup(method, encoder, tx, schedule, views, steps, shape, classes if config.eval.online_probe else 0)


def _check_parts(config: Config) -> None:
    """The micro-batch must divide the batch, and the BatchNorm group must divide the micro-batch, if there is one."""
    total_key, sizes = "batch", {"batch": config.train.batch, "micro_batch": config.train.part}
    for key, part in {"micro_batch": config.train.part, "bn_group": config.train.bn_group}.items():
        total = sizes[total_key]
        if part and total % part:
            raise UserError(f"config.train.{key}={part}: allowed: 0, or a divisor of config.train.{total_key}={total}")
        total_key = key if part else total_key


PROBE = optax.adam(1e-3)


def init_state(setup: Setup, seed: int, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step, a function of the seed alone; laid out over `mesh` if there is one."""
    views = [jnp.zeros((2, v.size, v.size, setup.shape[2])) for v in setup.views]

    def init(key):
        params, model_state = setup.method.init(key, views)
        probe: Any = ()
        if setup.classes:
            shapes = jax.eval_shape(setup.encoder.init, key, views[0])
            features = jax.eval_shape(lambda p, s: setup.encoder.apply(p, s, views[0], train=True)[0], *shapes)
            linear = {"w": jnp.zeros((features.shape[1], setup.classes)), "b": jnp.zeros(setup.classes)}
            probe = (linear, PROBE.init(linear))
        return TrainState(jnp.zeros([], jnp.int32), params, setup.tx.init(params), model_state, probe)

    # A random stream of its own: step n uses fold_in(key(seed), n).
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)
    return jax.jit(init, out_shardings=mesh and parallel.state_sharding(mesh, jax.eval_shape(init, key)))(key)


def make_step(setup: Setup, config: Config, mesh: Mesh) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The train step, not yet jitted: (state, {"image" uint8 [B, H, W, C], "index" [B], ...}) -> state, metrics.

    The batch contains "label" [B] if the data have labels, and "pair" [B, H, W, C] if config.data.pairs is set. With
    config.data.crops="file", "crops" and "boxes" (`augment.finish_views`) take the place of "image" and "pair".
    """
    render = finish_views if config.data.crops == "file" else make_views
    method, augment = setup.method, render(setup.views, setup.method.shares)
    train = config.train
    parts = {"micro_batch": train.part, "bn_group": train.bn_group}
    gradient = make_gradient(method, augment, **parts, drop_path=bool(config.model.drop_path), mesh=mesh)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)
        key_views, key_forward, key_loss = jax.random.split(key, 3)
        inputs = {name: batch[name] for name in (*SEEN, *method.needs) if name in batch}
        inputs = jax.lax.with_sharding_constraint(inputs, parallel.batch_sharding(mesh))
        ctx = Context(state.step, key_loss, state.params)
        before = state.model_state
        (loss, (outputs, stats, metrics)), grads = gradient(
            ctx, target_of(state.opt_state), before, inputs, (key_views, key_forward)
        )
        updates, opt_state = setup.tx.update(grads, state.opt_state, state.params, step=state.step)
        ctx = ctx._replace(params=optax.apply_updates(state.params, updates))
        params, memory = method.post_update(outputs, before, ctx)
        check_structure("post_update", "a memory", memory, before.memory)
        after = TrainState(state.step, params, opt_state, State(stats, memory), state.probe)

        embedding = jax.lax.stop_gradient(outputs["embedding"])
        norm = optax.tree.norm(grads)
        metrics |= {"loss": loss, "grad_norm": norm, "embedding_std": embedding_std(embedding)}
        metrics["lr"] = jnp.asarray(setup.schedule(state.step), jnp.float32)
        if setup.classes and "label" in batch:
            probe, probe_metrics = _probe_step(state.probe, embedding, batch["label"])
            metrics, after = metrics | probe_metrics, after._replace(probe=probe)
        if config.optim.skip_nonfinite:
            # All of the state is kept as it was, including the queue and the statistics.
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
            metrics["skipped"] = 1 - finite.astype(jnp.int32)
        return after._replace(step=state.step + 1), metrics

    return step


def compile_step(setup: Setup, config: Config, mesh: Mesh, state: TrainState, *inputs: Any) -> jax.stages.Compiled:
    """The compiled step of a run: (state, batch, stop int [devices]) -> state, metrics. It donates `state`.

    inputs: a batch and a `stop`, for their shapes. The metric "stop" is the maximum of `stop`, so every process learns
    of a stop signal to any of them.
    """
    step = make_step(setup, config, mesh)

    def with_stop(state, batch, stop):
        state, metrics = step(state, batch)
        return state, {**metrics, "stop": stop.max()}

    shardings = parallel.state_sharding(mesh, state), parallel.replicated(mesh)
    return jax.jit(with_stop, donate_argnums=0, out_shardings=shardings).lower(state, *inputs).compile()


def _probe_step(probe, embedding, label):
    """One step of the online linear probe; returns it with its accuracy, or its loss for multi-label data.

    `embedding` passes on no gradient, so labels never reach the encoder.
    """
    linear, opt_state = probe
    multilabel = label.ndim == 2

    def objective(linear):
        logits = embedding @ linear["w"] + linear["b"]
        return (binary_cross_entropy if multilabel else cross_entropy)(logits, label), logits

    (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(linear)
    updates, opt_state = PROBE.update(grads, opt_state, linear)
    probe = optax.apply_updates(linear, updates), opt_state
    if multilabel:
        return probe, {"probe_loss": loss}
    known = label >= 0
    correct = (logits.argmax(axis=-1) == label) & known
    return probe, {"probe_accuracy": correct.sum() / jnp.maximum(known.sum(), 1)}


def batches(
    config: Config,
    source: Source,
    mesh: Mesh,
    start: int,
    stop: int,
    views: Sequence[View],
    shares: Sequence[Sequence[str]] = (),
) -> Iterator[dict[str, Any]]:
    """The batches of steps start to stop - 1, on the devices. Each process makes only the rows of its own devices.

    views, shares: as of `make_views`, for config.data.crops="file".

    A data set that fits in memory is stored on the devices. A separate program gathers each batch there, so the train
    step is the same program, and its results the same to the last digit, wherever the images come from.
    """
    size, rows, memory = config.train.batch, parallel.local_rows(mesh, config.train.batch), in_memory(config, source)
    options: Any = {"seed": config.train.seed, "workers": config.data.workers, "rows": rows, "decode": not memory}
    complete = device_store(source, mesh) if memory else lambda batch: batch
    if config.data.crops == "file":
        from ssl_jax.data.crops import Cutter  # which imports Pillow

        channels, side = source.shape[2], min(source.shape[:2])
        options["cut"] = Cutter(config.data, views, shares, config.train.seed, channels, side)
    for batch in host_batches(source, batch=size, start=start, stop=stop, **options):
        yield complete(parallel.global_batch(mesh, size, rows, batch))


def device_store(source: Source, mesh: Mesh) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Puts all images on the devices; returns a function {"index", "partner"} -> batch of images and labels."""
    arrays: dict[str, Any] = {"image": source.arrays()}
    if source.labels is not None:
        arrays["label"] = source.labels
    store = parallel.replicate(mesh, arrays)

    def gather(store, batch):
        gathered = {name: values[batch["index"]] for name, values in store.items()}
        if "partner" in batch:
            gathered["pair"] = store["image"][batch["partner"]]
        return {"index": batch["index"], **gathered}

    return functools.partial(jax.jit(gather, out_shardings=parallel.batch_sharding(mesh)), store)


def in_memory(config: Config, source: Source) -> bool:
    """Whether the data set is decoded once and stored on the devices."""
    if config.data.crops == "file":
        return False
    if config.data.engine == "auto":
        return len(source) * int(np.prod(source.shape)) <= config.data.memory_gb * 1e9
    return config.data.engine == "memory"


def encoder_of(setup: Setup, config: Config, state: TrainState) -> Encoder:
    """The encoder in a state, as arrays local to this process. All processes must call this together."""
    params, stats = setup.method.encoder(state.params, target_of(state.opt_state), state.model_state)
    params, stats = parallel.to_local((params, stats))
    network, size, channels = setup.encoder, min(setup.shape[:2]), setup.shape[2]
    if config.model.lora:
        network, (params, stats) = build(plain(config.model), channels, size), merge(params, stats)
    return Encoder(network, params, stats, size, channels, encoder_metadata(config, size, channels, int(state.step)))


# The gradient of a method's loss: of the batch at once, or exactly the same in micro-batches that fit in memory.
#
# A loss that compares images is not a sum over parts of the batch. So all parts are first embedded without a gradient.
# Then the gradient of the whole batch's loss is taken with respect to these outputs. Finally it is pulled back through
# each part, which is embedded a second time with the same views, masks and permutations: all of these are functions of
# (key, position in the batch). Memory grows with the micro-batch and with the outputs, but not with the batch.
# Source: GradCache, https://arxiv.org/abs/2101.06983.
#
# BatchNorm is the exception: it sees a micro-batch instead of the batch. With `bn_group`, the same number of images
# share their statistics in both cases, and the gradients are equal again. Running statistics are means over the groups.

Inputs = Mapping[str, jax.Array]


def split_batch(tree: Any, parts: int, stretch: int = 1) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]: the batch is a row of stretches, and part i gets every parts-th.

    stretch: images in a stretch. No image of a batch that is split over devices has to move, because every part lies
    on all devices; and the parts do not depend on the number of devices.
    """

    def split(x):
        return x.reshape(-1, parts, stretch, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, tree)


def join_batch(tree: Any, stretch: int = 1) -> Any:
    """The inverse of `split_batch`: [parts, B / parts, ...] as [B, ...], in the order of the batch."""

    def join(x):
        return x.reshape(len(x), -1, stretch, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(join, tree)


def keys_at(key: jax.Array, positions: jax.Array) -> jax.Array:
    """One key for each of `positions` [B], which depends on nothing else."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)


def make_gradient(
    method: Method,
    augment: Callable[..., Any],
    *,
    micro_batch: int = 0,
    bn_group: int = 0,
    drop_path: bool = False,
    mesh: Mesh | None = None,
) -> Callable[..., Any]:
    """A function (ctx, target, state, inputs, keys) -> (loss, (outputs, stats, metrics)), gradients of ctx.params.

    inputs: arrays [B, ...]: "image" (uint8), and "pair", "label" and "index" if there are any; or "crops" and "boxes"
    in place of "image" and "pair". augment: makes views of these (`make_views`, `finish_views`).
    keys: two random keys, for the views and for `forward`.
    micro_batch: images embedded at a time, a divisor of B; 0: all.
    bn_group: number of neighbouring images that share BatchNorm statistics, a divisor of micro_batch; 0: all that are
    embedded at a time. Micro-batches never split a group, nor do devices if their number divides that of the groups.
    drop_path: whether the encoder finds keys in its statistics (`network.with_keys`).
    mesh: where `parallel.shard_batch` in a method's forward lays out images, unless BatchNorm works in groups.
    """
    stretch = bn_group or 1

    def forward(params, target, state, inputs, keys):
        key_views, key_forward = keys
        first, second = ("crops", "boxes") if "crops" in inputs else ("image", "pair")
        views, drawn = augment(key_views, inputs[first], inputs.get(second), inputs["position"])
        batch = {"views": views, "drawn": drawn, **{name: inputs[name] for name in method.needs}}
        key = keys_at(key_forward, inputs["position"])
        run = functools.partial(dropping if drop_path else method.forward, params, target, state)
        if not bn_group or bn_group == len(key):
            with parallel.use_mesh(mesh):
                outputs, stats = run(batch, key)
        else:
            groups = split_batch((batch, key), len(key) // bn_group, bn_group)
            outputs, stats = jax.vmap(lambda group: run(*group))(groups)
            outputs, stats = (
                join_batch(outputs, bn_group),
                jax.tree.map(lambda x, new: x + (new - x).mean(axis=0), state.stats, stats),
            )
        check_structure("forward", "statistics", stats, state.stats)
        return outputs, stats

    def dropping(params, target, state, batch, key):
        key, for_paths = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
        encoder = {**state.stats["encoder"], KEYS: for_paths}
        keyed = state._replace(stats={**state.stats, "encoder": encoder})
        outputs, stats = method.forward(params, target, keyed, batch, key)
        encoder = {name: value for name, value in stats["encoder"].items() if name != KEYS}
        return outputs, {**stats, "encoder": encoder}

    def at_once(ctx, target, state, inputs, keys):
        def objective(params):
            outputs, stats = forward(params, target, state, inputs, keys)
            loss, metrics = method.loss(outputs, state, needed(inputs), ctx._replace(params=params))
            return loss, (outputs, stats, metrics)

        return jax.value_and_grad(objective, has_aux=True)(ctx.params)

    def in_parts(ctx, target, state, inputs, keys):
        count = len(inputs["position"]) // micro_batch
        parts = split_batch(inputs, count, stretch)

        def embed(total, part):
            outputs, stats = forward(ctx.params, target, state, part, keys)
            return jax.tree.map(lambda t, new, old: t + (new - old), total, stats, state.stats), outputs

        # Statistics are added up as changes, so that weights that are kept among them stay as they are to the bit.
        total, outputs = jax.lax.scan(embed, jax.tree.map(jnp.zeros_like, state.stats), parts)
        stats = jax.tree.map(lambda x, t: x + t / count, state.stats, total)
        outputs = join_batch(outputs, stretch)
        leaves, structure = jax.tree.flatten(outputs)
        floats = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]  # have gradients

        def objective(float_leaves, params):
            replaced = list(leaves)
            for n, leaf in zip(floats, float_leaves, strict=True):
                replaced[n] = leaf
            tree = jax.tree.unflatten(structure, replaced)
            return method.loss(tree, state, needed(inputs), ctx._replace(params=params))

        # `direct` is the gradient of parameters that the loss itself reads (ctx.params).
        (loss, metrics), (cotangents, direct) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            [leaves[n] for n in floats], ctx.params
        )

        def pull_back(total, part_and_cotangents):
            part, cotangents = part_and_cotangents

            def inner_product(params):
                leaves = jax.tree.leaves(forward(params, target, state, part, keys)[0])
                return sum(jnp.vdot(leaves[n], cotangent) for n, cotangent in zip(floats, cotangents, strict=True))

            return jax.tree.map(jnp.add, total, jax.grad(inner_product)(ctx.params)), None

        grads, _ = jax.lax.scan(pull_back, direct, (parts, split_batch(cotangents, count, stretch)))
        return (loss, (outputs, stats, metrics)), grads

    def needed(inputs):
        return {name: inputs[name] for name in method.needs}

    def gradient(ctx: Context, target, state: State, inputs: Inputs, keys):
        size = len(jax.tree.leaves(inputs)[0])
        inputs = {**inputs, "position": jnp.arange(size)}
        in_micro_batches = micro_batch and micro_batch < size
        return (in_parts if in_micro_batches else at_once)(ctx, target, state, inputs, keys)

    return gradient


def check_structure(function: str, what: str, after: Any, before: Any) -> None:
    """TypeError if a function of a method changes the structure of the part of the state that it replaces."""
    expected, actual = str(jax.tree.structure(before)), str(jax.tree.structure(after))
    if actual != expected:
        raise TypeError(
            f"a method's {function} must return {what} with the structure that init created, {expected}, not {actual}"
        )
