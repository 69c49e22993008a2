"""Phantom radiographs: drawn chest X-rays in CheXpert's layout, to try out methods without patient data.

`patients` decides who has which findings and what their reports say, `anatomy` and `findings` draw them, and `write`
writes the files. Everything is a function of (seed, part, patient number). It supports no claim about patients.
"""

from ssl_jax.phantom.draw import Phantom, draw
from ssl_jax.phantom.patients import OBSERVATIONS, Exam, Patient, make_patient
from ssl_jax.phantom.write import write

__all__ = ["OBSERVATIONS", "Patient", "Phantom", "Exam", "draw", "make_patient", "write"]
