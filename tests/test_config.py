import json

import pytest

from ssl_jax.config import (
    default,
    differences,
    from_json,
    merge,
    method_names,
    resolve,
    to_json,
    to_steps,
)
from ssl_jax.config_file import find_config, load_config, override
from ssl_jax.errors import UserError


def test_every_method_resolves_and_survives_json():
    for name in method_names():
        config = resolve(default(name))
        again = resolve(from_json(json.loads(json.dumps(to_json(config)))))
        assert again == config


def test_a_run_of_an_earlier_version_is_read():
    """Its config.json lacks the options that came later: they are at their defaults."""
    config = resolve(override(default("moco"), ["--config.optim.lr=0.5"]))
    saved = json.loads(json.dumps(to_json(config)))
    del saved["log"], saved["on_collapse"], saved["train"]["profile"], saved["method"]["head"]
    assert resolve(from_json(saved)) == config


def test_view_overrides_survive_json_and_resolve():
    config = default("byol")
    config.augment.blur = 0.5
    config.augment.second.crop_scale = (0.3, 0.9)
    resolved = resolve(config)
    assert resolved.augment.override == {"blur": 0.5}
    assert resolved.augment.second == {"crop_scale": (0.3, 0.9)}
    assert resolve(from_json(json.loads(json.dumps(to_json(resolved))))) == resolved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("method", "name", "byoll"),
            r"config.method.name='byoll': unknown; did you mean 'byol'\? available: barlow_twins, byol",
        ),
        (("optim", "name", "adam"), r"config.optim.name='adam': unknown; did you mean 'adamw'"),
        (("train", "batch", 0), r"config.train.batch=0: allowed: 1 or more"),
        (("train", "duration", "3 weeks"), r'config.train.duration=.3 weeks.: allowed: "10 epochs"'),
        (("optim", "lr", -1.0), r"config.optim.lr=-1.0: allowed: 0 or more"),
        (("optim", "warmup", "soon"), r"config.optim.warmup='soon': allowed: \"10 epochs\""),
        (("data", "name", "foldr"), r"config.data.name='foldr': unknown; did you mean 'folder'"),
        (("data", "channels", -1), r"config.data.channels=-1: allowed: 0 or more"),
        (("model", "name", "resnet19"), r"config.model.name='resnet19': unknown; did you mean 'resnet1?8'"),
        (("model", "width", 0.0), r"config.model.width=0.0: allowed: more than 0"),
        (("augment", "hue", 0.7), r"config.augment.hue=0.7: allowed: 0 to 0.5"),
        (("finetune", "sensitivity", 0.0), r"config.finetune.sensitivity=0.0: allowed: more than 0, at most 1"),
        (("study", "labels", (10, 0)), r"config.study.labels=0: allowed: 1 or more"),
        (("study", "test", {"uncertain": "one"}), r"config.study.test.uncertain='one': unknown; did you mean 'ones'"),
    ],
)
def test_bad_values_are_one_line(change, message):
    config = default("byol")
    section, key, value = change
    config[section][key] = value
    with pytest.raises(UserError, match=message) as caught:
        resolve(config)
    assert "\n" not in str(caught.value)


def test_bad_values_of_top_level_options():
    config = default("byol")
    config.on_collapse = "stopp"
    with pytest.raises(UserError, match=r"config.on_collapse='stopp': unknown; did you mean 'stop'"):
        resolve(config)
    config = default("byol")
    config.optimm = 3
    with pytest.raises(UserError, match=r"config='optimm': unknown; did you mean 'optim'"):
        resolve(config)


@pytest.mark.parametrize(("old", "new"), [("byol", "moco"), ("looc", "dino"), ("simclr", "mae"), ("mae", "simclr")])
def test_a_flag_for_the_method_brings_its_options_and_its_recipe(old, new):
    flag = f"--config.method.name={new}"
    assert resolve(override(default(old), [flag])) == resolve(default(new))
    config = default(old)
    config.optim.lr, config.data.name = 7.0, "synthetic"
    changed = override(config, [flag, "--config.optim.b2=0.5"])
    assert (changed.optim.lr, changed.optim.b2, changed.data.name) == (7.0, 0.5, "synthetic")
    assert changed.method.to_dict() == default(new).method.to_dict() and config.method.name == old


def test_unknown_key_in_a_config_file():
    config = default("byol")
    config.optim.learning_rate = 0.1
    with pytest.raises(UserError, match=r"config.optim='learning_rate': unknown"):
        resolve(config)


def test_durations():
    assert to_steps("2 epochs", 1000, 64) == 30
    assert to_steps("1.5 epochs", 1000, 100) == 15
    assert to_steps("500 steps", 1000, 64) == 500
    assert to_steps("1000 examples", 10**6, 64) == 16


def test_overrides_are_ml_collections_own():
    config = override(default("byol"), ["--config.optim.lr=0.5", "--config.augment.crop_scale=(0.1, 0.5)"])
    assert config.optim.lr == 0.5 and config.augment.crop_scale == (0.1, 0.5)
    with pytest.raises(UserError, match=r"--config.optim='lrr': unknown; did you mean 'lr'"):
        override(default("byol"), ["--config.optim.lrr=0.5"])
    with pytest.raises(UserError, match=r"--config='optimm': unknown; did you mean 'optim'"):
        override(default("byol"), ["--config.optimm.lr=0.5"])
    with pytest.raises(UserError, match="abc"):
        override(default("byol"), ["--config.train.batch=abc"])


def test_configs_are_found_by_path_and_by_name():
    for spec in ("configs/pretrain.py:moco", "pretrain:moco", "pretrain.py:moco"):
        assert load_config(spec, []).method.name == "moco"
    with pytest.raises(UserError, match=r"--config='pretrian': unknown; did you mean 'pretrain'"):
        find_config("pretrian")


def test_differences_name_the_keys():
    a, b = to_json(resolve(default("byol"))), to_json(resolve(override(default("byol"), ["--config.optim.lr=9.0"])))
    assert differences(a, a) == []
    assert differences(a, b) == ["config.optim.lr: 0.45 -> 9.0"]


def test_merge_changes_method_with_its_recipe():
    base = resolve(default("simclr"))
    arm = merge(base, {"method": {"name": "moco", "queue": 100}, "train": {"batch": 32}})
    assert arm.method_name == "moco" and arm.method.queue == 100
    assert arm.optim == resolve(default("moco")).optim and arm.train.batch == 32 and arm.data == base.data
    with pytest.raises(UserError, match="config.study.arms: optim"):
        merge(base, {"optim": {"lrr": 1}})
