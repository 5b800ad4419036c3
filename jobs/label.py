"""`segjobs label --input URI --dataset URI --model BUNDLE --policy FILE`: what is new becomes a version.

Input: whatever `predict` reads; shards and images that no parent version has labelled are predicted, by that
verb, and a policy sorts what it found. Output: `versions/<n>/`, with labels to train on, a queue for people and
what was rejected, published by one conditional put. Run it as often as you like: a run that was missed or killed
is made good by the next. Exit codes: 0 published, or nothing was new; 4 (or `--held-exit-code`) published as a
candidate, or a version that was rolled back would be made again.
"""

import uuid

from jobs import label_view, labelling, rehearsal, retries, reviewed, versions
from jobs.cluster import connect
from jobs.config import ConfigError
from jobs.console import console
from jobs.label_config import LabelConfig
from jobs.storage import lies_within, open_store
from jobs.store import StorageError, Store
from jobs.version_facts import stamp

# Times that other runs may be faster.
TRIES = 10


def run(config: LabelConfig) -> int:
    """Label what is new, or do what was asked for instead; return the exit code."""
    retries.forget()
    dataset = open_store(config.dataset, config.endpoint_url)
    if config.list:
        label_view.show_all(dataset)
        return 0
    if config.show is not None:
        label_view.show(versions.load(dataset, config.show))
        return 0
    if config.promote is not None:
        _promote(dataset, config.promote)
        return 0
    if config.input and lies_within(config.dataset, config.input, config.endpoint_url):
        raise ConfigError(f"--dataset {config.dataset} lies within --input: choose a place outside")
    connect(config.address)
    if config.dry_run:
        rehearsal.show(config, dataset)
        return 0
    _refuse_unsafe(config, dataset)
    make = labelling.label if config.reviewed is None else reviewed.label
    for _ in range(TRIES):
        code = make(config, dataset)
        if code is not None:
            return code
        console.print("Another run has published a version meanwhile: starting from that one.")
    raise StorageError(
        f"others published {TRIES} versions of {dataset.uri} while this one was made: run it again when "
        "fewer runs overlap"
    )


def _promote(dataset: Store, number: int) -> None:
    versions.promote(dataset, number, stamp())
    console.print(f"Version {number} of {dataset.uri} is current now.")
    behind = versions.left_behind(dataset, number)
    if left := [str(one.number) for one in behind if one.manifest.get("reviewed")]:
        numbers = ", ".join(left)
        console.print(
            f"It does not build upon reviewed labels of version {numbers}: import their files again by "
            "--reviewed, or promote that version."
        )


def _refuse_unsafe(config: LabelConfig, dataset: Store) -> None:
    """Refuse a store that does not keep two writers apart.

    Raises:
        ConfigError: It does not, and nobody said that there is one alone.
    """
    # A name of its own: two runs that try the same one would mislead one another.
    if config.single_writer or dataset.keeps_first(f"_probe-{uuid.uuid4().hex}"):
        return
    raise ConfigError(
        f"the store of {dataset.uri} has no conditional puts that hold, so two runs at once could both publish "
        "a version: use one that has (S3, or a local disk), or see to it that runs never overlap, and say "
        "--single-writer"
    )
