"""The commands of `ssl-jax`, with their flags, in the order in which help lists them."""

from typing import Any

CONFIG = "config: NAME[:ARGUMENT] or FILE.py[:ARGUMENT]; change options with --config.SECTION.KEY=VALUE"
METHOD = "method with its recipe, such as simclr (`ssl-jax methods` lists them); instead of --config, or to change it"
RUN = "run folder, written by `ssl-jax pretrain`"
ENCODER = f"{RUN}, or a classifier folder, written by `ssl-jax finetune`"
STEP = ("", "checkpoint to use instead of the finished encoder: its step, or latest; the run may go on meanwhile")
# These accept --config.KEY=VALUE but have no --config.
OVERRIDES = ("evaluate", "transfer", "finetune", "predict", "embed", "export", "select", "check", "search")
DATA = "folder of images or of CheXpert, .csv or .npz file, or a source such as fashion_mnist or tfds:NAME"
JSON = (False, "end the output with one line of JSON, for programs")
DRY_RUN = (False, "say what this would read, need and write, after a few steps; write nothing")
QUIET = (False, "print nothing but warnings and errors")
MASKS = "folder of masks (IMAGE/CLASS.png or IMAGE.png) or table of boxes (path,left,top,right,bottom,class)"
LENGTH = {
    "epochs": ("", "length of the run: train.duration"),
    "steps": ("", "the same, in steps"),
    "batch": ("", "images per step: train.batch"),
    "size": ("", "side to which images are resized, in px: data.size"),
    "model": ("", "architecture: model.name"),
}

# command: (summary, {flag: (default, help)}); the default ... marks a required flag
COMMANDS: dict[str, tuple[str, dict[str, tuple[Any, str]]]] = {
    "pretrain": (
        "train an encoder; the same command continues an interrupted run",
        {
            "method": ("", METHOD),
            "data": ("", f"images to train on: {DATA}"),
            "workdir": (..., "run folder to create or continue"),
            **LENGTH,
            "config": ("", CONFIG),
            "cluster": (False, "join the other hosts of a TPU pod; SLURM, Open MPI and GKE need no flag"),
            "dry_run": DRY_RUN,
        },
    ),
    "evaluate": (
        "evaluate an encoder: kNN, linear probe or fine-tuning, on all or few labels",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "protocol": (
                "knn",
                "knn, linear (SGD on crops, as papers have it), linear_quick (logistic regression), finetune, or "
                "propagate (labels spread to all images, then linear_quick)",
            ),
            "labels": (0, "number of labelled images to train on; 0: all"),
            "seeds": (1, "number of times these images are drawn"),
            "data": ("", f"labelled data (default: the run's own): {DATA}"),
            "test": ("", "test data (default: the test split of the data, or 20 % held out)"),
            "unlabelled": ("", "images without a label, to learn from as well (propagate: default: all of the data)"),
            "json": JSON,
        },
    ),
    "reproduce": (
        "pretrain a recipe, evaluate it as its source did, and compare with the published number",
        {
            "config": (..., "recipe: NAME:RECIPE or FILE.py:RECIPE, such as imagenet:byol; its file has get_published"),
            "data": ("", f"images to train on (default: the recipe's): {DATA}"),
            "workdir": (..., "run folder to create, to continue or, if its run has ended, to use"),
            "test": ("", "labelled test data (default: the test split of the data)"),
            "seeds": (1, "number of runs, each with its own seed"),
            **LENGTH,
            "topology": ("", "with --dry-run: a TPU slice, such as v5e:8x8, for which hours are predicted"),
            "cluster": (False, "as of pretrain"),
            "dry_run": DRY_RUN,
            "json": JSON,
        },
    ),
    "transfer": (
        "evaluate an encoder on several labelled data sets, in one table, each with the metric of its literature",
        {
            "workdir": (..., ENCODER),
            "data": (
                "",
                "data sets, separated by commas: tfds:cifar10,DIR (default: the usual ones, if prepared)",
            ),
            "protocol": ("linear_quick", "linear_quick or knn"),
            "step": STEP,
            "json": JSON,
        },
    ),
    "study": (
        "compare methods over label counts and seeds; the same command continues an interrupted study",
        {
            "config": (..., CONFIG),
            "data": ("", f"images, some of them labelled (default: the config's): {DATA}"),
            "workdir": (..., "study folder to create or continue"),
            "cells": ("", "K/N: run only the K-th of N parts; 0/N: only pretrain"),
            "dry_run": DRY_RUN,
        },
    ),
    "sweep": (
        "try settings, such as views and learning rates, in short runs that are scored alike",
        {
            "method": ("", METHOD),
            "data": ("", f"images to train on: {DATA}"),
            "workdir": (..., "sweep folder to create, continue or extend"),
            "over": (..., 'options and their values: "augment.preset=natural,light;optim.lr=0.03,0.1"'),
            "labels": ("", f"the labelled images to judge by (default: the run's own kNN, or RankMe): {DATA}"),
            "search": (
                "grid",
                "grid (all), random (--trials of them) or halving (the best third of short runs goes on)",
            ),
            "trials": (0, "random, halving: number of combinations to draw; 0: all"),
            "seed": (0, "of the draw of combinations and of the folds of the labels"),
            **LENGTH,
            "config": ("", CONFIG),
            "cells": ("", "K/N: run only the K-th of N shares, without the table"),
            "workers": (1, "processes that share the trials, each with its share of the GPUs"),
            "dry_run": DRY_RUN,
            "json": JSON,
        },
    ),
    "finetune": (
        "train a classifier on labelled images, starting from an encoder",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "data": (..., f"labelled data: {DATA}"),
            "out": (..., "folder for the classifier"),
            "test": ("", "labelled data to test on"),
            "unlabelled": ("", f"images without a label, to learn from as well: {DATA}"),
            "seed": (0, "random seed"),
            "dry_run": DRY_RUN,
            "json": JSON,
        },
    ),
    "predict": (
        "write class probabilities for images",
        {
            "workdir": (..., "classifier folder, written by `ssl-jax finetune`"),
            "data": (..., DATA),
            "out": (..., ".csv or .json file to write"),
            "json": JSON,
        },
    ),
    "embed": (
        "write embeddings of images, with their paths and, where the data have them, their labels",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "data": (..., DATA),
            "features": ("cls", "cls (the embedding), patch (the last feature map) or both"),
            "out": (..., ".npz, .csv or .parquet file; or a folder, for many images: written in parts, resumable"),
        },
    ),
    "export": (
        "write an encoder or classifier as a file for other programs, run and compared before it is said to be written",
        {
            "workdir": (..., ENCODER),
            "step": STEP,
            "format": (..., "onnx, stablehlo, timm, torchvision or huggingface"),
            "features": ("cls", "of an encoder: cls (the embedding), patch (the last feature map) or both"),
            "opset": (18, "of ONNX: 18 or more"),
            "out": (..., "folder to create, with the file, a model card and the names of the classes"),
            "json": JSON,
        },
    ),
    "select": (
        "choose the images that are worth labelling, and write a table to fill in",
        {
            "workdir": (..., ENCODER),
            "labels": (50, "number of images to choose"),
            "out": ("to_label.csv", ".csv file to write"),
            "data": ("", f"images to choose from (default: the run's own): {DATA}"),
            "have": ("", f"images that are labelled already: {DATA}"),
            "strategy": (
                "typical",
                "typical, coverage, kcenter, random; with labels or a classifier uncertain, margin",
            ),
            "page": (False, "also write a page to label with, OUT with the ending .html"),
            "classes": ("", "names of the classes, separated by commas, for the page (default: those of --have)"),
            "seed": (0, "random seed"),
            "json": JSON,
        },
    ),
    "check": (
        "find what is wrong with images: unreadable, odd, copies, leaks into a test set, outliers, doubtful labels",
        {
            "data": (..., DATA),
            "workdir": ("", f"{ENCODER}; without it, outliers and labels are not judged"),
            "test": ("", "test data to compare with (default: the test part of the data, if there is one)"),
            "out": ("check", "folder for check.csv and check.html"),
            "json": JSON,
        },
    ),
    "search": (
        "find the images that look most like a query to an encoder",
        {
            "workdir": (..., ENCODER),
            "query": (..., f"image file, or {DATA}"),
            "data": (..., f"images to search: {DATA}"),
            "out": ("neighbours.html", ".html file to write; a table of the same name in .csv lies beside it"),
            "k": (10, "number of images for each query"),
            "json": JSON,
        },
    ),
    "compare": (
        "compare runs: options, curves, and scores on the same test images with paired intervals",
        {
            "runs": (..., "run folders, two or more; each after a space"),
            "out": ("compare.html", ".html file to write"),
            "json": JSON,
        },
    ),
    "views": (
        "draw what a config's transforms do to your images",
        {
            "method": ("", METHOD),
            "data": ("", f"images to draw: {DATA}"),
            "out": ("views.png", ".png file to write"),
            "size": LENGTH["size"],
            "config": ("", CONFIG),
            "images": (6, "number of images"),
            "masks": ("", f"{MASKS}; draws only images with masks, and their outlines"),
        },
    ),
    "audit": (
        "audit transforms: do they cut off lesions (--lesions), and what does an encoder ignore (--invariance)?",
        {
            "lesions": (False, "measure how often the views of --config lose a lesion; needs --masks"),
            "invariance": (False, "measure how far transforms move the embeddings of --workdir"),
            "config": ("", f"{CONFIG}; --invariance without --workdir audits the encoder that it describes"),
            "masks": ("", MASKS),
            "workdir": ("", RUN),
            "data": ("", f"images for --invariance (default: the run's own): {DATA}"),
            "out": ("audit", "folder for a table and a figure"),
            "images": (200, "number of images"),
        },
    ),
    "report": (
        "write one self-contained HTML page about a run or a study",
        {
            "workdir": (..., "run or study folder"),
            "out": ("", ".html file (default: report.html in the folder)"),
        },
    ),
    "plan": (
        "predict memory, speed and hours of a run on a TPU slice by compiling it here",
        {
            "config": (..., CONFIG),
            "topology": ("", "version and shape of the slice, such as v5e:4x8 or v5p:2x2x4"),
            "sweep": ("", "several slices to compare in a table, separated by commas"),
            "images": (0, "number of training images, if the data are not on this machine"),
            "classes": (0, "their number of classes; 0: no labels"),
            "out": ("", "folder for a table and a figure"),
        },
    ),
    "phantom": (
        "generate artificial chest radiographs with known findings, in CheXpert's layout",
        {
            "out": (..., "folder to create or finish"),
            "patients": (10_000, "number of training patients, about two images each"),
            "seed": (0, "random seed; each patient depends only on the seed and its number"),
            "size": (128, "side of the images in px"),
            "test": (300, "number of test images, with clean labels"),
        },
    ),
    "weights": (
        "say what a file of weights is, what of it would be used, and how to start from it",
        {
            "file": (..., "run folder, .safetensors or .pth file, its folder, or OWNER/NAME in Hugging Face's cache"),
            "size": (0, "side of your images in px"),
            "channels": (3, "their channels"),
            "json": JSON,
        },
    ),
    "methods": ("list the methods, their sources and the data they need", {"json": JSON}),
    "completion": (
        'complete commands and flags with the tab key: eval "$(ssl-jax completion bash)" in ~/.bashrc',
        {"shell": (..., "bash or zsh")},
    ),
}
# The flags whose names may be left out: ssl-jax pretrain METHOD DATA. With --config, neither is a method or config.
POSITIONAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pretrain", "views", "sweep"), ("method", "data")),
    **dict.fromkeys(("evaluate", "transfer", "finetune", "predict", "embed", "select"), ("workdir", "data")),
    **dict.fromkeys(("study", "reproduce"), ("config", "data")),
    "plan": ("config",),
    **dict.fromkeys(("report", "export"), ("workdir",)),
    "check": ("data",),
    "search": ("workdir", "query", "data"),
    "compare": ("runs",),
    "phantom": ("out",),
    "weights": ("file",),
    "completion": ("shell",),
}
SEVERAL = {"compare": "runs"}  # the flag that takes all bare words
# Flags that are short for an option of the config.
SHORT = {
    "method": "method.name={}",
    "epochs": "train.duration={} epochs",
    "steps": "train.duration={} steps",
    "batch": "train.batch={}",
    "size": "data.size={}",
    "model": "model.name={}",
}
# Commands that are not in `commands`: the module with their function.
ELSEWHERE = {"reproduce": "ssl_jax.reproduce", "transfer": "ssl_jax.transfer"}
# A signal ends them with exit code 75, and the same command goes on.
REQUEUED = ("pretrain", "reproduce", "study", "sweep")
