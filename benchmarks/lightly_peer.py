"""One run of lightly (PyTorch) with the settings of one run of ssl_jax; `against_lightly.py` starts it.

    peer/bin/python benchmarks/lightly_peer.py SETTINGS.json           trains, writes result.json and embeddings.npz
    peer/bin/python benchmarks/lightly_peer.py --check SETTINGS.json ...  only compares the numbers of parameters

Losses, heads, momentum and the rule of weight decay are lightly's, put together as its examples do; data come through a
DataLoader with torchvision's transforms, image by image in worker processes. Every number is read from the resolved
config of ssl_jax in SETTINGS.json. What lightly's options cannot make equal is told in benchmarks/README.md.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    TiCoLoss,
    VICRegLoss,
)
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch_resnet import resnet
from torchvision import transforms

TIMED = 10  # steps whose median is the time of a step alone


class Half(nn.Module):
    """A backbone that computes in bfloat16; heads and losses stay in float32, as those of ssl_jax do."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x).float()


def backbone(run: SimpleNamespace) -> nn.Module:
    net = resnet(**run.network)
    return Half(net) if run.dtype == "bfloat16" else net


class Peer(nn.Module):
    """A method: `online` is backbone and projector, `target` their moving average where there is one."""

    def __init__(self, run: SimpleNamespace, head: nn.Module):
        super().__init__()
        self.online = nn.Sequential(backbone(run), head)
        self.run = run

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        raise NotImplementedError

    def embedder(self) -> nn.Module:
        return self.online[0]

    def before_update(self, step: int) -> None:
        """Between the gradient and the optimizer."""

    def after_update(self, step: int) -> None:
        """After the optimizer."""


class WithTarget(Peer):
    def __init__(self, run: SimpleNamespace, head: nn.Module, target_head: nn.Module | None = None):
        super().__init__(run, head)
        self.target = nn.Sequential(backbone(run), target_head or copy.deepcopy(head))
        self.target.load_state_dict(self.online.state_dict())
        deactivate_requires_grad(self.target)

    def after_update(self, step: int) -> None:
        # steps + 1: the momentum would be 1 after the last step, not in it.
        update_momentum(
            self.online, self.target, m=cosine_schedule(step, self.run.steps + 1, self.run.method.momentum, 1.0)
        )


def without_last_bias(head: heads.ProjectionHead) -> heads.ProjectionHead:
    """The authors' last layer has no bias, and so ours; lightly's has."""
    head.layers[-1].register_parameter("bias", None)
    return head


class SimCLR(Peer):
    def __init__(self, run):
        m = run.method
        # lightly's SimCLRProjectionHead ends in a BatchNorm; ours, like the paper's, does not.
        blocks = [(run.features, m.hidden, nn.BatchNorm1d(m.hidden), nn.ReLU()), (m.hidden, m.out, None, None)]
        super().__init__(run, heads.ProjectionHead(blocks))
        self.criterion = NTXentLoss(temperature=m.temperature)

    def loss(self, views, step):
        return self.criterion(*self.online(torch.cat(views)).chunk(2))


class MoCo(WithTarget):
    def __init__(self, run):
        m = run.method
        super().__init__(run, heads.MoCoProjectionHead(run.features, m.hidden, m.out))
        self.criterion = NTXentLoss(temperature=m.temperature, memory_bank_size=(m.queue, m.out))

    def loss(self, views, step):
        with torch.no_grad():
            key = self.target(views[1])
        return self.criterion(self.online(views[0]), key)

    def after_update(self, step):
        update_momentum(self.online, self.target, m=self.run.method.momentum)


class BYOL(WithTarget):
    def __init__(self, run):
        m = run.method
        super().__init__(run, without_last_bias(heads.BYOLProjectionHead(run.features, m.hidden, m.out)))
        self.predictor = without_last_bias(heads.BYOLPredictionHead(m.out, m.hidden, m.out))
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views, step):
        predictions = [self.predictor(self.online(view)) for view in views]
        with torch.no_grad():
            targets = [self.target(view) for view in views]
        # The paper's scale, 2 - 2 cos in both directions, so that losses can be compared.
        return 4 + 2 * (self.criterion(predictions[0], targets[1]) + self.criterion(predictions[1], targets[0]))


class SimSiam(Peer):
    def __init__(self, run):
        m = run.method
        super().__init__(run, heads.SimSiamProjectionHead(run.features, m.hidden, m.out))
        self.predictor = heads.SimSiamPredictionHead(m.out, m.bottleneck, m.out)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views, step):
        z = [self.online(view) for view in views]
        p = [self.predictor(x) for x in z]
        return (self.criterion(p[0], z[1].detach()) + self.criterion(p[1], z[0].detach())) / 2


class BarlowTwins(Peer):
    def __init__(self, run):
        m = run.method
        super().__init__(run, heads.BarlowTwinsProjectionHead(run.features, m.hidden, m.out))
        self.criterion = BarlowTwinsLoss(lambda_param=m.off_diagonal)

    def loss(self, views, step):
        return self.criterion(*[self.online(view) for view in views])


class VICReg(Peer):
    def __init__(self, run):
        m = run.method
        super().__init__(run, heads.VICRegProjectionHead(run.features, m.hidden, m.out))
        self.criterion = VICRegLoss(lambda_param=m.invariance, mu_param=m.variance, nu_param=m.covariance)

    def loss(self, views, step):
        return self.criterion(*[self.online(view) for view in views])


class SwAV(Peer):
    def __init__(self, run):
        m = run.method
        super().__init__(run, heads.SwaVProjectionHead(run.features, m.hidden, m.out))
        self.prototypes = heads.SwaVPrototypes(m.out, m.prototypes, m.freeze_steps)
        self.criterion = SwaVLoss(m.temperature, m.sinkhorn_iterations, m.epsilon)

    def loss(self, views, step):
        self.prototypes.normalize()
        features = torch.cat([self.online[0](torch.cat(same)) for same in (views[:2], views[2:])])
        z = nn.functional.normalize(self.online[1](features), dim=1)
        scores = self.prototypes(z, step).chunk(len(views))
        return self.criterion(scores[:2], scores[2:])


class DINO(WithTarget):
    def __init__(self, run):
        m = run.method
        # Two heads, not a copy: PyTorch cannot copy the weight norm of the last layer.
        sizes = {"hidden_dim": m.hidden, "bottleneck_dim": m.bottleneck, "output_dim": m.out}
        sizes["freeze_last_layer"] = round(m.freeze_epochs)
        super().__init__(run, *(heads.DINOProjectionHead(run.features, **sizes) for _ in range(2)))
        temperatures = {"teacher_temp": m.teacher_temperature, "student_temp": m.temperature}
        self.criterion = DINOLoss(m.out, center_momentum=m.centre_momentum, **temperatures)

    def loss(self, views, step):
        with torch.no_grad():
            teacher = self.target(torch.cat(views[:2])).chunk(2)
        student = [
            out for same in (views[:2], views[2:]) if same for out in self.online(torch.cat(same)).chunk(len(same))
        ]
        return self.criterion(list(teacher), student)

    def embedder(self):
        return self.target[0]

    def before_update(self, step):
        self.online[1].cancel_last_layer_gradients(step // self.run.epoch_steps)


class TiCo(WithTarget):
    def __init__(self, run):
        m = run.method
        super().__init__(run, heads.TiCoProjectionHead(run.features, m.hidden, m.out))
        self.criterion = TiCoLoss(beta=m.beta, rho=m.rho)

    def loss(self, views, step):
        with torch.no_grad():
            target = self.target(views[1])
        return self.criterion(self.online(views[0]), target)


class Supervised(Peer):
    """Not of lightly: plain cross-entropy. The labels stand behind the view."""

    def __init__(self, run):
        super().__init__(run, nn.Linear(run.features, run.classes))

    def loss(self, views, step):
        images, labels = views
        return nn.functional.cross_entropy(self.online(images), labels)


METHODS = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
    "dino": DINO,
    "tico": TiCo,
    "supervised": Supervised,
}


def check(model: Peer, run: SimpleNamespace) -> None:
    """Exits if backbone or whole model have other numbers of trained parameters than in ssl_jax."""
    m = run.method
    # Biases that lightly's heads have and ours lack: before a BatchNorm-like loss they do nothing, in SwAV they do.
    more = {"barlow_twins": "out", "vicreg": "out", "swav": "prototypes"}.get(m.name)
    expected = {"backbone": run.parameters["encoder"], "whole model": run.parameters["all"] + getattr(m, more or "", 0)}
    found = {"backbone": model.online[0], "whole model": model}
    for name, module in found.items():
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if count != expected[name]:
            sys.exit(f"{m.name}: the {name} has {count} parameters; expected, from ssl_jax: {expected[name]}")


class Pictures(Dataset):
    """Views of images uint8 [N, H, W, 1], drawn image by image as torchvision's datasets do; then labels, if given."""

    def __init__(self, images: np.ndarray, run: SimpleNamespace, labels: np.ndarray | None = None):
        self.images, self.transform = images[..., 0], MultiViewTransform([view_of(v, run) for v in run.views])
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        views = self.transform(Image.fromarray(self.images[index]))
        return views if self.labels is None else [*views, int(self.labels[index])]


def view_of(view: dict, run: SimpleNamespace) -> transforms.Compose:
    jitter = transforms.ColorJitter(brightness=view["brightness"], contrast=view["contrast"])
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view["size"], scale=view["crop_scale"], ratio=view["crop_ratio"]),
            transforms.RandomHorizontalFlip(view["flip"]),
            transforms.RandomApply([jitter], p=view["jitter_prob"]),
            transforms.ToTensor(),
            transforms.Normalize(run.mean, run.std),
        ]
    )


def make_optimizer(model: Peer, run: SimpleNamespace) -> torch.optim.AdamW:
    """AdamW with lightly's rule of what decays: all but biases and norms, or everything."""
    o, groups = run.optim, []
    for name, module in model.named_children():
        for number, params in enumerate(get_weight_decay_parameters([module])):
            decay = o.weight_decay if number == 0 or o.decay_all else 0.0
            trained = [p for p in params if p.requires_grad]
            if trained:
                groups.append({"params": trained, "weight_decay": decay, "constant": name in run.constant_lr})
    return torch.optim.AdamW(groups, lr=0.0, betas=(o.momentum, o.b2))


def rate(step: int, run: SimpleNamespace) -> float:
    """Linear warm-up from 0, then a cosine to 0: the rule of ssl_jax, which lightly's scheduler meets to one step."""
    if step < run.warmup:
        return run.peak * step / run.warmup
    return run.peak * (1 + math.cos(math.pi * (step - run.warmup) / (run.steps - run.warmup))) / 2


def on_device(x: Tensor, run: SimpleNamespace) -> Tensor:
    x = x.to(run.device, non_blocking=True)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def train_step(model: Peer, optimizer: torch.optim.AdamW, views: list[Tensor], step: int) -> Tensor:
    run = model.run
    for group in optimizer.param_groups:
        group["lr"] = run.peak if group["constant"] else rate(step, run)
    optimizer.zero_grad()
    loss = model.loss([on_device(view, run) for view in views], step)
    loss.backward()
    if run.optim.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_norm)
    model.before_update(step)
    optimizer.step()
    model.after_update(step)
    return loss.detach()


@torch.no_grad()
def embed(model: Peer, images: np.ndarray) -> np.ndarray:
    net, parts = model.embedder().eval(), []
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (model.run.mean, model.run.std))
    for part in np.array_split(images, -(-len(images) // 512)):
        x = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
        parts.append(net(on_device((x - mean) / std, model.run)).cpu().numpy())
    net.train()
    return np.concatenate(parts)


def time_steps(run: SimpleNamespace, model: Peer, optimizer: torch.optim.AdamW, loader: DataLoader) -> None:
    """Writes the mean time of run.timed steps, loading included, after as many that do not count."""
    for step, views in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        if step == run.timed:
            began = time.perf_counter()
        loss = train_step(model, optimizer, views, step)
        if step in (run.timed - 1, 2 * run.timed - 1):
            loss.item()  # waits for the device
        if step == 2 * run.timed - 1:
            break
    seconds = (time.perf_counter() - began) / run.timed
    (Path(run.out) / "result.json").write_text(json.dumps({"step": seconds, "loss": loss.item()}))


def train(run: SimpleNamespace, model: Peer) -> None:
    out, data = Path(run.out), np.load(run.data)
    model = model.to(run.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, run)
    loader = DataLoader(
        Pictures(data["train"], run, data["labels"] if run.method.name == "supervised" else None),
        batch_size=run.batch,
        shuffle=True,
        drop_last=True,
        num_workers=run.workers,
        persistent_workers=run.workers > 0,
        pin_memory=run.device == "cuda",
    )
    if run.timed:
        time_steps(run, model, optimizer, loader)
        return
    seconds, step = [], 0
    for _ in range(run.epochs):
        began = time.perf_counter()
        for views in loader:
            loss = train_step(model, optimizer, views, step)
            step += 1
        seconds.append(time.perf_counter() - began)
        print(f"{run.method.name}: epoch {len(seconds)}, {seconds[-1]:.1f} s, loss {loss.item():.4f}", flush=True)
        if not math.isfinite(loss.item()):
            sys.exit(f"{run.method.name}: loss is {loss.item()}")
    began = time.perf_counter()
    np.savez(out / "embeddings.npz", train=embed(model, data["train"]), test=embed(model, data["test"]))
    embedding, alone = time.perf_counter() - began, []
    for _ in range(TIMED):
        start = time.perf_counter()
        train_step(model, optimizer, views, step - 1)
        alone.append(time.perf_counter() - start)
    after = time.perf_counter() - began
    result = {
        "epochs": seconds,
        "loss": loss.item(),
        "step": statistics.median(alone),
        "embed": embedding,
        "after": after,
    }
    (out / "result.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="compare the numbers of parameters only")
    args = parser.parse_args()
    for path in args.settings:
        run = SimpleNamespace(**json.loads(path.read_text()))
        run.method, run.optim = SimpleNamespace(**run.method), SimpleNamespace(**run.optim)
        torch.manual_seed(run.seed)
        torch.set_num_threads(run.cores)
        model = METHODS[run.method.name](run)
        check(model, run)
        if not args.check:
            train(run, model)


if __name__ == "__main__":
    main()
