"""The labels of a refresh: which count, where their images are, which of them are new."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train import labels as label_records
from train.embed import Embedded, Facts
from train.labels import Label, Tally
from train.labels_images import found_images
from train.labels_topic import read_labels
from train.refresh_options import Options

MAX_LABELS = 5_000


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Labels with what is known of their images: a stored embedding, or a file."""

    labels: list[Label]
    paths: dict[str, Path]
    new: int
    """Labels that the champion has not learned, with an image."""


def read(options: Options) -> tuple[list[Label], Tally]:
    """Labels in effect, from the files and folders that are named, else from the topic; of one image the last source counts.

    Raises DataError for a file that cannot be read, TopicError for a topic that cannot.
    """
    if not options.labels:
        found, tally = read_labels(options.kafka)
    else:
        by_image: dict[str, Label] = {}
        tally = Tally()
        for path in options.labels:
            labels, partial = (label_records.read_folder if path.is_dir() else label_records.read_file)(path)
            by_image |= {label.sha256: label for label in labels}
            tally.records += partial.records
            tally.skipped += partial.skipped
            tally.examples |= partial.examples
        found = [by_image[sha256] for sha256 in sorted(by_image)]
    if len(found) > MAX_LABELS:
        found = sorted(found, key=lambda label: (label.at, label.sha256))
        for label in found[:-MAX_LABELS]:
            tally.skip(f"older than the latest {MAX_LABELS}", label.sha256[:16])
        found = sorted(found[-MAX_LABELS:], key=lambda label: label.sha256)
    return found, tally


def images(options: Options, labels: list[Label], learned: Embedded | None, tally: Tally) -> Found:
    """Finds the images of labels whose embedding the champion does not carry."""
    known = {facts.key for facts in learned.facts} if learned is not None else set()
    wanted = [label for label in labels if label.sha256 not in known]
    kafka = None if options.labels else options.kafka
    pairs = found_images(wanted, options.work / "images", options.allowed, kafka, tally)
    paths = {label.sha256: path for label, path in pairs}
    usable = [label for label in labels if label.sha256 in known or label.sha256 in paths]
    new = sum(is_new(label.sha256, label.label, learned) for label in usable)
    return Found(usable, paths, new)


def is_new(key: str, label: int, learned: Embedded | None) -> bool:
    return learned is None or (key, label) not in {(facts.key, facts.label) for facts in learned.facts}


def facts_of(label: Label) -> Facts:
    # The reviewer is the group: what one of them decided is bounded together, also when the topic no longer has the record.
    return Facts(label.sha256, label.label, "labels", "camera" if not label.label else "labelled", label.by)
