"""What each number of the report means, in words for someone who sees it for the first time."""

from collections.abc import Iterable
from typing import NamedTuple


class Word(NamedTuple):
    """title: what the number is called. meaning: a sentence. top: the largest value there can be, 100 for shares (in
    percent) and 1 for AUCs, whose axes span at least a fifth of it; None for all others."""

    title: str
    meaning: str
    top: float | None = None


# What `metrics.jsonl` and `timing.jsonl` hold for every method.
COMMON = {
    "loss": Word(
        "Loss", "What training makes smaller. Its size depends on method and settings: compare it only within a run."
    ),
    "knn_accuracy": Word(
        "kNN accuracy",
        "Share of held-out training images that get the right class if the most similar other images vote. Nothing is "
        "trained for it, so it tells how good the embedding is as it is.",
        100,
    ),
    "knn_auc": Word(
        "kNN, macro AUC",
        "How well votes of the most similar images rank held-out images with a finding above those without it: 1 is "
        "perfect, 0.5 is guessing. Mean over findings.",
        1,
    ),
    "probe_accuracy": Word(
        "Linear probe accuracy",
        "Share of the batch that a linear classifier gets right. It is trained beside the encoder, on augmented "
        "images, and the encoder learns nothing from it. Not comparable with kNN, which sees whole images.",
        100,
    ),
    "probe_loss": Word(
        "Online probe, loss",
        "Cross-entropy of a linear classifier that is trained beside the encoder: 0.69 is guessing, lower is better.",
    ),
    "embedding_std": Word(
        "Embedding std",
        "How far the embeddings of a batch spread: 0 means that all images look alike to the encoder (a collapse), "
        "about 1 that every direction is used.",
    ),
    "rank_me": Word(
        "RankMe",
        "Effective rank of the embeddings: how many directions they use, from 1 (a collapse) to their dimensions.",
    ),
    "grad_norm": Word("Gradient norm", "Length of the gradient of all weights. Jumps are a sign of unstable training."),
    "lr": Word("Learning rate", "How large the optimizer's steps are, by the schedule."),
    "images_per_s": Word("Images / s", "Speed of training, in images per second."),
}
# What only some methods report.
OWN = {
    "chance": Word(
        "Loss relative to chance",
        "The loss divided by that of guessing (chance): at 1, the partner of a view is not told from other images; "
        "lower is better.",
    ),
    "positive_rank": Word(
        "Positive rank",
        "How many other images look at least as similar to a view as its partner, the other view of the same image "
        "(the positive). Mean over the batch; 0 is best.",
    ),
    "projection_std": Word(
        "Projection std",
        "How far the outputs of the projector spread over a batch; near 0, all images get the same one (a collapse).",
    ),
    "projection_rank": Word(
        "Projection rank", "In how many directions the outputs of the projector point; 1 is a collapse."
    ),
    "target_entropy": Word(
        "Target entropy",
        "How undecided the target of an image is between the outputs, in nats: 0 if it is sure of one; at its maximum, "
        "no image prefers any output (a collapse).",
    ),
    "mean_target_entropy": Word(
        "Mean target entropy",
        "How evenly the images of a batch use all outputs, in nats; near 0, all get the same one (a collapse).",
    ),
    "accuracy": Word(
        "Accuracy in training",
        "Share of the batch for which the task that the method sets itself, or its labels, is answered right.",
        100,
    ),
    "distance": Word(
        "Distance", "Mean distance between the embeddings of different images; near 0, they look alike (a collapse)."
    ),
    "anchors": Word(
        "Anchors",
        "How many views have both a view of their class and one of another class in the batch, to learn from.",
    ),
    "skipped": Word("Skipped", "1 where a step was skipped because its gradient was not finite."),
}
# The scores of `evaluate.metrics`.
SCORES = {
    "top1": Word("Top-1 accuracy", "share of the test images whose class is ranked first"),
    "balanced_accuracy": Word(
        "Balanced accuracy", "mean of the recall of all classes, so a rare class counts as much as a frequent one"
    ),
    "macro_auc": Word(
        "Macro ROC AUC",
        "how often an image of a class is ranked above one that is not of it, mean over classes; 0.5 is guessing",
    ),
    "top5": Word("Top-5 accuracy", "share of the test images whose class is among the first five"),
    "macro_ap": Word(
        "Macro average precision",
        "how pure the top of the ranking is, mean over classes; guessing gives the share of positives",
    ),
    "brier": Word("Brier score", "squared error of the probabilities; 0 is best"),
    "calibration_error": Word(
        "Calibration error", "distance between predicted probabilities and observed shares; 0 is best"
    ),
    "recall": Word("recall", "share of the images of a class that are recognised as such"),
    "precision": Word("precision", "share of the images said to be of a class that are"),
    "f1": Word("F1", "harmonic mean of recall and precision"),
    "auc": Word("ROC AUC", "how often an image of the class is ranked above one that is not; 0.5 is guessing"),
    "ap": Word("average precision", "how pure the top of the ranking is; guessing gives the share of positives"),
}


def of(metric: str) -> Word:
    """The words for a metric of training, whichever method reports it."""
    known = COMMON | OWN
    if metric in known:
        return known[metric]
    title = metric.replace("_", " ").capitalize()
    if metric.startswith("loss_"):
        space = metric.removeprefix("loss_")
        return Word(title, f"The part of the loss in the embedding space “{space}”; the loss is their mean.")
    if metric.endswith("_error"):
        return Word(title, "Mean squared error of what the method predicts of the transformation; 0 is best.")
    return Word(title, "A number of this method; its page says more.")


def footnote(metrics: Iterable[str]) -> str:
    """What scores mean, in one paragraph."""
    known = [SCORES[metric] for metric in metrics if metric in SCORES]
    return "; ".join(f"{word.title}: {word.meaning}" for word in known) + "." if known else ""


def title(score: str) -> str:
    """The name of a score, as tables and figures have it."""
    return SCORES[score].title if score in SCORES else score.replace("_", " ")
