"""Methods that trace predictions to training rows; each reads like its paper."""

from tracin.methods.tracin_cp import TracInCP

__all__ = ["TracInCP"]
