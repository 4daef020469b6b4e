"""Erasure code for snapshots: Reed-Solomon over GF(2^8), and which bytes of a group of nodes it mixes."""

from checkpoint.erasure.code import ReedSolomon, TooManyErasures
from checkpoint.erasure.isal import aligned_empty
from checkpoint.erasure.layout import Element, GroupLayout, Stripe

__all__ = [
    "Element",
    "GroupLayout",
    "ReedSolomon",
    "Stripe",
    "TooManyErasures",
    "aligned_empty",
]
