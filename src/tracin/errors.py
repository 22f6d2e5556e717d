"""Every error that tracin raises on purpose.

::

    TracinError
    ├── OptionError (ValueError)      an argument outside what the function takes
    ├── DataError (ValueError)        the rows: order, length, type, or a change between passes
    ├── LossError (ValueError)        the per-example loss breaks its contract
    ├── CheckpointError (ValueError)  a checkpoint is missing, damaged, unsafe, or of another model
    ├── RateError (ValueError)        a learning rate is missing, negative or not finite
    ├── ModelError (ValueError)       the model cannot be traced (rows mix, nothing trainable)
    ├── NotFiniteError (ArithmeticError)  a NaN or an infinity in a loss or a gradient
    ├── ConvergenceError (ArithmeticError)  a solver stopped before its tolerance, or diverged
    ├── ResultError (ValueError)      a saved result cannot be read
    ├── IndexFolderError (RuntimeError)  an index is missing, damaged, of another model, or cannot be written
    ├── StudyError (ValueError)       a study file is missing or lacks ``study()``
    ├── LoopError (RuntimeError)      a training loop does what a ledger cannot follow
    ├── MemoryLimitError (MemoryError)  a run needs more than ``memory=`` allows
    ├── MissingExtraError (ImportError)   an optional package is not installed
    └── UserCodeError (RuntimeError)  an exception inside the user's model, loss or dataset

Each message names the row, parameter or file and says the mend. The second base is what a caller who
has never heard of tracin would catch.
"""

__all__ = [
    "AdaptiveOptimizerWarning",
    "CheckpointError",
    "ConvergenceError",
    "DataError",
    "IncompleteLedgerWarning",
    "IndexFolderError",
    "LoopError",
    "LossError",
    "MemoryLimitError",
    "MissingExtraError",
    "ModelError",
    "NotFiniteError",
    "OptionError",
    "RateError",
    "ResultError",
    "StudyError",
    "TracinError",
    "UserCodeError",
]


class TracinError(Exception):
    """Base of every error that tracin raises on purpose."""


class OptionError(TracinError, ValueError):
    """An argument outside what the function takes."""


class DataError(TracinError, ValueError):
    """The rows break the data contract: order, length, type, or a change between passes."""


class LossError(TracinError, ValueError):
    """The loss is not a differentiable vector with one number per row."""


class CheckpointError(TracinError, ValueError):
    """A checkpoint is missing, damaged, unsafe to read, or belongs to another model."""


class RateError(TracinError, ValueError):
    """A learning rate is missing, negative or not finite under the weighting that reads it."""


class ModelError(TracinError, ValueError):
    """The model cannot be traced: its rows mix, or nothing in it is trainable."""


class NotFiniteError(TracinError, ArithmeticError):
    """A NaN or an infinity in a loss or in a gradient."""


class ConvergenceError(TracinError, ArithmeticError):
    """An iterative solver stopped before its tolerance, or diverged; the message names the knob."""


class ResultError(TracinError, ValueError):
    """A saved result cannot be read."""


class IndexFolderError(TracinError, RuntimeError):
    """An index is missing, damaged, of another model or data, or cannot be written."""


class StudyError(TracinError, ValueError):
    """A study file is missing, or does not define ``study() -> tracin.Study``."""


class LoopError(TracinError, RuntimeError):
    """A training loop does what ``OnlineTracIn`` cannot follow: a step without ids, a gradient from elsewhere."""


class MemoryLimitError(TracinError, MemoryError):
    """A run would hold more than ``memory=`` allows; the message says what would fit, and what it costs."""


class MissingExtraError(TracinError, ImportError):
    """An optional package is needed and not installed."""


class UserCodeError(TracinError, RuntimeError):
    """An exception inside the user's model, loss or dataset; the original is its ``__cause__``."""


class IncompleteLedgerWarning(UserWarning):
    """The queries' losses changed between two steps that ``OnlineTracIn`` recorded: no row is credited with it."""


class AdaptiveOptimizerWarning(UserWarning):
    """The checkpoints were recorded from an optimizer other than SGD, which TracIn assumes."""
