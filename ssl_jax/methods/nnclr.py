r"""NNCLR: the nearest neighbour of one view among earlier images is the positive of the other view's prediction.

Positives vary more than transforms alone can make them vary, which helps where the transforms are weak. Early in a run
the neighbours are random. Negatives are the other predictions of the batch.

$$-\log \frac{e^{\mathrm{NN}(z_i)\cdot p_i/T}}{\sum_k e^{\mathrm{NN}(z_i)\cdot p_k/T}}$$

Source: https://arxiv.org/abs/2104.14548, without official code; vturrisi/solo-learn, solo/methods/nnclr.py: no target
network, one view of each image enters the queue.

Family: contrastive.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.losses import indexed_info_nce, normalize
from ssl_jax.methods.base import METRIC_ROWS, Method, chance_collapse, enqueue, init_network, init_queue, search_metrics
from ssl_jax.models import mlp
from ssl_jax.network import apply_separately, stack


@dataclass(frozen=True)
class Config:
    queue: int = 98304  # projections of earlier images to find neighbours among, any number (paper; nnclr.py: 65536)
    temperature: float = 0.1  # paper; nnclr.py: 0.2
    hidden: int = 2048  # of the projector, 3 layers (nnclr.py, as everything below)
    predictor_hidden: int = 4096
    out: int = 256


# The paper, for 1000 epochs at batch 4096: as SimCLR. solo-learn's bash_files/run_nnclr.sh: rate 0.4, decay 1e-5.
RECIPE = {"optim.name": "lars", "optim.lr": 0.3, "optim.weight_decay": 1e-6, "optim.warmup": "0.1 epochs"}
TINY = {"method.temperature": 0.5}  # for the contract test: at the own one, rounding of its steps grows too fast


def make(config, encoder, run):
    del run
    network = stack(
        encoder=encoder,
        projector=mlp((config.hidden, config.hidden, config.out), last_norm="affine"),
        predictor=mlp((config.predictor_hidden, config.out)),
    )

    def init(key, views):
        key_net, key_queue = jax.random.split(key)
        params, state = init_network(network)(key_net, views)
        return params, state._replace(memory=init_queue(key_queue, config.queue, config.out))

    def forward(params, target, state, batch, key):
        del target, key
        views, stats = apply_separately(network, params, state.stats, batch["views"])
        outputs = {
            "embedding": views[0]["encoder"],
            "z": [jax.lax.stop_gradient(normalize(view["projector"])) for view in views],
            "prediction": [view["predictor"] for view in views],
        }
        return outputs, stats

    def loss(outputs, state, batch, ctx):
        del batch, ctx
        neighbours = [state.memory["queue"][jnp.argmax(z @ state.memory["queue"].T, axis=1)] for z in outputs["z"]]
        pairs = list(zip(neighbours, reversed(outputs["prediction"]), strict=True))
        each = [indexed_info_nce(*pair, temperature=config.temperature) for pair in pairs]
        value = (each[0] + each[1]) / 2
        neighbour, prediction = pairs[0][0][METRIC_ROWS], normalize(pairs[0][1])
        return value, search_metrics(value, neighbour @ prediction.T, jnp.arange(len(neighbour)))

    def remember(outputs, state, ctx):
        return ctx.params, enqueue(state.memory, outputs["z"][0])  # the first view alone

    return Method(init, forward, loss, post_update=remember, collapsed=chance_collapse)
