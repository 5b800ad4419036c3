"""One version of a data set made of what is new: look, predict, sort, publish.

Predictions lie in `work/<parent>-<digest>/`, named after all that they depend on: who is killed is continued by
whoever runs next, and two at once share one ledger. So does the folder in which rows are staged.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from jobs import (
    job,
    label_view,
    novelty,
    plan,
    policy,
    reuse,
    sorting,
    tasks,
    version_facts,
    versions,
)
from jobs.__main__ import main
from jobs.config import ConfigError, PredictConfig
from jobs.console import ImageProgress, console
from jobs.detect import Input, look
from jobs.flags import arguments_of
from jobs.label_config import LabelConfig
from jobs.novelty import News
from jobs.plan import PLAN_FOLDER, Cut, Plan
from jobs.read import Source
from jobs.sorting import Sorted, Stage
from jobs.storage import open_store
from jobs.store import Store
from jobs.versions import LISTING, Version
from jobs.weights import load_bundle
from segmodel.bundle import Bundle
from segmodel.policy import Policy

WORK = "work"
DIGITS = 16

_REPLACED = pa.schema([("image_id", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a run starts from.

    Attributes:
        dataset: Its place.
        number: Of the version that it makes.
        parent: What is current, if anything.
        found: The input.
        news: What is new there.
    """

    dataset: Store
    number: int
    parent: Version | None
    found: Input
    news: News


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What labels are made by.

    Attributes:
        bundle: The model.
        model: Its URI.
        policy: Which detections become labels.
        predict: How the model is run; `output` is the place of this work.
        digest: Of all that predictions depend on.
    """

    bundle: Bundle
    model: str
    policy: Policy
    predict: PredictConfig
    digest: str


def look_at(config: LabelConfig, dataset: Store) -> Base:
    """Compare the input with what is labelled.

    Raises:
        ConfigError: The data set is of another input.
    """
    assert config.input is not None
    most = versions.latest(dataset)
    parent = versions.current(dataset, most)
    source = open_store(config.input, config.endpoint_url).uri
    if parent is not None and parent.manifest["input"] != source:
        raise ConfigError(
            f"{dataset.uri} is of the input {parent.manifest['input']}, not of {source}: images are named "
            "relative to it. Give another --dataset; `train` takes several"
        )
    found = look(config.input, config.format, config.endpoint_url, tasks.aside)
    news = novelty.news(found, parent)
    return Base(dataset=dataset, number=most + 1, parent=parent, found=found, news=news)


def label(config: LabelConfig, dataset: Store) -> int | None:
    """Make the next version; return the exit code, or None where another run was faster."""
    base = look_at(config, dataset)
    if not base.news.objects.num_rows:
        return _nothing_new(base, 0)
    rules = rules_of(config, base)
    if (candidate := waiting(config, base, rules)) is not None:
        return _held(config, _still_waiting(base, candidate))
    if (refused := rolled_back(base, rules)) is not None:
        return _held(config, _would_undo(base, refused))
    label_view.show_news(base.parent, base.found, base.news)
    began = begun(config, base, rules)
    if began is not None:
        console.print("An earlier run did not get to its end: what it began is finished first.")
        base = began
        rules = rules_of(config, base)
    planned = _planned(config, base, rules)
    if planned is None:
        return _nothing_new(base, base.news.objects.num_rows)
    arguments = ["predict", *arguments_of(rules.predict)]
    console.print(f"$ segjobs {shlex.join(arguments)}", style="bold cyan", markup=False)
    if code := main(arguments):
        return code
    done = _publish(config, base, rules, planned)
    # What came after that run had looked.
    return done if began is None or done is None else label(config, dataset)


def rules_of(config: LabelConfig, base: Base) -> Rules:
    """Load and check what labels are made by.

    Raises:
        BundleError: There is no such model.
        ConfigError: The policy is not valid, or the model's categories contradict the data set's.
    """
    assert config.input is not None
    assert config.model is not None
    assert config.policy is not None
    bundle = load_bundle(config.model, config.endpoint_url)
    names = [category.name for category in bundle.categories]
    found = policy.load(config.policy, config.endpoint_url, names)
    # Now, not when all is predicted.
    merged_categories(base.parent, bundle, config.model)
    predict = PredictConfig(
        input=config.input,
        output="",
        model=config.model,
        # Nothing that the policy could want is left out.
        score_threshold=min(bundle.score_threshold, found.lowest_score),
        max_detections=max(bundle.max_detections, found.max_per_image or 0),
        frozen_plan=True,
        **{name: getattr(config, name) for name in _PASSED_ON},
    )
    digest = version_facts.digest(
        {
            "job": job.described(predict, bundle),
            "objects": novelty.only(base.found, base.news.objects).digest(),
            "parent": version_facts.identity(base.parent),
        }
    )
    parent = 0 if base.parent is None else base.parent.number
    output = base.dataset.url(f"{WORK}/{parent}-{digest[:DIGITS]}")
    return Rules(
        bundle=bundle,
        model=config.model,
        policy=found,
        predict=replace(predict, output=output),
        digest=digest,
    )


# Flags that are those of `predict`.
_PASSED_ON = (
    *("format", "precision", "batch_size", "min_actors", "max_actors", "gpus_per_actor"),
    *("chunk_size", "image_column", "max_pixels", "address", "endpoint_url"),
)


def _nothing_new(base: Base, touched: int) -> int:
    since = "" if base.parent is None else f" since version {base.parent.number}"
    same = f": {touched} objects changed, and their images are the same" if touched else ""
    console.print(f"Nothing is new at {base.found.store.uri}{since}{same}. Nothing was published.")
    return 0


def waiting(config: LabelConfig, base: Base, rules: Rules) -> Version | None:
    """Return the candidate that has what is new already and waits; None where a run has something to do.

    A candidate that the gate of this run lets pass does not wait: the run publishes what it holds.
    """
    last = base.number - 1
    if not last or (base.parent is not None and base.parent.number == last):
        return None
    candidate = versions.load(base.dataset, last)
    of_candidate = candidate.manifest.get("work"), candidate.manifest.get("policy_digest")
    if not candidate.is_candidate or of_candidate != (rules.digest, policy.digest(rules.policy)):
        return None
    return None if version_facts.passes(candidate, config.max_drift) else candidate


def _held(config: LabelConfig, why: str) -> int:
    """Say that somebody has to look, in words that a log is searched for; return the exit code."""
    console.print(f"ALERT: {why}", markup=False)
    return config.held_exit_code


def _still_waiting(base: Base, candidate: Version) -> str:
    number = candidate.number
    return (
        f"Nothing is new at {base.found.store.uri} since the candidate {number}, which waits: look at it by "
        f"--show {number}, and make it current by --promote {number}. Nothing was published."
    )


def rolled_back(base: Base, rules: Rules) -> Version | None:
    """Return a version that was rolled back and whose labels this run would make again, or None.

    That is one of the same model and policy that has some of the objects that are to be labelled.
    """
    if base.parent is None:
        return None
    same = rules.bundle.digest, policy.digest(rules.policy)
    for other in versions.left_behind(base.dataset, base.parent.number):
        model = other.manifest["model"] or {}
        is_same = (model.get("digest"), other.manifest["policy_digest"]) == same
        if is_same and novelty.shares(base.news.objects, other.inputs):
            return other
    return None


def _would_undo(base: Base, refused: Version) -> str:
    number = refused.number
    return (
        f"Version {number} was rolled back, and this run would label its images by the same model and policy "
        f"again. Give another --policy or --model, take its images out of {base.found.store.uri}, or make it "
        f"current again by --promote {number}. Nothing was published."
    )


def begun(config: LabelConfig, base: Base, rules: Rules) -> Base | None:
    """Return the base of work that an earlier run began with less than what is new now; None without any."""
    number = 0 if base.parent is None else base.parent.number
    others = (versions.load(base.dataset, n) for n in range(number + 1, base.number))
    candidates = {other.manifest["work"][:DIGITS] for other in others}
    places = {info.path.split("/")[1] for info in base.dataset.list_objects(WORK)}
    for place in sorted(places):
        started_from, _, digest = place.partition("-")
        if started_from != str(number) or digest in (rules.digest[:DIGITS], *candidates):
            continue
        work = open_store(base.dataset.url(f"{WORK}/{place}"), config.endpoint_url)
        planned = plan.load(work)
        if planned is None or planned.job != job.described(rules.predict, rules.bundle):
            continue
        objects = versions.read_table(work, f"{PLAN_FOLDER}/{planned.plan_id}/objects.parquet")
        if novelty.holds(base.news.objects, objects):
            return replace(base, news=novelty.some_of(base.news, objects))
    return None


def _planned(config: LabelConfig, base: Base, rules: Rules) -> Plan | None:
    """Return the plan of this work, frozen now or by an earlier run; None where no image is new."""
    work = open_store(rules.predict.output, config.endpoint_url)
    frozen = plan.load(work)
    if frozen is not None:
        return frozen
    cut = Cut(
        chunk_size=config.chunk_size,
        limit=None,
        image_column=config.image_column,
        endpoint_url=config.endpoint_url,
    )
    found = novelty.only(base.found, base.news.objects)
    made = plan.make(found, job.described(rules.predict, rules.bundle), cut, work)
    compared = novelty.compare(base.news, made, _source(config, made, work), base.parent)
    if compared.planned is None:
        return None
    replaced = pa.table([list(compared.replaced)], schema=_REPLACED)
    versions.put_table(work, _replaced_path(made), replaced)
    frozen = plan.freeze(work, compared.planned)
    if images := reuse.take_over(frozen, work, _other_work(config, base, work)):
        console.print(f"{images} of {frozen.num_images} images were predicted by an earlier run.")
    return frozen


def _other_work(config: LabelConfig, base: Base, work: Store) -> Iterator[Store]:
    """Yield the places of what other runs began from the same parent: candidates' work."""
    number = 0 if base.parent is None else base.parent.number
    places = {info.path.split("/")[1] for info in base.dataset.list_objects(WORK)}
    for place in sorted(places):
        other = open_store(base.dataset.url(f"{WORK}/{place}"), config.endpoint_url)
        if place.partition("-")[0] == str(number) and other.uri != work.uri:
            yield other


def _source(config: LabelConfig, planned: Plan, work: Store) -> Source:
    return Source(
        store=open_store(planned.folder, config.endpoint_url),
        lists=work,
        endpoint_url=config.endpoint_url,
        image_column=config.image_column,
    )


def _publish(config: LabelConfig, base: Base, rules: Rules, planned: Plan) -> int | None:
    """Sort what was predicted, put it beside what stays of the parent, and publish."""
    work = open_store(rules.predict.output, config.endpoint_url)
    policy_digest = policy.digest(rules.policy)
    folder = versions.folder(base.number)
    name = version_facts.digest([rules.digest, policy_digest])[:DIGITS]
    stage = Stage(store=base.dataset, folder=f"{folder}/{name}")
    footer = {"model_digest": rules.bundle.digest, "policy_digest": policy_digest}
    new = Sorted()
    with ImageProgress(planned.num_images, 0) as progress:
        source = _source(config, planned, work)
        for done in sorting.sort(planned, source, rules.policy, stage, footer):
            new.merge(done)
            progress.advance(done.images)
    replaced = versions.read_table(work, _replaced_path(planned))["image_id"].to_pylist()
    before = LISTING.empty_table() if base.parent is None else base.parent.objects
    kept, taken = sorting.replace_rows(before, replaced, stage)
    objects = pa.concat_tables([kept, sorting.listed(stage, [*taken.objects, *new.objects])])
    inputs = novelty.inputs(base.parent, base.news.objects, new.unsettled)
    manifest = {
        **version_facts.made(base.parent, new, taken, objects, config.max_drift),
        "input": base.found.store.uri,
        "format": base.found.format,
        "model": {"uri": rules.model, "digest": rules.bundle.digest},
        "policy": rules.policy.to_dict(),
        "policy_digest": policy_digest,
        "work": rules.digest,
        "categories": merged_categories(base.parent, rules.bundle, rules.model),
        "notes": [*planned.notes, *_to_be_tried_again(inputs)],
    }
    if not put(stage, base.number, manifest, objects, inputs):
        return None
    _tidy(base)
    label_view.show(versions.load(base.dataset, base.number))
    return _held(config, _drifted(base.number, manifest)) if manifest["exceeded"] else 0


def _drifted(number: int, manifest: Mapping[str, Any]) -> str:
    moved = " and ".join(name.replace("_", " ") for name in manifest["exceeded"])
    return (
        f"Version {number} is a candidate only, and nobody reads it: {moved} moved further than --max-drift "
        f"{manifest['max_drift']:g}. Look at it by --show {number}, and make it current by --promote {number}."
    )


def _to_be_tried_again(inputs: pa.Table) -> Iterator[str]:
    tries = inputs["tries"].to_numpy()
    if number := int(((tries > 0) & (tries < novelty.MAX_TRIES)).sum()):
        yield (
            f"{number} objects have images in error for what may pass: the next run tries them again, up to "
            f"{novelty.MAX_TRIES} times in all"
        )


def merged_categories(parent: Version | None, bundle: Bundle, model: str) -> list[dict[str, Any]]:
    """Return the categories of a parent and of a model; see `version_facts.merged_categories`."""
    categories = [{"id": one.id, "name": one.name} for one in bundle.categories]
    return version_facts.merged_categories(parent, categories, model)


def put(
    stage: Stage, number: int, manifest: Mapping[str, Any], objects: pa.Table, inputs: pa.Table
) -> bool:
    """Write the lists of a version, and publish it; return whether its number was still free."""
    # Of this run alone: another that has staged the same rows may know another input.
    name = f"{stage.folder}/{manifest['run_id'][:DIGITS]}"
    lists = {"objects": f"{name}-objects.parquet", "inputs": f"{name}-inputs.parquet"}
    versions.put_table(stage.store, lists["objects"], objects)
    versions.put_table(stage.store, lists["inputs"], inputs)
    return versions.publish(stage.store, number, {**manifest, **lists})


def _tidy(base: Base) -> None:
    """Remove work that no run can go on with: what started before the parent of what was published."""
    parent = 0 if base.parent is None else base.parent.number
    for info in list(base.dataset.list_objects(WORK)):
        started_from = info.path.split("/")[1].partition("-")[0]
        if started_from.isdigit() and int(started_from) < parent:
            base.dataset.delete(info.path)


def _replaced_path(planned: Plan) -> str:
    return f"{PLAN_FOLDER}/{planned.plan_id}/replaced.parquet"
