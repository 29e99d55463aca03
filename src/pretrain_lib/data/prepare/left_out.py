"""Count the documents that are not written, and say why."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pretrain_lib.data.text.documents import Document, Rejected
from pretrain_lib.data.text.sources import FileSource, Source
from pretrain_lib.wording import plural

EXAMPLES = 3  # how many rejected documents are reported


@dataclass
class Report:
    """Counts of the documents that are not written, with examples."""

    empty: int = 0
    rejected: int = 0
    examples: list[str] = field(default_factory=list)
    reasons: list[dict] = field(default_factory=list)
    """`{reason, documents, first}` for each reason; no documents are lost by a warning."""
    skipped_files: dict[str, int] = field(default_factory=dict)
    """How many files of the sources are not read, by kind."""

    def add(self, other: "Report") -> None:
        """Add the report of another unit."""
        self.empty += other.empty
        self.rejected += other.rejected
        self.examples = (self.examples + other.examples)[:EXAMPLES]
        for new in other.reasons:
            same = (entry for entry in self.reasons if entry["reason"] == new["reason"])
            if (entry := next(same, None)) is not None:
                entry["documents"] += new["documents"]
            else:
                self.reasons.append(dict(new))
        self.skipped_files = dict(Counter(self.skipped_files) + Counter(other.skipped_files))

    def count_document(self, document: Document | Rejected) -> bool:
        """Return whether a document has text to write, and count it here if it has not."""
        if isinstance(document, Rejected):
            self._add_reason(document.reason, document.where, documents=document.documents)
            self.rejected += document.documents
            if document.documents and len(self.examples) < EXAMPLES:
                self.examples.append(str(document))
            return False
        if document.is_blank:
            self.empty += 1
            return False
        return True

    def _add_reason(self, reason: str, where: str, *, documents: int) -> None:
        entry = {"reason": reason, "documents": documents, "first": where}
        self.add(Report(reasons=[entry]))

    def check(self, max_rejected: int) -> None:
        """Raise ValueError if more documents than `max_rejected` could not be read."""
        if self.rejected > max_rejected:
            documents = plural(self.rejected, "document")
            raise ValueError(
                f"{documents} could not be read, more than data.max_rejected="
                f"{max_rejected}; fix them or raise the limit. {'; '.join(self.examples)}"
            )


def report_skipped(sources: Iterable[Source]) -> Report:
    """Return a report of the files of the sources that are not read."""
    report = Report()
    for source in sources:
        if isinstance(source, FileSource):
            report.add(Report(skipped_files=dict(source.skipped)))
    return report


def describe_left_out(report: dict) -> Iterator[str]:
    """Yield lines about what `pretrain prepare` left out, if anything.

    `report` is that of a manifest; reasons and files are missing in old ones.
    """
    if report["empty"] or report["rejected"]:
        empty = plural(report["empty"], "empty document")
        yield f"left out    {empty}, {report['rejected']:,} unreadable"
    for entry in (reasons := report.get("reasons", ())):
        count = plural(entry["documents"], "document") if entry["documents"] else "warning"
        example = f"{entry['first']}: {entry['reason']}"
        details = (e.removeprefix(example) for e in report["examples"] if e.startswith(example))
        first = entry["first"] + next(details, "")
        yield f"            {count}: {entry['reason']}; the first: {first}"
    for example in () if reasons else report["examples"]:
        yield f"            {example}"
    if skipped := report.get("skipped_files"):
        counts = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())
        yield f"not read    files by kind: {counts}"
