"""Named pairs of views, each number with its source. `config.augment.KEY` changes any of them."""

from dataclasses import replace

from ssl_jax.config import View

SMALL_UP_TO = 64  # px: the largest images for which auto means small: CIFAR-10 has 32, STL-10 96

# BYOL (arXiv 2006.07733, appendix B and table 6), also used by Barlow Twins and MoCo v3; torchvision's blur in px.
_BYOL = View(
    crop_scale=(0.08, 1.0),
    flip=0.5,
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    gray=0.2,
    blur_sigma=(0.1, 2.0),
    solarize_threshold=0.5,
)

# SimCLR on CIFAR-10 (arXiv 2002.05709, appendix B.9): colour distortion at half strength, no blur;
# smallest crop 0.2 as in solo-learn's and lightly's CIFAR recipes.
_SMALL = View(
    crop_scale=(0.2, 1.0),
    flip=0.5,
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray=0.2,
)

# Ours, for one channel: `small` without colour. Crops below a quarter would lose a 28 px garment.
_GRAYSCALE = View(crop_scale=(0.25, 1.0), flip=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4)

# MoCo-CXR (arXiv 2010.05352): rotation up to 10 degrees and flip, but no crop, blur or colour, because a lesion may be
# small and its brightness is the finding. The light perspective is ours. A flip puts the heart on the other side: set
# flip=0 if the side matters.
_CHEST_XRAY = View(rotate=10.0, flip=0.5, perspective=0.2, perspective_prob=0.5)

# Ours, for fine-tuning on few labels: a mild crop and a flip.
_LIGHT = View(crop_scale=(0.6, 1.0), flip=0.5)

# The linear protocol: crops of torchvision's RandomResizedCrop, and a flip (facebookresearch/dino, eval_linear.py).
_CROPS = View(crop_scale=(0.08, 1.0), flip=0.5)

# AET (arXiv 1901.04596; maple-research-lab/AET, cifar/affine/main.py): rotation, shear, zoom and shift of the second
# view; corners move by up to an eighth of the side as in cifar/projective, but only inwards. Colours as in _SMALL, but
# for every image. No crop, because a rotation about the image's centre would also move the content of a crop elsewhere.
_FLIP = View(flip=0.5)
_WARPED = replace(
    _FLIP,
    rotate=180.0,
    shear=30.0,
    zoom=(0.7, 1.3),
    translate=0.2,
    perspective=0.25,
    perspective_prob=1.0,
    jitter_prob=1.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
)

# Fine-tuning of MAE and DeiT, and of DINO with DeiT's code (facebookresearch/mae, main_finetune.py:82-93 and
# FINETUNE.md; deit, main.py:98-121; both leave crop and flip at the defaults of timm/data/transforms_factory.py).
_FINETUNE = View(
    crop_scale=(0.08, 1.0), flip=0.5, randaugment=2, randaugment_magnitude=9.0, randaugment_std=0.5, erase=0.25
)

PRESETS: dict[str, tuple[View, View]] = {
    # The second view is the one that is solarized and hardly blurred (BYOL, table 6).
    "natural": (replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarize=0.2)),
    "small": (_SMALL, _SMALL),
    "grayscale": (_GRAYSCALE, _GRAYSCALE),
    "chest_xray": (_CHEST_XRAY, _CHEST_XRAY),
    "light": (_LIGHT, _LIGHT),
    "crops": (_CROPS, _CROPS),
    "finetune": (_FINETUNE, _FINETUNE),
    "transformation": (_FLIP, _WARPED),
    "none": (View(), View()),
}


def preset_of(name: str, size: int) -> str:
    """The name of a preset; "auto" means `small` for images of up to SMALL_UP_TO px a side, `natural` for larger ones.

    Cut out of a small image, a twelfth of its area is a few pixels, and a blur leaves nothing of it.
    """
    return name if name != "auto" else "small" if size <= SMALL_UP_TO else "natural"
