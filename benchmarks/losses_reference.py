"""Write tests/reference/peer_losses.npz: losses of other libraries and their gradients, in float64, on small inputs.

    pip install torch==2.13.0 lightly==1.6.0 transformers==5.24.0
    python benchmarks/losses_reference.py lightly transformers torch
    pip install timm==0.6.13 omegaconf && git clone https://github.com/vturrisi/solo-learn
    python benchmarks/losses_reference.py solo-learn=PATH           a checkout: version 1.0.6 is in no package registry
    pip install stable-pretraining==0.1.8 jax flax optax
    python benchmarks/losses_reference.py stable-pretraining        its JAX backend

Each call replaces the part of the libraries that it names, so they may live in environments of their own. The inputs
come from `inputs` and are stored, too. tests/test_losses_peers.py compares ssl_jax with what is stored. It holds, for
each case, LIBRARY/CASE/value and LIBRARY/CASE/grad/INPUT; "about" names versions.
"""

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent.parent / "tests" / "reference" / "peer_losses.npz"


def inputs() -> dict[str, np.ndarray]:
    """Arrays of float64, but for `label` and the masks. NumPy promises that RandomState's numbers never change."""
    draw = np.random.RandomState(0)
    x = {name: draw.standard_normal((6, 5)) for name in ("a", "b", "c", "d")}
    x["queue"] = draw.standard_normal((7, 5))
    x |= {f"student{i}": draw.uniform(-1, 1, (6, 8)) for i in range(4)}
    x |= {f"teacher{i}": draw.uniform(-1, 1, (6, 8)) for i in range(2)}
    x["centre"], x["covariance"] = 0.1 * draw.standard_normal(8), draw.standard_normal((5, 5))
    x["covariance"] = x["covariance"] @ x["covariance"].T / 25
    x["prototypes"], x["directions"] = draw.standard_normal((8, 5)), draw.standard_normal((9, 5))
    x["wide_a"], x["wide_b"] = draw.standard_normal((2, 4, 9))  # more dimensions than images
    # Maps of four places: the nearest place to p is p, and its distance grows with p, so that every order is this one.
    x["map0"], x["grid0"] = 4 * draw.standard_normal((6, 4, 3)), np.array(6 * [[[0.0, 0], [0, 9], [9, 0], [9, 9]]])
    step = draw.standard_normal((6, 4, 3))
    step *= (0.1 * np.arange(1, 5) / np.linalg.norm(step, axis=2))[..., None]
    for i in (1, 2):
        x[f"map{i}"], x[f"grid{i}"] = x["map0"] + i * step, x["grid0"] + 0.1 * i * np.arange(1, 5)[:, None]
    x["images"], x["pixels"] = draw.uniform(size=(2, 3, 8, 8)), draw.standard_normal((2, 4, 48))
    x["mask"] = np.array([[True, False, True, True], [False, True, False, False]])
    x["label"] = np.array([0, 1, 0, 2, 1, 2])
    return x


# Cases: name: (function of the inputs, names of the inputs that get a gradient).


def lightly() -> dict:
    import torch
    from lightly import loss
    from torch.nn.functional import normalize

    cos = loss.NegativeCosineSimilarity()

    def moco(x):
        made = loss.NTXentLoss(temperature=0.2, memory_bank_size=tuple(x["queue"].shape))
        made.memory_bank.bank = normalize(x["queue"].detach(), dim=1)
        return made(x["a"], x["b"].detach())

    def swav(x, low):
        scores = [x[f"student{i}"] for i in range(4)]
        return loss.SwaVLoss(0.1, 3, 0.05)(scores[:2], scores[2:] if low else [])

    def dino(x):
        made = loss.DINOLoss(8, student_temp=0.1, teacher_temp=0.04)
        made.center = x["centre"].detach().clone()[None, None]
        return made([x["teacher0"], x["teacher1"]], [x[f"student{i}"] for i in range(4)], teacher_temp=0.04)

    def ibot(x):
        made = loss.IBOTPatchLoss(8, 0.05, 0.1)
        made.center.center = x["centre"].detach().clone()[None]
        rows = x["mask"].reshape(-1)[:6]  # six of eight rows: as many as student0 has
        mask = torch.cat([rows, torch.zeros(2, dtype=torch.bool)]).reshape(2, 2, 2)
        return made(x["teacher0"][rows], x["student0"][rows], mask)

    def msn(x, weight):
        anchors = torch.cat([x["a"], x["b"]])
        return loss.MSNLoss(0.1, 3, weight)(anchors, x["c"], x["prototypes"], target_sharpen_temperature=0.25)

    def tico(x):
        made = loss.TiCoLoss(beta=0.9, rho=8.0)
        made.C = x["covariance"].detach()
        return made(x["a"], x["b"].detach())

    def lejepa(x):
        made = loss.lejepa_loss.LeJEPALoss(lambda_param=0.05)
        unit = normalize(x["directions"], dim=1)
        made.sigreg._generate_unit_vectors = lambda *_: unit.T
        views = torch.stack([x["a"], x["b"]])
        # The whole loss wants local views, and pulls all of them to the mean of the global ones.
        agree = loss.lejepa_loss.lejepa_invariance_loss(all_proj=views, global_proj=views)
        return 0.05 * made.double().sigreg(views) + 0.95 * agree

    def vicregl(x):
        made = loss.VICRegLLoss(25.0, 10.0, 1.0, 0.75, num_matches=(4, 4))
        features = [(x[name], x[f"map{i}"].reshape(6, 2, 2, 3)) for i, name in enumerate("abc")]
        grids = [x[f"grid{i}"].reshape(6, 2, 2, 2) for i in range(3)]
        return made(features[:2], grids[:2], features[2:], grids[2:])

    scores = [f"student{i}" for i in range(4)]
    return {
        "nt_xent": (lambda x: loss.NTXentLoss(temperature=0.3)(x["a"], x["b"]), "a b"),
        "moco": (moco, "a"),
        "negative_cosine": (lambda x: cos(x["a"], x["b"].detach()), "a"),
        # As its examples put the two directions together.
        "byol": (lambda x: (cos(x["a"], x["d"].detach()) + cos(x["b"], x["c"].detach())) / 2, "a b"),
        "simsiam": (lambda x: (cos(x["a"], x["d"].detach()) + cos(x["b"], x["c"].detach())) / 2, "a b"),
        "barlow_twins": (lambda x: loss.BarlowTwinsLoss(lambda_param=0.005)(x["a"], x["b"]), "a b"),
        "barlow_twins, wide": (
            lambda x: loss.BarlowTwinsLoss(lambda_param=0.1)(x["wide_a"], x["wide_b"]),
            "wide_a wide_b",
        ),
        "vicreg": (lambda x: loss.VICRegLoss(25.0, 10.0, 1.0)(x["a"], x["b"]), "a b"),
        "vicreg, wide": (lambda x: loss.VICRegLoss(25.0, 10.0, 1.0)(x["wide_a"], x["wide_b"]), "wide_a wide_b"),
        "vicreg, maps": (lambda x: loss.VICRegLoss(25.0, 10.0, 0.5)(x["map0"], x["map1"]), "map0 map1"),
        "vicregl": (vicregl, "a b c map0 map1 map2"),
        "swav": (lambda x: swav(x, False), " ".join(scores[:2])),
        "swav, multi-crop": (lambda x: swav(x, True), " ".join(scores)),
        "dino": (dino, " ".join(scores)),
        "ibot": (ibot, "student0"),
        "msn": (lambda x: msn(x, 1.0), "a b prototypes"),
        "msn, without the mean": (lambda x: msn(x, 0.0), "a b prototypes"),
        "tico": (tico, "a"),
        "koleo": (lambda x: loss.KoLeoLoss()(x["a"]), "a"),
        "lejepa": (lejepa, "a b"),
    }


def solo_learn() -> dict:
    import torch
    from solo import losses
    from torch.nn.functional import normalize

    def dino(x):
        made = losses.DINOLoss(8, 0.04, 0.04, 0, 1, student_temp=0.1, num_large_crops=4)
        made.center = x["centre"].detach().clone()[None]
        student = torch.cat([x[f"student{i}"] for i in range(4)])
        return made(student, torch.cat([x["teacher0"], x["teacher1"]]))

    def swav(x):
        from solo.utils.sinkhorn_knopp import SinkhornKnopp

        scores = [x["student0"], x["student1"]]
        return losses.swav_loss_func(scores, [SinkhornKnopp(3, 0.05)(s.detach()) for s in scores], 0.1)

    def moco(x):
        q, k, queue = (normalize(x[name], dim=1) for name in ("a", "b", "queue"))
        return losses.mocov2plus_loss_func(q, k.detach(), queue.detach().T, 0.2)

    index = torch.arange(6).repeat(2)
    return {
        "nt_xent": (lambda x: losses.simclr_loss_func(torch.cat([x["a"], x["b"]]), index, 0.3), "a b"),
        "moco": (moco, "a"),
        "moco_v3": (lambda x: losses.mocov3_loss_func(x["a"], x["b"], 0.2), "a"),
        "nnclr": (lambda x: losses.nnclr_loss_func(x["c"], x["a"], 0.1), "a"),
        "byol": (lambda x: losses.byol_loss_func(x["a"], x["b"]), "a"),
        "simsiam": (lambda x: losses.simsiam_loss_func(x["a"], x["b"]), "a"),
        "barlow_twins": (lambda x: losses.barlow_loss_func(x["a"], x["b"], 0.005, 0.025), "a b"),
        "vicreg": (lambda x: losses.vicreg_loss_func(x["a"], x["b"], 25.0, 10.0, 1.0), "a b"),
        "swav": (swav, "student0 student1"),
        "dino": (dino, "student0 student1 student2 student3"),
        "mae": (lambda x: losses.mae_loss_func(x["images"], x["pixels"], x["mask"], 4, False), "pixels"),
        "mae, normalized": (lambda x: losses.mae_loss_func(x["images"], x["pixels"], x["mask"], 4, True), "pixels"),
    }


def transformers() -> dict:
    import torch
    from transformers import ViTConfig, ViTForMaskedImageModeling

    def simmim(x):
        tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        model = ViTForMaskedImageModeling(ViTConfig(**tiny, image_size=8, patch_size=4, encoder_stride=4))
        # The network's answer is replaced by a given one; the loss is the model's own.
        answer = x["pixels"].reshape(2, 2, 2, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 8)
        model.decoder = torch.nn.Module()
        model.decoder.forward = lambda _: answer
        return model(x["images"], bool_masked_pos=x["mask"]).loss

    return {"simmim": (simmim, "pixels")}


def torch() -> dict:
    from torch import nn

    return {
        "triplet": (lambda x: nn.TripletMarginLoss(margin=1.0)(x["a"], x["b"], x["c"]), "a b c"),
        "smooth_l1": (lambda x: nn.functional.smooth_l1_loss(2 * x["a"], x["b"]), "a"),
        "cross_entropy": (lambda x: nn.functional.cross_entropy(x["a"], x["label"]), "a"),
    }


def stable_pretraining() -> dict:
    import jax
    from stable_pretraining.jax import forward, losses

    def method(name: str, part: str, loss):
        """The method's own forward function on views, projections and predictions that are given."""

        def run(x):
            answers = iter((x["a"], x["b"]))  # of the predictor
            targets = iter((x["c"], x["d"]))  # of the target network, in byol
            same = types.SimpleNamespace(
                forward_student=lambda y: y, forward_teacher=lambda _: jax.lax.stop_gradient(next(targets))
            )
            plain = types.SimpleNamespace(forward_student=lambda y: y, forward_teacher=lambda y: y)
            nets = {"backbone": plain, "projector": same} if name == "byol" else {}
            self = types.SimpleNamespace(**{"backbone": lambda y: y, "projector": lambda y: y, **nets})
            self.training, self.log, self.predictor = True, lambda *_: None, lambda _: next(answers)
            setattr(self, part, loss)
            pair = (x["c"], x["d"]) if name == "simsiam" else (x["a"], x["b"])
            return getattr(forward, name)(self, {"views": [{"image": v} for v in pair]}, "fit")["loss"]

        return run

    barlow, scale = losses.BarlowTwinsLoss(lambd=0.005), 1e4  # so large that the epsilons do not count
    return {
        "simclr": (method("simclr", "simclr_loss", losses.NTXEntLoss(temperature=0.3)), "a b"),
        "byol": (method("byol", "byol_loss", losses.BYOLLoss()), "a b"),
        "simsiam": (method("simsiam", "simsiam_loss", losses.NegativeCosineSimilarity()), "a b"),
        "vicreg": (method("vicreg", "vicreg_loss", losses.VICRegLoss(25.0, 10.0, 1.0)), "a b"),
        "barlow_twins": (
            lambda x: method("barlow_twins", "barlow_loss", barlow)(
                {"a": scale * x["a"], "b": scale * x["b"]} | {key: x[key] for key in ("c", "d")}
            ),
            "a b",
        ),
        "info_nce": (lambda x: losses.InfoNCELoss(0.2)(x["a"], x["queue"], x["label"]), "a queue"),
        "swav": (lambda x: losses.SwAVLoss(0.1, 3, 0.05)(x["student0"], x["student1"]), "student0 student1"),
    }


PEERS = {
    "lightly": lightly,
    "solo-learn": solo_learn,
    "transformers": transformers,
    "torch": torch,
    "stable-pretraining": stable_pretraining,
}


def with_torch(cases: dict, x: dict) -> dict:
    import torch

    torch.set_default_dtype(torch.float64)
    found = {}
    for name, (loss, wanted) in cases.items():
        given = {key: torch.from_numpy(value.copy()) for key, value in x.items()}
        for key in wanted.split():
            given[key].requires_grad_()
        value = loss(given)
        value.sum().backward()
        assert value.dtype == torch.float64
        found[f"{name}/value"] = value.detach().numpy().reshape(())
        found |= {f"{name}/grad/{key}": given[key].grad.numpy() for key in wanted.split()}
    return found


def with_jax(cases: dict, x: dict) -> dict:
    import jax

    jax.config.update("jax_enable_x64", True)
    found = {}
    for name, (loss, wanted) in cases.items():
        names = wanted.split()
        value, grads = jax.value_and_grad(lambda some, loss=loss: loss(x | some))({key: x[key] for key in names})
        found[f"{name}/value"] = np.asarray(value)
        found |= {f"{name}/grad/{key}": np.asarray(grads[key]) for key in names}
    return found


def version(library: str, path: str) -> str:
    if not path:
        return importlib.metadata.version(library)
    line = next(line for line in (Path(path) / "setup.py").read_text().splitlines() if "version=" in line)
    return line.split('"')[1]


def main() -> None:
    stored = dict(np.load(OUT)) if OUT.exists() else {}
    about = json.loads(str(stored.pop("about", "{}")))
    x = inputs()
    stored |= {f"inputs/{key}": value for key, value in x.items()}
    for argument in sys.argv[1:]:
        library, _, path = argument.partition("=")
        if library not in PEERS:
            sys.exit(f"{library}: unknown; allowed: {', '.join(PEERS)}")
        if path:  # a checkout whose package imports more than its losses need
            for name in ("solo", "solo.utils"):
                sys.modules[name] = module = types.ModuleType(name)
                module.__path__ = [str(Path(path) / name.replace(".", "/"))]
        run = with_jax if library == "stable-pretraining" else with_torch
        found = run(PEERS[library](), x)
        stored = {key: value for key, value in stored.items() if not key.startswith(f"{library}/")}
        stored |= {f"{library}/{key}": value for key, value in found.items()}
        about[library] = version(library, path)
        print(f"{library} {about[library]}: {sum(key.endswith('/value') for key in found)} losses", flush=True)
    np.savez_compressed(OUT, about=json.dumps(about), **stored)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
