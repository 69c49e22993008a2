"""Phantom radiographs: drawn chest X-rays in CheXpert's layout, to try methods out where no patient data can be had.

`patients` says who has what and what a report parser would read, `anatomy` and `findings` draw it, `write` makes the
files. Everything is a function of (seed, part, patient number); no claim about patients can be made from it.
"""

from ssl_jax.phantom.draw import Phantom, draw
from ssl_jax.phantom.patients import OBSERVATIONS, Patient, Study, make_patient
from ssl_jax.phantom.write import write

__all__ = ["OBSERVATIONS", "Patient", "Phantom", "Study", "draw", "make_patient", "write"]
