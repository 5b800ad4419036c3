"""`label --dry-run`: what is new, whether model and policy can be used, and what a run would do.

Nothing is written and no content of an image is read, so some of it cannot be known; that is said, too.
"""

import json
from collections.abc import Iterator

from jobs import label_view, labelling, plan
from jobs.console import facts
from jobs.label_config import LabelConfig
from jobs.labelling import Base, Rules
from jobs.storage import open_store
from jobs.store import Store

_PUBLISHES_NOTHING = "publish nothing"


def show(config: LabelConfig, dataset: Store) -> None:
    """Print what a run of the same command would do.

    Raises:
        ConfigError: The run would refuse its policy, its input, or the model's categories.
        BundleError: It would refuse its model.
    """
    base = labelling.look_at(config, dataset)
    if config.model is None:
        label_view.show_news(base.parent, base.found, base.news)
        facts("A run", [("depends on", "--model and --policy, which were not given nor checked")])
        return
    rules = labelling.rules_of(config, base)
    label_view.show_news(base.parent, base.found, base.news)
    facts("A run would", [*_rules(rules), *_steps(config, base, rules)])


def _rules(rules: Rules) -> Iterator[tuple[str, str]]:
    yield "use the model", f"{rules.model} ({rules.bundle.digest[:12]})"
    values = rules.policy.to_dict()
    yield "and the policy", ", ".join(f"{name} {json.dumps(values[name])}" for name in values)


def _steps(config: LabelConfig, base: Base, rules: Rules) -> Iterator[tuple[str, str]]:
    if not base.news.objects.num_rows:
        yield "then", f"{_PUBLISHES_NOTHING}: nothing is new (exit code 0)"
        return
    if (candidate := labelling.waiting(config, base, rules)) is not None:
        yield (
            "then",
            f"{_PUBLISHES_NOTHING}: the candidate {candidate.number} has what is new, and waits (exit code "
            f"{config.held_exit_code})",
        )
        return
    if (refused := labelling.rolled_back(base, rules)) is not None:
        yield (
            "then",
            f"{_PUBLISHES_NOTHING}: version {refused.number}, whose labels it would make again, was rolled back "
            f"(exit code {config.held_exit_code})",
        )
        return
    began = labelling.begun(config, base, rules)
    if began is not None:
        yield "first", f"finish what an earlier run began, as version {base.number}"
        yield from _predictions(config, labelling.rules_of(config, began))
        yield "then", f"label what came since, as version {base.number + 1}"
    else:
        yield from _predictions(config, rules)
        yield "then", f"publish version {base.number}"
    yield from _gate(config, base)
    yield from _unknown(base)


def _predictions(config: LabelConfig, rules: Rules) -> Iterator[tuple[str, str]]:
    work = open_store(rules.predict.output, config.endpoint_url)
    planned = plan.load(work)
    if planned is None:
        yield "predict", "all that is new"
        return
    every, done = planned.chunks.num_rows, len(plan.finished_chunks(work))
    yield "predict", f"{planned.num_images} images in {every} chunks, {done} of which are done"


def _gate(config: LabelConfig, base: Base) -> Iterator[tuple[str, str]]:
    if config.max_drift is None:
        yield "drift", "publish whatever it is: no --max-drift was given"
    elif base.parent is None:
        yield "drift", "publish without a comparison: there is no parent"
    else:
        yield (
            "drift",
            f"publish as a candidate only (exit code {config.held_exit_code}) where labels moved further than "
            f"{config.max_drift:g} from version {base.parent.number}",
        )


def _unknown(base: Base) -> Iterator[tuple[str, str]]:
    """What only a look into the images, or a write, can tell."""
    if base.news.changed or (base.parent is not None and base.found.format == "parquet"):
        yield (
            "not known",
            "which images are labelled already and the same: they are not labelled again, and where all are, "
            "nothing is published",
        )
    yield "not known", "what the model finds: how many rows, labels, and how far they moved"
    yield "not known", "whether the store keeps two writers apart: a run tries it by a write"
