"""What the results of a batch job depend on."""

from typing import Any

from jobs.config import PredictConfig
from jobs.storage import open_store
from segmodel.bundle import Bundle
from segmodel.schema import SCHEMA_VERSION
from segmodel.settings import InferencePrecision


def described(
    config: PredictConfig, bundle: Bundle, precision: InferencePrecision | None = None
) -> dict[str, Any]:
    """Return what results depend on: the same job may be resumed, another may not.

    Args:
        config: Of `predict`.
        bundle: What predicts.
        precision: What `auto` became, where that is known.
    """
    threshold, most = config.score_threshold, config.max_detections
    return {
        # As the store names it: however it was spelled, and wherever the command was typed.
        "input": open_store(config.input, config.endpoint_url).uri,
        "format": config.format,
        "model_digest": bundle.digest,
        "score_threshold": bundle.score_threshold if threshold is None else threshold,
        "max_detections": bundle.max_detections if most is None else most,
        "precision": precision or config.precision,
        "tasks": config.tasks,
        # Left out where they are as ever, so that plans made before there was a choice can go on.
        **({} if config.decode == "full" else {"decode": config.decode}),
        **({"compile": True} if config.compile else {}),
        "chunk_size": config.chunk_size,
        "limit": config.limit,
        "image_column": config.image_column,
        "max_pixels": config.max_pixels,
        "schema_version": SCHEMA_VERSION,
    }
