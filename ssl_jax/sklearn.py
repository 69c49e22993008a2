"""An encoder as a transformer for scikit-learn's pipelines."""

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from ssl_jax.encoder import Encoder
from ssl_jax.load import load_encoder


class SSLEncoder(TransformerMixin, BaseEstimator):
    """Turns images into embeddings: make_pipeline(SSLEncoder("runs/a"), LogisticRegression()).fit(images, labels).

    path, step: as of `ssl_jax.load_encoder`, a run or a classifier; batch: images at a time. Images are those that
    `Encoder.embed` takes.

    It learns nothing from the images it is fitted on. The encoder is loaded when it is first needed, and again by
    `fit`. A copy, by `clone` or pickle, holds the path alone and loads the encoder where it is used.
    """

    def __init__(self, path: str | Path, *, step: int | Literal["latest"] | None = None, batch: int = 256):
        self.path, self.step, self.batch = path, step, batch

    def fit(self, X: Any, y: Any = None) -> Self:
        """Loads the encoder. Raises UserError if there is none."""
        del X, y
        self._encoder = load_encoder(self.path, self.step)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embeddings float32 [N, D] of N images; see `Encoder.embed`."""
        return self._loaded().embed(X, self.batch)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """e0, e1, ..., as `ssl-jax embed` names them: object [D]."""
        del input_features
        return np.array([f"e{i}" for i in range(self._loaded().width)], dtype=object)

    def _loaded(self) -> Encoder:
        return self._encoder if hasattr(self, "_encoder") else self.fit(None)._encoder

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_encoder"}
