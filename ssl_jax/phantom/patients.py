"""Patients with correlated findings, and the labels that a report parser would extract from their reports."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ssl_jax.data.chexpert import OBSERVATIONS

# Causes: standard normal variables that all findings of a patient share.
FAILURE, INFECTION, TRAUMA, CARE, CHRONIC = range(5)
HAZE = "haze"  # a faint opacity without a name in CheXpert; counts as Lung Opacity
# What is drawn: the share of exams that show it, and how much of it each cause explains (the squares add up to less
# than 1; the rest is chance). The shares are those of the positive reports in CheXpert plus about half of the uncertain
# ones (https://arxiv.org/abs/1901.07031, table 1).
DRAWN: dict[str, tuple[float, dict[int, float]]] = {
    "Enlarged Cardiomediastinum": (0.07, {FAILURE: 0.4, CHRONIC: 0.3}),
    "Cardiomegaly": (0.14, {FAILURE: 0.65, CHRONIC: 0.2}),
    HAZE: (0.16, {INFECTION: 0.3, CARE: 0.3}),
    "Lung Lesion": (0.05, {CHRONIC: 0.5}),
    "Edema": (0.29, {FAILURE: 0.6, CARE: 0.35}),
    "Consolidation": (0.11, {INFECTION: 0.65, CARE: 0.25}),
    "Pneumonia": (0.06, {INFECTION: 0.7}),
    "Atelectasis": (0.22, {CARE: 0.5, TRAUMA: 0.2}),
    "Pneumothorax": (0.10, {TRAUMA: 0.6, CARE: 0.15}),
    "Pleural Effusion": (0.42, {FAILURE: 0.45, CARE: 0.3, INFECTION: 0.2}),
    "Pleural Other": (0.03, {CHRONIC: 0.5}),
    "Fracture": (0.05, {TRAUMA: 0.6}),
    "Support Devices": (0.56, {CARE: 0.7, FAILURE: 0.2, TRAUMA: 0.15}),
}
THRESHOLD = {name: NormalDist().inv_cdf(1 - share) for name, (share, _) in DRAWN.items()}
OPACITIES = (HAZE, "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis")  # CheXpert's tree: Lung Opacity
PERSISTENT = 0.75  # correlation between the findings of two exams of one patient
# What a report says: how often it hedges at the threshold, the share of absent findings that it calls absent, and the
# share of present ones that it omits. The first two give about the shares of -1 and 0 in CheXpert's train.csv.
REPORTED: dict[str, tuple[float, float, float]] = {
    "Enlarged Cardiomediastinum": (0.4, 0.10, 0.30),
    "Cardiomegaly": (0.16, 0.05, 0.12),
    "Lung Opacity": (0.06, 0.03, 0.12),
    "Lung Lesion": (0.06, 0.01, 0.25),
    "Edema": (0.18, 0.09, 0.08),
    "Consolidation": (0.68, 0.13, 0.10),
    "Pneumonia": (0.65, 0.01, 0.20),
    "Atelectasis": (0.56, 0.01, 0.10),
    "Pneumothorax": (0.08, 0.25, 0.08),
    "Pleural Effusion": (0.13, 0.16, 0.05),
    "Pleural Other": (0.13, 0.005, 0.30),
    "Fracture": (0.03, 0.01, 0.25),
    "Support Devices": (0.013, 0.03, 0.03),
}
INVENTED = 0.015  # share of absent findings that a report calls present


@dataclass(frozen=True)
class Exam:
    """One visit to the X-ray department; CheXpert calls it a study.

    margin: for each drawn finding, how far it is above its threshold (present) or below (absent), in standard
    deviations. Some findings just below the threshold are drawn faintly, as in life.
    """

    number: int  # from 1
    views: int  # images
    ap: bool  # taken lying down (anteroposterior), which is more likely the sicker a patient is
    margin: dict[str, float]
    labels: dict[str, float]  # what the report says: 1, 0, -1 (uncertain) or NaN (not mentioned)

    @property
    def truth(self) -> dict[str, int]:
        """What is present: 0 or 1 for each of OBSERVATIONS."""
        return {name: int(margin > 0) for name, margin in self.margins.items()}

    @property
    def margins(self) -> dict[str, float]:
        """`margin` for each of OBSERVATIONS, including those that follow from others."""
        margins = {name: self.margin.get(name, 0.0) for name in OBSERVATIONS}
        margins["Lung Opacity"] = max(self.margin[name] for name in OPACITIES)
        ill = max(margin for name, margin in self.margin.items() if name != "Support Devices")
        return {**margins, "No Finding": -ill}


@dataclass(frozen=True)
class Patient:
    seed: int
    part: int  # 0: train, 1: valid
    number: int
    female: bool
    age: int
    exams: tuple[Exam, ...]

    def rng(self, *purpose: int) -> np.random.Generator:
        """Random numbers for one purpose: a function of the patient and `purpose` alone."""
        return np.random.Generator(np.random.PCG64([self.seed, self.part, self.number, *purpose]))


def make_patient(seed: int, part: int, number: int) -> Patient:
    """Patient `number` of a part (0: train, 1: valid), independent of all others. seed: 0 or more."""
    rng = np.random.Generator(np.random.PCG64([seed, part, number]))
    female, age = bool(rng.random() < 0.45), int(np.clip(rng.normal(60, 17), 18, 90))
    causes, own = rng.standard_normal(5), rng.standard_normal(len(DRAWN))
    visits = 1 if part else int(min(rng.geometric(0.55), 8))
    return Patient(seed, part, number, female, age, tuple(_exam(rng, causes, own, n + 1) for n in range(visits)))


def _exam(rng: np.random.Generator, causes: np.ndarray, own: np.ndarray, number: int) -> Exam:
    def today(lasting: np.ndarray) -> np.ndarray:
        return np.sqrt(PERSISTENT) * lasting + np.sqrt(1 - PERSISTENT) * rng.standard_normal(lasting.shape)

    causes, own = today(causes), today(own)
    margin = {}
    for (name, (_, loads)), chance in zip(DRAWN.items(), own, strict=True):
        explained = sum(load * causes[cause] for cause, load in loads.items())
        rest = np.sqrt(1 - sum(load**2 for load in loads.values()))
        margin[name] = float(explained + rest * chance) - THRESHOLD[name]
    views = 1 + int(rng.random() < 0.1)
    exam = Exam(number, views, bool(causes[CARE] + rng.standard_normal() > -0.6), margin, {})
    exam.labels.update(_report(rng, exam))
    return exam


def _report(rng: np.random.Generator, exam: Exam) -> dict[str, float]:
    """Labels as from a report: hedged if a finding is doubtful, silent about most absent findings, sometimes wrong."""
    labels, chance = {}, rng.random((len(OBSERVATIONS), 3))
    for (name, margin), (hedge, silence, error) in zip(exam.margins.items(), chance, strict=True):
        if name == "No Finding":
            labels[name] = 1.0 if margin > 0 and hedge < 0.5 else float("nan")
            continue
        hedged, absent, missed = REPORTED[name]
        if hedge < hedged * np.exp(-abs(margin) / 0.5):
            labels[name] = -1.0
        elif margin > 0:
            labels[name] = 1.0 if error > missed else (0.0 if silence < 0.2 else float("nan"))
        elif error < INVENTED * DRAWN.get(name, (0.2,))[0] / 0.2:
            labels[name] = 1.0
        else:
            labels[name] = 0.0 if silence < absent else float("nan")
    return labels
