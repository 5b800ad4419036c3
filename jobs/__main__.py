"""The command line: `segjobs VERB`, the same as `python -m jobs VERB`.

Exit codes: 0 all that was promised is done; 1 failed; 2 bad arguments; 3 done, but images are in
error and `--fail-on-error` was asked; 4 a labelled version drifted and is a candidate only; 130 stopped
by Ctrl-C.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from jobs import logs
from jobs.config import (
    ConfigError,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    InitConfig,
    PackConfig,
    PredictConfig,
    ReportConfig,
    StatusConfig,
)
from jobs.console import error_console
from jobs.flags import Parser, from_namespace, gathered, parser_for
from jobs.label_config import LabelConfig
from jobs.submit_config import SubmitConfig
from jobs.train_config import TrainConfig

VERBS: dict[str, type[Any]] = {
    "predict": PredictConfig,
    "status": StatusConfig,
    "init": InitConfig,
    "pack": PackConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "label": LabelConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "submit": SubmitConfig,
    "demo": DemoConfig,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    parser = Parser(
        prog="segjobs",
        description="Offline instance segmentation at scale: a bucket of images in, a table of masks out, "
        "exactly once.",
        epilog="`segjobs VERB --help` explains a verb. Every URI may be a local path, s3://, gs:// or "
        "another scheme that pyarrow.fs reads.",
        allow_abbrev=False,
    )
    verbs = parser.add_subcommands(dest="verb", required=True)
    parsers = {verb: parser_for(config_class) for verb, config_class in VERBS.items()}
    for verb, verb_parser in parsers.items():
        verbs.add_subcommand(verb, verb_parser, help=VERBS[verb].__doc__)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in VERBS:
        given = [given[0], *gathered(VERBS[given[0]], given[1:])]
    values = parser.parse_args(given)
    verb = str(values.verb)
    try:
        config: Any = from_namespace(VERBS[verb], values[verb])
        log_format = logs.chosen(values[verb].log_format)
    except ValueError as error:
        parsers[verb].error(str(error))
    with logs.using(log_format, verb=verb):
        return _run(verb, config)


def _run(verb: str, config: Any) -> int:
    # Only the verb that runs is imported: torch and Ray take seconds.
    run = importlib.import_module(f"jobs.{verb}").run
    try:
        return int(run(config))
    except KeyboardInterrupt as stop:
        # A verb may say how far it came.
        where = f": {stop}" if str(stop) else ""
        error_console.print(f"Stopped{where}. Run the same command again to go on.")
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        # What a user or a store did: the message says what to do. Anything else is ours, and keeps
        # its traceback.
        error_console.print(f"segjobs {verb}: {error}", style="bold red", markup=False)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
