"""A model and the loss of each example."""

from tracin.tasks import losses
from tracin.tasks.task import Selection, Task

__all__ = ["Selection", "Task", "losses"]
