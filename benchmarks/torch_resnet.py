"""The ResNets of ssl_jax.models with basic blocks, in PyTorch. Imports torch alone: peers' environments have no jax."""

from collections.abc import Sequence

from torch import Tensor, nn, relu


class Block(nn.Module):
    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU(inplace=True)),
            *(nn.Conv2d(features, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features)),
        )
        around = (nn.Conv2d(inputs, features, 1, stride, bias=False), nn.BatchNorm2d(features))
        self.around = nn.Identity() if stride == 1 and inputs == features else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + self.around(x))


def resnet(
    channels: int, widths: Sequence[int], depths: Sequence[int], *, stem: Sequence[int], pool: bool
) -> nn.Sequential:
    """Images [B, channels, H, W] -> [B, widths[-1]]. stem: size and stride of the first convolution; pool: whether a
    max-pool follows it. Convolutions start as torchvision's do."""
    size, stride = stem
    first = nn.Conv2d(channels, widths[0], size, stride, size // 2, bias=False)
    layers = [first, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    if pool:
        layers.append(nn.MaxPool2d(3, 2, 1))
    before = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            layers.append(Block(before, width, 2 if stage and i == 0 else 1))
            before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
