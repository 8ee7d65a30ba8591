"""What `max_length` cuts off, counted: nobody should train on halves of conversations without knowing."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from adamba.errors import UserError

IGNORED_LABEL = -100
Document = tuple[list[int], list[int], str]  # ids, labels, source

logger = logging.getLogger(__name__)


@dataclass
class Cuts:
    """Cuts documents at `max_length` and counts them by source; the log has the count each time it is tenfold."""

    max_length: int
    num_rows: int = 0
    num_dropped: int = 0
    longest: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    next_report: int = 1

    def apply(self, documents: Sequence[Document], chosen: Sequence[bool] | None = None) -> list[Document]:
        """The documents, each cut, without those that have nothing (left) to learn. Only `chosen` ones are looked at.

        Raises:
            UserError: none of them has anything to learn.
        """
        kept = []
        for index, document in enumerate(documents):
            ids, labels, source = document
            self.num_rows += 1
            self.longest = max(self.longest, len(ids))
            if chosen is not None and not chosen[index]:
                kept.append(document)
                continue
            is_cut = len(ids) > self.max_length
            labels = labels[: self.max_length]
            self.cut[source] += is_cut
            if any(label != IGNORED_LABEL for label in labels[1:]):  # no label asks for a document's first token
                kept.append((ids[: self.max_length], labels, source))
            else:
                self.num_dropped += is_cut
        if documents and not kept:
            raise UserError(
                f"max_length: {self.max_length} cuts off everything to learn in {len(documents)} rows, the longest of "
                f"which has {max(len(ids) for ids, _, _ in documents)} tokens"
            )
        if self.cut.total() >= self.next_report:
            self.next_report = 10 * self.cut.total()
            logger.warning("%s", self.report())
        return kept

    def report(self) -> str:
        """`max_length: 512 cut 4 of 1,024 rows (glaive_fc 3, toolbench 1), the longest of 900 tokens; …`."""
        sources = ", ".join(f"{source} {count:,}" for source, count in self.cut.most_common() if count)
        line = f"max_length: {self.max_length} cut {self.cut.total():,} of {self.num_rows:,} rows ({sources})"
        dropped = f"; {self.num_dropped:,} had nothing left to learn and were dropped" if self.num_dropped else ""
        return f"{line}, the longest of {self.longest:,} tokens{dropped}"
