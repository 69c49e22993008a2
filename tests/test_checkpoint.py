import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import checkpoint
from ssl_jax.errors import UserError


def state(value=1.0, width=300):
    return {"w": jnp.arange(width, dtype=jnp.float32) * value, "step": jnp.int32(value), "none": ()}


def damage(path: Path):
    """Flips 32 bytes in the middle of every array file."""
    files = [p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 32] = bytes(255 - b for b in content[middle : middle + 32])
        file.write_bytes(content)


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 10, 30):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [10, 30]
    restored = checkpoint.restore_latest(tmp_path, state(0), pytest.fail)
    assert np.array_equal(restored["w"], state(30)["w"]) and int(restored["step"]) == 30
    assert checkpoint.restore_latest(tmp_path / "none", state(), pytest.fail) is None


def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    checkpoint.save(tmp_path, 2, state(2), keep=3)
    damage(tmp_path / "000000002")
    told = []
    restored = checkpoint.restore_latest(tmp_path, state(0), told.append)
    assert int(restored["step"]) == 1
    assert len(told) == 1 and "000000002: damaged checkpoint" in told[0]
    damage(tmp_path / "000000001")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        checkpoint.restore_latest(tmp_path, state(0), told.append)


def test_torn_metadata_is_damage_too(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    checkpoint.save(tmp_path, 2, state(2), keep=3)
    for file in (tmp_path / "000000002").rglob("*METADATA*"):
        file.write_text("{")
    told = []
    assert int(checkpoint.restore_latest(tmp_path, state(0), told.append)["step"]) == 1
    assert "000000002" in told[0]


def test_other_architecture_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, state(), keep=1)
    with pytest.raises(
        UserError, match=r"another architecture: \['w'\] is float32\[300\], this run needs float32\[400\]"
    ):
        checkpoint.restore_latest(tmp_path, state(width=400), pytest.fail)
    with pytest.raises(UserError, match=r"\['new'\] is absent"):
        checkpoint.restore_latest(tmp_path, {**state(), "new": jnp.zeros(2)}, pytest.fail)


def test_full_disk_is_one_line_and_keeps_the_old_checkpoint(tmp_path):
    """The operating system refuses to write more than 64 KiB into a file, as a full disk would."""
    script = f"""
import resource, signal
from pathlib import Path
import jax, jax.numpy as jnp
from ssl_jax import checkpoint
from ssl_jax.errors import UserError
folder = Path({str(tmp_path)!r})
noise = jax.random.normal(jax.random.key(0), (300_000,))
checkpoint.save(folder, 1, {{"w": noise}}, keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    checkpoint.save(folder, 2, {{"w": noise + 1}}, keep=2)
except UserError as error:
    print("TOLD", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
restored = checkpoint.restore_latest(folder, {{"w": noise}}, print)
print("RESTORED", bool((restored["w"] == noise).all()), checkpoint.steps(folder))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    told = [line for line in done.stdout.splitlines() if line.startswith("TOLD")]
    assert len(told) == 1 and "checkpoint not written" in told[0] and "earlier checkpoints stay" in told[0], done
    assert "RESTORED True [1]" in done.stdout, done
    assert json.loads("[1]") == checkpoint.steps(tmp_path)


def test_restores_onto_another_number_of_devices(tmp_path):
    from ssl_jax.parallel import make_mesh, replicated

    four = jax.device_put(state(7), replicated(make_mesh(4, 4)))
    checkpoint.save(tmp_path, 7, four, keep=1)
    one = checkpoint.restore_latest(tmp_path, state(0), pytest.fail)
    assert np.array_equal(one["w"], four["w"]) and len(one["w"].devices()) == 1


def test_a_state_of_another_structure_is_not_called_damaged(tmp_path):
    """The same arrays under the same names, in another tree: what another version of an optimizer's chain leaves."""
    checkpoint.save(tmp_path, 1, ({"a": jnp.ones(3)}, ()), keep=1)
    with pytest.raises(UserError, match="another version of ssl_jax"):
        checkpoint.restore_latest(tmp_path, ({"a": jnp.ones(3)}, (), ()), pytest.fail)
