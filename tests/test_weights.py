"""Published weights: recognised, and the same features as transformers, timm and torchvision compute."""

import functools
import json
import runpy
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from ssl_jax import cli
from ssl_jax.config import Model, default, merge, resolve
from ssl_jax.config_file import override
from ssl_jax.encoder import build, export, given_encoder, published_encoder, random_encoder, started_from
from ssl_jax.errors import UserError
from ssl_jax.models import from_torch, published, resolve_model, weight_files

ROOT = Path(__file__).parent.parent
REFERENCE = runpy.run_path(str(ROOT / "benchmarks" / "weights_reference.py"))
RESULTS = dict(np.load(ROOT / "tests" / "reference" / "weights.npz"))
ABOUT = json.loads(str(RESULTS["about"]))
PATCHES = "embeddings.patch_embeddings.projection.weight"


def arrays(name):
    return {key: REFERENCE["weight"](key, tuple(shape)) for key, shape in ABOUT[name]["shapes"].items()}


def write(folder, weights, config=None):
    """A folder as Hugging Face has it."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@functools.cache
def _folder(base, name):
    return write(base / name, arrays(name), ABOUT[name]["config"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return functools.partial(_folder, tmp_path_factory.mktemp("published"))


def features(init, batches):
    """(embedding, patches) of the encoder in the file, for each batch of images of one size."""
    network = build(Model(init=init), 3, batches[0].shape[1])
    shapes = jax.eval_shape(network.init, jax.random.key(0), batches[0])
    weights = published.weights_of(published.recognise(published.locate(init)), 3)
    run = jax.jit(lambda p, s, batches: [network.apply(p, s, x, train=False, dense=True)[0] for x in batches])
    return jax.device_get(run(*from_torch(weights, *shapes), batches))


@pytest.mark.parametrize("name", ABOUT)
def test_computes_what_the_peers_compute(name, folder):
    sizes = ABOUT[name]["sizes"]
    found = features(folder(name), [REFERENCE["images"](*size) for size in sizes])
    for (height, width), (embedding, patches) in zip(sizes, found, strict=True):
        wanted = RESULTS[f"{name}/{height}x{width}/class"]
        assert np.abs(embedding - wanted).max() < 1e-4 * np.abs(wanted).max()
        if (key := f"{name}/{height}x{width}/patches") in RESULTS:
            wanted = RESULTS[key].reshape(patches.shape)
            assert np.abs(patches - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_what_follows_from_the_files(folder):
    def model(name, size=28):
        return resolve_model(Model(init=folder(name)), size)

    dinov2 = model("dinov2")
    assert (dinov2.name, dinov2.width, dinov2.patch, dinov2.depth) == ("vit_tiny", 1 / 8, 4, 2)
    assert (dinov2.positions, dinov2.grid, dinov2.resize, dinov2.layer_scale) == ("learned", 7, "plain", 1.0)
    assert model("dinov2-registers").registers == 4
    v3 = model("dinov3-swiglu")
    assert (v3.positions, v3.eps, v3.qkv_bias, v3.mlp, v3.mlp_ratio) == ("rotary", 1e-5, "no_key", "swiglu", 4)
    assert (model("ijepa").class_token, model("ijepa").pool) == (False, "mean")
    assert (model("timm-resnet18", 64).name, model("timm-resnet18", 32).stem) == ("resnet18", "imagenet")
    assert model("torchvision-convnext", 64).name == "convnext_tiny"
    assert resolve_model(dinov2, 28) == dinov2


PUBLISHED = [  # features, heads, blocks, hidden width, SwiGLU -> name; as their authors publish them
    (384, 12, 1536, False, ("vit_small", 6)),
    (768, 12, 3072, False, ("vit_base", 12)),
    (1024, 24, 4096, False, ("vit_large", 16)),
    (1280, 32, 5120, False, ("vit_huge", 16)),
    (1280, 32, 5120, True, ("vit_huge", 20)),
    (1536, 40, 4096, True, ("vit_giant", 24)),
    (4096, 40, 8192, True, ("vit_base", 32)),
]


@pytest.mark.parametrize(("features", "depth", "hidden", "swiglu", "wanted"), PUBLISHED)
def test_sizes_without_a_config(features, depth, hidden, swiglu, wanted, monkeypatch):
    """Only shapes are looked at, so that the largest networks need no memory."""
    shapes = {"patch_embed.proj.weight": (features, 3, 16, 16), "cls_token": (1, 1, features)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.attn.qkv.weight": (3 * features, features), f"blocks.{i}.attn.qkv.bias": (1,)}
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (hidden * (1 + swiglu), features)}
        shapes |= {f"blocks.{i}.mlp.fc2.weight": (features, hidden)}
    monkeypatch.setattr(published, "shapes_of", lambda file: shapes)
    found = published.recognise(published.WeightFile((Path("x.safetensors"),), {}, {}))
    assert (found.model["name"], found.model["heads"] or wanted[1]) == wanted
    assert found.model["depth"] in (0, depth)
    network = build(Model(**{**found.model, "depth": 1}), 3, 224)  # one block, as all are alike
    made = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))[0]
    block = made["blocks_0"]
    assert block["mlp_fc1"]["kernel"].shape == (features, hidden * (1 + swiglu))
    assert block["attn_proj"]["kernel"].shape == (features, features)


OTHERS = {  # what scripts put around the names -> further keys, which an encoder does not need
    "module.encoder_q.": {"module.encoder_k.": True, "module.queue": False, "module.encoder_q.fc.0.weight": False},
    "module.base_encoder.": {"module.momentum_encoder.": True, "module.predictor.0.weight": False},
    "teacher.backbone.": {"student.module.backbone.": True, "teacher.head.mlp.0.weight": False},
    "model.": {"model.decoder_embed.weight": False, "model.mask_token": False, "model.decoder_blocks.0.x": False},
    "state_dict.module.": {"state_dict.module.prototypes.weight": False},
}


@pytest.mark.parametrize("prefix", OTHERS)
def test_names_in_checkpoints_of_the_authors(prefix, folder, tmp_path):
    name = "timm-vit_small_patch16_224"
    own = arrays(name)
    weights = {f"{prefix}{key}": value for key, value in own.items()}
    for key, other in OTHERS[prefix].items():
        more = {f"{key}{k}": value + 1 for k, value in own.items()} if other else {key: np.ones((2, 2), np.float32)}
        weights |= more
    init = write(tmp_path / "checkpoint", weights, {"num_attention_heads": 3})
    found = published.recognise(published.locate(init))
    assert set(found.names) == {key for key in own if not key.startswith("head.")}
    assert len(found.ignored) == len(weights) - len(found.names)
    for key, value in published.weights_of(found, 3).items():
        np.testing.assert_array_equal(value, own[key])


@pytest.mark.parametrize(("channels", "factor"), [(1, 1.0), (3, 1.0), (5, 3 / 5)])
def test_first_layer_for_other_channels(channels, factor, folder):
    encoder = published_encoder(Model(init=folder("dinov2")), 28, channels)
    kernel = encoder.params["patch_embed_proj"]["kernel"]
    own = arrays("dinov2")[PATCHES].transpose(2, 3, 1, 0)
    wanted = own.sum(2, keepdims=True) if channels == 1 else own[:, :, [i % 3 for i in range(channels)]] * factor
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6)
    assert encoder.about["mean"] == ((0.449,) if channels == 1 else tuple((0.485, 0.456, 0.406) * 2)[:channels])
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, channels), np.uint8)
    assert encoder.embed(images).shape == (2, 24)


def test_chosen_blocks_come_from_the_same_pass(folder):
    x = REFERENCE["images"](28, 28)
    init = folder("dinov2-registers")
    network = started_from(build(Model(init=init), 3, 28), init)
    params, stats = network.init(jax.random.key(0), x[:1])
    run = jax.jit(
        lambda **kw: network.apply(params, stats, x, train=False, **kw)[0], static_argnames=("dense", "blocks")
    )
    embedding, patches, (first, last) = run(blocks=(0, -1))
    plain = run(dense=True)
    for found, wanted in zip((embedding, patches), plain, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(last[0], embedding, atol=1e-6)
    np.testing.assert_allclose(last[1], patches, atol=1e-6)
    assert first[1].shape == patches.shape == (2, 7, 7, 24)
    assert np.abs(first[0] - last[0]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 6}, r"config\.model\.depth=6: .* is a DINOv2 .* with depth=2; leave config\.model\.depth out"),
        ({"patch": 8}, r"config\.model\.patch=8: .* with patch=4"),
        ({"name": "resnet18"}, r"config\.model\.name='resnet18': .* with name='vit_tiny'"),
    ],
)
def test_settings_that_contradict_a_file(changes, message, folder):
    with pytest.raises(UserError, match=message) as raised:
        resolve_model(Model(init=folder("dinov2"), **changes), 28)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["mae", "dinov2", "simclr"])
def test_only_a_name_that_the_user_chose_is_compared_with_the_file(method, tmp_path):
    """The encoder that a method proposes gives way to the file's, also in an arm of a study."""
    init = write(tmp_path / "small", arrays("dinov2"), {**ABOUT["dinov2"]["config"], "num_attention_heads": 6})

    def named(*flags):
        return resolve(override(default(method), flags))

    def name(config):
        return resolve_model(config.model, 28).name

    assert name(named(f"--config.model.init={init}")) == "vit_small"
    assert name(merge(named(), {"model": {"init": init}})) == "vit_small"
    assert name(named(f"--config.model.init={init}", "--config.model.name=vit_small")) == "vit_small"
    for chosen in ("vit_tiny", "resnet18"):
        with pytest.raises(UserError, match=rf"config\.model\.name='{chosen}': .* is a DINOv2 .*name='vit_small'"):
            name(named(f"--config.model.init={init}", f"--config.model.name={chosen}"))


def test_a_name_is_compared_with_that_of_a_run(tmp_path):
    export(tmp_path, random_encoder(Model(name="vit_tiny", depth=1, width=0.25, patch=4), 8, 3, seed=0))
    with pytest.raises(UserError, match=r"name='vit_small': .* is the encoder of a run, with name='vit_tiny'; leave"):
        resolve_model(Model(init=str(tmp_path), name="vit_small"), 8)
    assert resolve_model(Model(init=str(tmp_path)), 8).width == 0.25


def test_images_that_the_patches_do_not_divide(folder):
    with pytest.raises(UserError, match=r"config\.data\.size=30: .* patches of 4 px; allowed: multiples of 4, such as"):
        resolve_model(Model(init=folder("dinov2")), 30)


def damaged(path, case):
    whole = Path(write(path / "whole", {"a": np.zeros(1000, np.float32)})) / "model.safetensors"
    content = whole.read_bytes()
    texts = {"cut": content[:3000], "empty": b"", "header": content[:20]}
    texts |= {"lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"}
    weights = {"adam": "state.0.exp_avg", "language": "model.embed_tokens.weight"}
    if case in weights:
        return write(path / case, {weights[case]: np.zeros((2, 2), np.float32)})
    names = {"tokenizer": "tokenizer.json", "text": "vocab.txt", "part": "model.safetensors.part"}
    name = names.get(case, "model.safetensors")
    (file := path / name).write_bytes(texts.get(case, b'{"version": "1.0"}'))
    return str(file)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut", r"cut short: 3000 of \d+ bytes; download it again"),
        ("empty", "empty or cut short; download it again"),
        ("header", "empty or cut short; download it again"),
        ("lfs", "pointer of Git LFS"),
        ("tokenizer", r"a JSON file \(a config or tokenizer\), no weights; allowed: a \.safetensors file"),
        ("text", r"vocab\.txt: no file of weights; allowed: \.safetensors, \.pth"),
        ("part", "a download that was not finished; download it again"),
        ("adam", "an optimizer's state, not the weights of a network"),
        ("language", r"holds no encoder that is known here \(model\.embed_tokens\.weight, \.\.\.\); known: DINOv2"),
    ],
)
def test_files_that_hold_no_encoder(case, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        resolve_model(Model(init=damaged(tmp_path, case)), 28)
    assert "\n" not in str(raised.value)


def test_another_architecture_is_named(folder, tmp_path):
    weights = arrays("dinov2")
    del weights["encoder.layer.1.norm2.bias"]
    init = write(tmp_path / "short", weights, ABOUT["dinov2"]["config"])
    with pytest.raises(UserError, match=r"blocks\.1\.norm2\.bias: missing; the weights are of another architecture"):
        published_encoder(Model(init=init), 28, 3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Hugging Face's local cache with the model tiny/dinov2, laid out as `hf download` of version 2.4 leaves it:
    links to blobs, refs, and a note on a file that the model does not have."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model, commit = tmp_path / "hub" / "models--tiny--dinov2", "a" * 40
    snapshot, missing = model / "snapshots" / commit, model / ".no_exist" / commit
    for folder in (model / "blobs", model / "refs", snapshot, missing):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (missing / "model.safetensors.index.json").touch()
    downloaded = Path(write(tmp_path / "downloaded", arrays("dinov2"), ABOUT["dinov2"]["config"]))
    for blob, name in enumerate(("model.safetensors", "config.json")):
        (downloaded / name).rename(model / "blobs" / f"{blob}")
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return model


def test_a_model_in_the_cache_of_hugging_face(cache, capsys):
    assert cli.main(["weights", "tiny/dinov2"]) == 0
    told = capsys.readouterr().out
    assert "DINOv2 (Hugging Face)" in told and "--config.model.init=tiny/dinov2" in told
    config = resolve(override(default("mae"), ["--config.model.init=tiny/dinov2"]))  # has become an absolute path
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    wanted = published_encoder(Model(init=config.model.init), 28, 3).embed(images)
    np.testing.assert_array_equal(given_encoder(str(cache.parents[1] / "tiny/dinov2"), 28, 3).embed(images), wanted)
    for text in ("tiny/gated", "tiny/not--allowed"):
        with pytest.raises(UserError, match=f"the weights of {text} are not in the local cache; `hf download {text}`"):
            published.locate(text)
    (cache / "blobs" / "0").unlink()
    with pytest.raises(UserError, match=r"not in the local cache; .* a gated model only after its page has granted"):
        published.locate("tiny/dinov2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/no/such", r"='/no/such': not found"),
        ("nobody/nothing", r"not found.*(local cache|pip install huggingface_hub)"),
    ],
)
def test_weights_that_are_not_there(text, message):
    with pytest.raises(UserError, match=message):
        resolve_model(Model(init=text), 28)
    with pytest.raises(UserError, match=f"{text}: no encoder.json; .*, a file of weights, or OWNER/NAME after `hf"):
        given_encoder(text, 28, 3)


def test_torch_files_need_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.pth: needs torch to be read: pip install 'ssl_jax\[torch\]'"):
        resolve_model(Model(init=str(tmp_path / "a.pth")), 28)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("Weights only load failed.\n Unsupported global: GLOBAL argparse.Namespace was", "holds argparse.Namespace"),
        ("PytorchStreamReader failed reading zip archive", "not a file of torch.save, or cut short; download it again"),
    ],
)
def test_torch_files_that_are_not_loaded(told, message, tmp_path, monkeypatch):
    """What torch 2.13 says; it is not needed here."""

    def load(path, map_location, weights_only):
        assert weights_only
        raise RuntimeError(told)

    monkeypatch.setattr(weight_files.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=rf"a\.pth: {message}") as raised:
        resolve_model(Model(init=str(tmp_path / "a.pth")), 28)
    assert "\n" not in str(raised.value)


def test_the_command_says_that_the_first_layer_is_adapted(folder, capsys):
    assert cli.main(["weights", folder("dinov2"), "--channels=1", "--size=28"]) == 0
    told = capsys.readouterr().out
    assert "channels    3 in the file, 1 in your images: the first layer is adapted" in told and "mean=(0.449,)" in told


def test_heads_in_the_config_of_timm(tmp_path):
    """As `ssl-jax export --format=timm` writes it, for a width that says nothing about them."""
    config, wanted = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 3}}, ("vit_tiny", 1 / 8)
    init = write(tmp_path / "timm", arrays("timm-vit_small_patch16_224"), config)
    model = resolve_model(Model(init=init), 28)
    assert (model.name, model.width) == wanted
    with pytest.raises(UserError, match=r"24 features; how many heads they have stands in config\.json: missing"):
        resolve_model(Model(init=write(tmp_path / "bare", arrays("timm-vit_small_patch16_224"))), 28)


@pytest.mark.parametrize("key", ["config.data.size=30", "config.data.size=32"])
def test_images_of_32_px_and_patches_of_14(key, tmp_path, capsys):
    """A data set of arrays that are 32 px large, or images that are resized to 30 px."""
    weights = {**arrays("dinov2"), PATCHES: np.zeros((24, 3, 14, 14), np.float32)}
    init = write(tmp_path / "patch14", weights, ABOUT["dinov2"]["config"])
    np.savez(tmp_path / "data.npz", images=np.zeros((8, 32, 32, 3), np.uint8))
    flags = ["--batch=8", "--steps=1", f"--workdir={tmp_path / 'run'}", f"--config.model.init={init}"]
    flags += [f"--{key}"] if key.endswith("30") else []
    assert cli.main(["pretrain", "simclr", str(tmp_path / "data.npz"), *flags]) == 2
    told = capsys.readouterr().err.splitlines()
    allowed = "patches of 14 px; allowed: multiples of 14, such as 28"
    assert len(told) == 1 and f"{key}: " in told[0] and allowed in told[0], told
