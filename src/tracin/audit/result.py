"""``Audit``: what was found, as a table, and what can be done with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tracin.audit import decisions as deciding
from tracin.audit import export, saving, table
from tracin.audit.decisions import Cleaned, Decision
from tracin.audit.parts import Calibration, Findings, require_calibration
from tracin.shapes import Int

if TYPE_CHECKING:
    from pandas import DataFrame
else:
    DataFrame = Any

__all__ = ["Audit"]


class Audit(Findings):
    """Which labels to look at first, why, and what they should be. ``find_label_issues`` makes it.

    The fields, with an entry for every training row in the order of the rows, are those of ``Findings``: ``score``,
    ``is_issue``, ``signals``, ``given_labels``, ``suggested_labels``; and ``evidence``, ``duplicates``, ``cutoff``,
    ``calibration``, ``class_names``, ``notes`` and ``provenance``.

    Example:
        >>> import torch
        >>> from tracin.audit import Cutoff
        >>> audit = Audit(
        ...     score=torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64),
        ...     is_issue=torch.tensor([False, True, False]),
        ...     signals={"aum": torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)},
        ...     cutoff=Cutoff(0.5, "half of the scale"),
        ...     given_labels=torch.tensor([0, 0, 1]),
        ...     suggested_labels=torch.tensor([1, 1, 0]),
        ...     classes=2,
        ...     class_names=("cat", "dog"),
        ... )
        >>> audit
        Audit(3 rows, 1 flagged)
        >>> audit.suggested()
        (Decision(row=1, action='relabel', label='dog'),)
        >>> audit.apply({1: ("relabel", "dog"), 2: "remove"}).labels
        tensor([0, 1])
    """

    def __repr__(self) -> str:
        return f"Audit({len(self):,} rows, {int(self.is_issue.sum()):,} flagged)"

    @property
    def table(self) -> DataFrame:
        """A row per training example in their order; the index is the row.

        Columns, as far as the task has them: ``row, given_label, suggested_label, score, is_issue, rank, self_influence,
        self_influence_rank, loss, mean_loss, residual, margin, aum, neighbour_agreement, doubt, proponent_agreement,
        proponents, opponents, duplicates, opposes_validation``.
        """
        return table.pandas(self)

    @property
    def issues(self) -> DataFrame:
        """The flagged rows of the table, most suspect first."""
        order = self.order[self.is_issue[self.order]]
        return table.pandas(self).iloc[order.tolist()]

    def records(self, rows: Any = None) -> list[dict[str, Any]]:
        """The table as a list of dicts, which needs no pandas.

        Args:
            rows: Which rows, in this order; all unless given.

        Returns:
            A record per row: numbers, names, tuples of row ids, None.
        """
        return table.records(self, rows)

    def suggested(self, k: int | None = None, action: str | None = None) -> tuple[Decision, ...]:
        """Decisions that follow the audit, most suspect first.

        Args:
            k: How many rows; the flagged ones unless given.
            action: ``"relabel"`` to the suggested label, which is the default where labels are classes, ``"remove"``, the
                default otherwise, or ``"keep"``.

        Returns:
            The decisions, which ``apply`` takes.

        Raises:
            OptionError: k is outside the number of rows, there is nothing to relabel to, or labels that no class can
                replace, such as probabilities.
        """
        return deciding.suggested(self, k, action)

    def apply(self, decisions: Any) -> Cleaned:
        """The rows and labels after decisions; rows without one stay as they are.

        Args:
            decisions: A mapping of rows to ``"keep"``, ``"remove"`` or ``("relabel", class)``; or an iterable of
                ``Decision(row, action, label)``, such as ``suggested()``. A text is the name of a class, a number its
                number, whatever the names are: ``"2"`` is the class that is called so, 2 the third one.

        Returns:
            The rows that stay and their labels, in the dtype and shape of the training rows.

        Raises:
            OptionError: A row that does not exist or is decided twice, an unknown action, a class that does not exist, or
                another label where labels are probabilities or the dtype has no room for it.
        """
        return deciding.apply(self, decisions)

    def opposing(self, k: int = 20) -> Int[Tensor, " k"]:
        """The rows that oppose the validation set most, where one was given.

        Args:
            k: How many at most.

        Returns:
            Row ids, the strongest first; only rows that oppose it.

        Raises:
            OptionError: There was no validation set.
        """
        return deciding.opposing(self, k)

    def calibrated(self, calibration: Calibration) -> Audit:
        """The same audit with another cut-off.

        Args:
            calibration: What ``calibrate`` returned.

        Returns:
            The audit; a row is flagged where its score reaches the cut-off.

        Raises:
            OptionError: It is no calibration.
        """
        require_calibration(calibration, "Audit.calibrated")
        cutoff = calibration.cutoff
        return replace(self, is_issue=self.score >= cutoff.score, cutoff=cutoff, calibration=calibration)

    def export(
        self,
        path: str | Path,
        format: str | None = None,  # noqa: A002  as pandas and pyarrow call it
        decisions: Any = None,
    ) -> Path:
        """Write the table for another tool, whole or not at all.

        In a CSV a text that a spreadsheet would run as a formula, such as the class ``=1+1``, has an apostrophe before it.

        Args:
            path: The file.
            format: ``"csv"``, ``"parquet"``, ``"json"``; ``"cleanlab"``: a CSV with is_label_issue, label_score (1 − score),
                given_label and predicted_label; ``"label-studio"``: JSON tasks of the flagged rows. By the file's suffix
                unless given.
            decisions: As ``apply`` takes them, and classes also where the labels are probabilities: two more columns,
                ``decision`` and ``decided_label``; annotations in Label Studio tasks.

        Returns:
            The path.

        Raises:
            OptionError: An unknown format, a format that needs classes, decisions that do not fit, or no path.
            MissingExtraError: Parquet needs pyarrow.
            ResultError: The file cannot be written.
        """
        return export.export(self, path, format, decisions)

    def save(self, folder: str | Path) -> Path:
        """Write the audit into a folder, as ``audit.safetensors``, whole or not at all.

        Args:
            folder: Made if it is missing.

        Returns:
            The file.

        Raises:
            OptionError: The folder is no path.
            ResultError: It cannot be written.
        """
        return saving.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Audit:
        """Read what ``save`` wrote.

        Args:
            folder: The folder.

        Returns:
            The audit.

        Raises:
            OptionError: The folder is no path.
            ResultError: There is none, it is damaged, or of another version.
        """
        return cls(**saving.load(folder))
