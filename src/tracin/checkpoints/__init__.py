"""The checkpoints that a training run leaves behind: reading them, recording them, and their learning rates.

Checkpoints are data, not code: safetensors, or ``.pt`` read with ``weights_only=True``. A pickle that would
run something is refused.
"""

from __future__ import annotations

from tracin.checkpoints.checkpoint import Checkpoint
from tracin.checkpoints.fitting import fit
from tracin.checkpoints.recorder import CheckpointRecorder
from tracin.checkpoints.selection import Advice, advise
from tracin.checkpoints.trajectory import Trajectory

__all__ = ["Advice", "Checkpoint", "CheckpointRecorder", "Trajectory", "advise", "fit"]
