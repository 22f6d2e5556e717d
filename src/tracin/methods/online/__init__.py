"""TracIn step by step, in anyone's training loop (Pruthi et al. 2020)."""

from tracin.methods.online.ledger import OnlineTracIn
from tracin.methods.online.records import StepReport

__all__ = ["OnlineTracIn", "StepReport"]
