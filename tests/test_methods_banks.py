"""What instance discrimination, NNCLR and LooC remember of earlier images, and MoCo's cure against cheating."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.methods import moco
from ssl_jax.testing.tiny import Images, batch_of, set_up, start, tiny_config, tiny_encoder


def steps(config, count):
    """For each step: what forward gave, what it got, the state before and after it, and the metrics."""
    source = Images()
    state, step_fn, mesh = start(config, source, watch=True)
    for step in range(count):
        before, (state, metrics) = state, step_fn(state, batch_of(config, source, step, mesh))
        outputs, inputs = jax.device_get((metrics["outputs"], metrics["batch"]))
        yield outputs, inputs, before, state, metrics


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def found(query, keys, own, temperature):
    """-log softmax(query . keys / T)_own of one query."""
    logits = unit(keys) @ unit(query) / temperature
    return np.log(np.exp(logits).sum()) - logits[own]


def by_age(memory):
    return np.roll(np.asarray(memory["queue"], np.float64), -int(memory["oldest"]), axis=0)


BANK = {"method__momentum": 0.7, "method__negatives": 30, "train__batch": 10}
BANKS = {mode: tiny_config("instance_discrimination", method__mode=mode, **BANK) for mode in ("nce", "softmax")}


@pytest.mark.parametrize("mode", BANKS)
def test_a_row_of_the_bank_moves_when_its_image_comes_once_an_epoch(mode):
    """48 images in batches of 10: an epoch has 4 steps, and 8 images wait for the next."""
    seen = []
    for outputs, inputs, before, after, _ in steps(BANKS[mode], 4):
        index, old, new = inputs["index"], *(np.asarray(s.model_state.memory["bank"]) for s in (before, after))
        want = unit(0.7 * np.float64(old[index]) + 0.3 * unit(outputs["z"]))
        np.testing.assert_allclose(new[index], want, rtol=1e-4, atol=1e-5)
        assert list(np.flatnonzero(np.any(new != old, axis=1))) == sorted(index)
        seen += list(index)
    assert len(seen) == len(set(seen)) == 40


def test_z_is_that_of_the_first_batch():
    drawn, constant = [], None
    for outputs, inputs, before, after, metrics in steps(BANKS["nce"], 4):
        bank, z = np.asarray(before.model_state.memory["bank"], np.float64), unit(outputs["z"])
        drawn.append(np.asarray(jax.random.randint(metrics["key"], (30,), 0, 48)))
        noise, own = bank[drawn[-1]], bank[inputs["index"]]
        odds = np.exp(np.concatenate([np.sum(z * own, axis=1, keepdims=True), z @ noise.T], axis=1) / 0.5)
        if constant is None:
            assert before.model_state.memory["normalizer"] == 0
            constant = 48 * odds.mean()
        np.testing.assert_allclose(after.model_state.memory["normalizer"], constant, rtol=1e-5)
        h = odds / constant / (odds / constant + 30 / 48)
        np.testing.assert_allclose(metrics["loss"], np.mean(-np.log(h[:, 0]) - np.log(1 - h[:, 1:]).sum(1)), rtol=1e-4)
    assert len({tuple(d) for d in drawn}) == 4  # others in each step
    assert set(np.concatenate(drawn)) <= set(range(48)) and len(set(np.concatenate(drawn))) > 36


def test_softmax_finds_the_image_among_all_rows():
    for outputs, inputs, before, _, metrics in steps(BANKS["softmax"], 4):
        bank, index = before.model_state.memory["bank"], inputs["index"]
        want = np.mean([found(z, bank, i, 0.5) for z, i in zip(outputs["z"], index)])
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-4)


def test_nnclr_finds_neighbours_of_one_view_for_the_other_and_remembers_the_first():
    """A queue of 24, ten projections a step: full in the third step, where it also begins anew."""
    config = tiny_config("nnclr", train__batch=10)
    remembered = None
    for outputs, _, before, after, metrics in steps(config, 8):
        queue, terms = np.asarray(before.model_state.memory["queue"], np.float64), []
        for z, prediction in zip(outputs["z"], reversed(outputs["prediction"])):
            for i, own in enumerate(unit(z)):
                neighbour = max(queue, key=lambda row, own=own: row @ own)
                terms.append(found(neighbour, prediction, i, config.method.temperature))
        np.testing.assert_allclose(metrics["loss"], np.mean(terms), rtol=1e-4)
        remembered = by_age(before.model_state.memory) if remembered is None else remembered
        remembered = np.concatenate([remembered, unit(outputs["z"][0])])[-24:]
        np.testing.assert_allclose(by_age(after.model_state.memory), remembered, rtol=1e-4, atol=1e-5)


FACTORS = ("colour", "rotate", "crop")
LOOC = tiny_config("looc", method__factors=FACTORS, train__batch=10)


def test_looc_keys_share_their_factor_with_the_query_and_nothing_else():
    places = {"colour": ("brightness",), "rotate": ("angle",), "crop": ("top", "left", "height", "width")}
    (_, inputs, *_), *_ = steps(LOOC, 1)
    query, *keys = inputs["drawn"]
    assert len(keys) == 4
    for number, key in enumerate(keys):
        for factor, names in places.items():
            shared = number == 1 + FACTORS.index(factor)
            assert all(np.array_equal(query[n], key[n]) == shared for n in names), (number, factor)
        assert not np.array_equal(query["flip"], key["flip"])


def test_looc_loss_and_queue_of_each_space():
    """A queue of 24, ten keys a step, three spaces of factors and one that feels none."""
    embed = jax.jit(functools.partial(tiny_encoder().apply, train=True, groups=2))
    remembered = None
    for outputs, inputs, before, after, metrics in steps(LOOC, 6):
        query, keys, queue = outputs["query"], outputs["keys"], np.asarray(before.model_state.memory["queue"])
        each = []
        for space, name in enumerate(("all", *FACTORS)):
            terms = []
            for i in range(10):
                # The positive first, then the queue of the space, then, where a factor is felt, the image's other keys.
                others = [keys[i, other, space] for other in range(4) if space and other != space]
                terms.append(found(query[i, space], [keys[i, space, space], *queue[:, space], *others], 0, 0.2))
            each.append(np.mean(terms))
            np.testing.assert_allclose(metrics[f"loss_{name}"], each[-1], rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"], np.mean(each), rtol=1e-4)

        pushed = np.stack([keys[:, space, space] for space in range(4)], axis=1)
        remembered = by_age(before.model_state.memory) if remembered is None else remembered
        remembered = np.concatenate([remembered, unit(pushed)])[-24:]
        np.testing.assert_allclose(by_age(after.model_state.memory), remembered, rtol=1e-4, atol=1e-5)

        trunk = before.params["encoder"], before.model_state.stats["encoder"]
        embedding, _ = embed(*trunk, inputs["views"][0])
        np.testing.assert_allclose(outputs["embedding"], embedding, rtol=1e-4, atol=1e-5)


def test_statistics_of_the_batch_give_moco_s_positives_away_unless_keys_are_shuffled(monkeypatch):
    """Noise, but for one black image in each of 8 groups: only the statistics of its group tell it from the others."""
    config = tiny_config("moco", train__batch=64, method__bn_groups=8)
    method = set_up(config, Images(n=64)).method
    noise = np.random.default_rng(0).uniform(size=(64, 8, 8, 1)).astype(np.float32)
    black = np.arange(8) * 9  # in another place of each group
    noise[black] = 0
    views = [jnp.asarray(noise)] * 2
    params, state = jax.jit(method.init)(jax.random.key(0), views)

    def look(orders):
        """Cosine of a black query with its key less that with the other black keys, and how many of these beat it."""

        @jax.jit
        def forward(seed):
            rng = jax.random.split(jax.random.key(seed), len(noise))
            return method.forward(params, params, state, {"views": views}, rng)[0]

        margins, ranks = [], []
        for seed in range(orders):
            outputs = jax.device_get(forward(seed))
            cosine = unit(outputs["query"][black]) @ unit(outputs["key"][black]).T
            own = np.diag(cosine)
            margins.append(np.mean(own - (cosine.sum(1) - own) / 7))
            ranks.append(np.mean((cosine > own[:, None]).sum(1)))
        return np.mean(margins), np.mean(ranks)

    margin, rank = look(200)

    def in_order(network, params, stats, x, rng, groups):
        del rng
        return network.apply(params, stats, x, train=True, groups=groups)

    monkeypatch.setattr(moco, "shuffle_bn", in_order)
    cheat, cheat_rank = look(1)
    assert cheat > 0.2 and cheat_rank == 0
    assert abs(margin) < 0.1 * cheat and 3 < rank < 4  # 3.5 of 7: chance


def test_settings_are_checked():
    for name, key, value, words in (
        ("looc", "factors", (), "allowed: one or more, each once, of crop"),
        ("looc", "factors", ("crop", "crop"), "allowed: one or more, each once, of crop"),
        ("looc", "factors", ("color",), "config.method.factors='color': unknown; did you mean 'colour'"),
        ("instance_discrimination", "mode", "full", "config.method.mode='full': unknown; available: nce, softmax"),
        ("instance_discrimination", "negatives", 0, "config.method.negatives=0: allowed: 1 or more"),
    ):
        with pytest.raises(UserError, match=words):
            set_up(tiny_config(name, **{f"method__{key}": value}), Images())
