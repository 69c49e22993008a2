import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax import checkpoint
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError
from ssl_jax.parallel import make_mesh, replicated


def state(value=1.0, width=300):
    return {"w": jnp.arange(width, dtype=jnp.float32) * value, "step": jnp.int32(value), "none": ()}


def damage(path: Path, count=None):
    """Flips 32 bytes in the middle of every array file, or of the `count` largest."""
    files = [p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in sorted(files, key=lambda p: -p.stat().st_size)[:count]:
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


def test_changed_bytes_that_orbax_reads_without_complaint(tmp_path):
    """In the middle of a large array: the file is sound, the numbers are not."""
    large = state(2, width=300_000)
    checkpoint.save(tmp_path, 1, state(1, width=300_000), keep=3)
    checkpoint.save(tmp_path, 2, large, keep=3)
    damage(tmp_path / "000000002", 1)
    told = []
    assert int(checkpoint.restore_latest(tmp_path, large, told.append)["step"]) == 1
    assert len(told) == 1 and "000000002: damaged checkpoint (['w'] differs from its fingerprint)" in told[0]


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
    printed, _ = forked.Python(script).communicate()
    told = [line for line in printed.splitlines() if line.startswith("TOLD")]
    assert len(told) == 1 and "checkpoint not written" in told[0] and "earlier checkpoints stay" in told[0], printed
    assert "RESTORED True [1]" in printed and checkpoint.steps(tmp_path) == [1]


def test_restores_onto_another_number_of_devices(tmp_path):
    four = jax.device_put(state(7), replicated(make_mesh(4, 4)))
    checkpoint.save(tmp_path, 7, four, keep=1)
    one = checkpoint.restore_latest(tmp_path, state(0), pytest.fail)
    assert np.array_equal(one["w"], four["w"]) and len(one["w"].devices()) == 1


def test_a_state_of_another_structure_is_not_called_damaged(tmp_path):
    """The same arrays under the same names, in another tree: what another version of an optimizer's chain leaves."""
    checkpoint.save(tmp_path, 1, ({"a": jnp.ones(3)}, ()), keep=1)
    with pytest.raises(UserError, match="another version of ssl_jax"):
        checkpoint.restore_latest(tmp_path, ({"a": jnp.ones(3)}, (), ()), pytest.fail)


def test_a_state_of_an_older_format_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    checkpoint.save(tmp_path, 1, state(), keep=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="another version of ssl_jax"):
        checkpoint.restore_latest(tmp_path, state(), pytest.fail)


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path):
    """The buffers of the saved state are donated to the next steps while it is being written."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    current = {"w": jnp.zeros(3_000_000), "n": jnp.zeros(5)}
    with Checkpoints(tmp_path, 3, pytest.fail) as checkpoints:
        for number in range(1, 13):
            current = step(current)
            if number % 4 == 0:
                checkpoints.save(number, current)
    for number in (12, 8, 4):
        assert checkpoint.steps(tmp_path)[-1] == number
        restored = checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(3_000_000), "n": jnp.zeros(5)}, pytest.fail)
        assert np.all(np.asarray(restored["w"]) == number) and np.all(np.asarray(restored["n"]) == number)
        (tmp_path / f"{number:09d}").rename(tmp_path / f"away-{number}")


def test_nothing_older_goes_before_the_newer_one_is_complete(tmp_path):
    big = {"w": jnp.asarray(np.random.default_rng(0).random(4_000_000, np.float32))}
    checkpoints = Checkpoints(tmp_path, 1, pytest.fail)
    for step in (1, 2):
        checkpoints.save(step, big)
        if step == 2:
            assert 1 in checkpoints.steps()
        checkpoints.wait()
        assert checkpoints.steps() == [step]
    assert [p.name for p in tmp_path.iterdir()] == ["000000002"]
    checkpoints.wait()  # nothing to wait for


def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    script = f"""
from pathlib import Path
import jax.numpy as jnp, numpy as np
from ssl_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(Path({str(tmp_path)!r}), 2, print)
state = {{"w": jnp.asarray(np.random.default_rng(0).random(16_000_000, np.float32))}}
checkpoints.save(1, {{"w": state["w"][:1000]}})
checkpoints.wait()
checkpoints.save(2, state)
while not list(Path({str(tmp_path)!r}).glob("*2*/**/d/*")):
    pass
print("WRITING", flush=True)
checkpoints.wait()
print("DONE", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "WRITING\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL and process.stdout.read() == ""
    assert checkpoint.steps(tmp_path) == [1]
    assert any(p.name.startswith("000000002.") for p in tmp_path.iterdir())
    restored = checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(1000)}, pytest.fail)
    assert np.array_equal(restored["w"], np.random.default_rng(0).random(1000, np.float32))
    checkpoint.save(tmp_path, 2, restored, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000001", "000000002"]  # what was left is gone


BACKGROUND = """
import resource, signal, sys
from pathlib import Path
import jax
from ssl_jax import checkpoint
from ssl_jax.errors import UserError
folder, limit = Path(sys.argv[1]), sys.argv[2] == "limit"
noise = jax.random.normal(jax.random.key(0), (300_000,))
checkpoints = checkpoint.Checkpoints(folder, 2, lambda line: print("WARNED", line))
checkpoints.save(1, {"w": noise})
checkpoints.wait()
check, other = checkpoint._check_room, folder.parent / "other"
def check_then_fill(*args):
    "Another program takes the space right after it was found free."
    check(*args)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    else:
        other.write_bytes(bytes(1_200_000))
checkpoint._check_room = check_then_fill
checkpoints.save(2, {"w": noise + 1})
print("GOES ON")
try:
    checkpoints.save(3, {"w": noise + 2})
except UserError as error:
    print("TOLD", error)
checkpoint._check_room = lambda *args: None
try:
    with checkpoints:
        checkpoints.save(4, {"w": noise + 3})
        raise KeyError("first")
except KeyError:
    print("FIRST")
restored = checkpoints.restore_latest({"w": noise})
print("RESTORED", bool((restored["w"] == noise).all()), sorted(p.name for p in folder.iterdir()))
"""


@pytest.mark.parametrize("full", ["limit", "disk"])
def test_a_write_that_fails_in_the_background_is_one_line(tmp_path, full):
    if full == "disk":
        mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system of 3 MB")
    try:
        process = forked.Python(BACKGROUND, tmp_path / "checkpoints", full)
        printed, err = process.communicate()
    finally:
        if full == "disk":
            subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert process.returncode == 0 and not err, err
    goes_on, told, warned, first, restored = printed.splitlines()
    assert goes_on == "GOES ON" and first == "FIRST"
    for line, step in ((told, 2), (warned, 4)):
        assert f"00000000{step}: checkpoint not written (" in line and "earlier checkpoints stay" in line
    assert told.startswith("TOLD") and warned.startswith("WARNED")
    assert restored == "RESTORED True ['000000001']"


JOB = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from ssl_jax import checkpoint, parallel
parallel.join_processes()
folder = Path(sys.argv[1])
mesh = parallel.make_mesh(0, 4, shard=len(jax.devices()))
def init():
    w = jax.random.normal(jax.random.key(0), (500, 1024))
    return {"w": w, "m": jnp.zeros((1024, 300), jnp.bfloat16), "step": jnp.int32(0)}
placed = parallel.state_sharding(mesh, jax.eval_shape(init))
state = jax.jit(init, out_shardings=placed)()
def update(s):  # exact in any order, so that it is the same on any number of devices
    return {"w": s["w"] * 2, "m": s["m"] + s["step"], "step": s["step"] + 1 + 0 * (s["w"] != 0).sum()}
step = jax.jit(update, donate_argnums=0, out_shardings=placed)
with checkpoint.Checkpoints(folder, 2, print) as checkpoints:
    for number in range(1, 13):
        state = step(state)
        if number % 4 == 0:
            checkpoints.save(number, state)
like = jax.jit(init, out_shardings=placed)()
restored = checkpoint.restore_latest(folder, like, print)
assert restored["w"].sharding == like["w"].sharding and len(restored["w"].addressable_shards[0].data) <= 500
print("SUMS", checkpoint.fingerprints(restored) == checkpoint.fingerprints(state), checkpoint.fingerprints(restored))
"""


def run_job(folder, count, devices):
    """What `count` processes with so many devices each print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(count):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        env = {**os.environ, "XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        env |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
        processes.append(forked.Python(JOB, folder, env=env))
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, told
    return [line for text in told for line in text.splitlines() if line.startswith("SUMS")]


def test_two_processes_save_a_split_state_while_they_train(tmp_path):
    lines = run_job(tmp_path, 2, 2)
    assert checkpoint.steps(tmp_path) == [8, 12]
    like = {"w": jnp.zeros((500, 1024)), "m": jnp.zeros((1024, 300), jnp.bfloat16), "step": jnp.int32(0)}
    restored = checkpoint.restore_latest(tmp_path, like, pytest.fail)  # by one process, on one device
    assert lines == [f"SUMS True {checkpoint.fingerprints(restored)}"] * 2


def test_every_kind_of_array_comes_back(tmp_path):
    bits = {dtype: jnp.asarray(noise(jnp.dtype(dtype), (3, 5))) for dtype in DTYPES if not dtype.endswith("64")}
    whole = {**bits, "key": jax.random.split(jax.random.key(1), 2), "scalar": jnp.float32(np.nan)}
    checkpoint.save(tmp_path, 1, whole, keep=1)
    restored = checkpoint.restore_latest(tmp_path, jax.tree.map(jnp.zeros_like, whole), pytest.fail)
    assert checkpoint.fingerprints(restored) == {f"[{name!r}]": reference(x) for name, x in whole.items()}


# The fingerprint, once more in NumPy.


def reference(x):
    x = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    raw = np.frombuffer(x.tobytes(), np.dtype(f"<u{min(x.dtype.itemsize, 4)}")).astype(np.uint64)
    index, result = np.arange(raw.size, dtype=np.uint64), ""
    for constant in (2654435761, 2246822519, 3266489917, 668265263):
        h = (raw + index * constant) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        result += f"{int((h ^ (h >> 16)).sum()) % 2**32:08x}"
    return result


def noise(dtype, shape, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return (bits[..., 0] > 127) if dtype == "bool" else bits.view(dtype)[..., 0]


DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int8", "uint8", "uint16", "int64", "bool")


@pytest.fixture(params=["host", "devices"])
def where(request, monkeypatch):
    """Small arrays are summed on the host, others on their devices."""
    if request.param == "devices":
        monkeypatch.setattr(checkpoint, "SMALL", -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_follows_its_formula(dtype, where):
    dtype = jnp.dtype(dtype).name
    with jax.enable_x64(dtype.endswith("64")):
        for shape in ((), (1,), (7,), (3, 5), (2, 3, 4, 5), (0,), (4, 0)):
            x = jnp.asarray(noise(jnp.dtype(dtype), shape))
            assert x.dtype == dtype
            assert checkpoint.fingerprints(x) == {"": reference(x)}, shape


def test_fingerprint_of_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    assert checkpoint.fingerprints({"k": keys}) == {"['k']": reference(keys)}


def test_fingerprint_is_the_same_however_the_array_lies(monkeypatch):
    x = noise(np.dtype("float32"), (8, 12, 4))
    mesh = make_mesh(4, 4, shard=2)
    specs = [
        PartitionSpec(),
        PartitionSpec(("data", "shard")),
        PartitionSpec(None, "shard"),
        PartitionSpec("data", None, "shard"),
    ]
    for at in [NamedSharding(mesh, spec) for spec in specs] + [replicated(make_mesh(2, 4))]:
        placed = jax.device_put(x, at)
        assert checkpoint.fingerprints(placed) == {"": reference(x)}, at
        monkeypatch.setattr(checkpoint, "SMALL", -1)
        assert checkpoint.fingerprints(placed) == {"": reference(x)}, at
        # No device waits for another: each sums its own part in a program of its own, and no part twice.
        sums = checkpoint._sums_of_parts(placed)
        parts = {str(index) for index in at.devices_indices_map(x.shape).values()}
        assert [len(part.devices()) for part in sums] == [1] * len(parts)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_one_changed_bit_always_changes_the_fingerprint(dtype, where):
    generator = np.random.default_rng(1)
    x = noise(jnp.dtype(dtype), (31, 17))
    sound = checkpoint.fingerprints(jnp.asarray(x))
    for _ in range(200):
        raw = bytearray(x.tobytes())
        raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
        changed = np.frombuffer(raw, x.dtype).reshape(x.shape)
        assert checkpoint.fingerprints(jnp.asarray(changed)) != sound


def test_fingerprint_sees_order_and_pairs_of_sign_bits(where):
    """What a plain sum, or a sum of multiples, would miss."""
    x = noise(np.dtype("uint32"), (64,))
    sound = checkpoint.fingerprints(jnp.asarray(x))
    for a in range(0, 62, 2):
        swapped, signs = x.copy(), x.copy()
        swapped[[a, a + 1]] = x[[a + 1, a]]
        signs[[a, a + 1]] ^= np.uint32(1 << 31)
        for other in (swapped, signs, np.roll(x, a + 1)):
            assert checkpoint.fingerprints(jnp.asarray(other)) != sound
