"""`segjobs submit [--address URL] -- VERB ...`: a verb as a job of a Ray cluster.

Input: the verb's command line, checked here as the verb would check it. Output: what the verb makes;
here its log, and its exit code (130 where it was stopped). The job is named after verb and output:
submitted again while it runs, it is followed, not started twice; after it ended it is started again,
and goes on where it was. It costs what the verb costs, and some seconds for uploading 0.3 MB of code,
which a cluster keeps.
"""

import os
import re
import shlex
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from jobs import shipping, submission
from jobs.config import ConfigError
from jobs.console import console, error_console
from jobs.ray_jobs import Job, JobServer, SubmitError
from jobs.submission import Submission
from jobs.submit_config import SubmitConfig

# Two that submit at once choose the same number; one of them looks again.
TRIES = 5
_MISSING = re.compile(r"No module named '?([\w.]+)")


def run(config: SubmitConfig) -> int:
    """Submit, follow or stop; return the job's exit code."""
    # Imported late: the command line imports the configurations of all verbs.
    from jobs.__main__ import VERBS

    made = submission.prepare(config.command, VERBS)
    variables = shipping.variables(config.env, ship_credentials=config.ship_credentials)
    server = JobServer(config.address)
    if config.stop:
        return _stop(server, made)
    job_id = _running(server, made) or _started(server, config, made, variables)
    if config.no_wait:
        console.print(f"Follow it by the same command without --no-wait, or at {server.address}.")
        return 0
    return _follow(server, job_id, image_has_code=config.image_has_code)


def _command(made: Submission) -> str:
    return shlex.join(("python", "-m", "jobs", *made.arguments))


def _running(server: JobServer, made: Submission) -> str | None:
    """Return the id of the job that makes this output already, or None.

    Raises:
        ConfigError: Another command makes it.
    """
    job = server.latest(made.name)
    if job is None or job.ended:
        return None
    if job.entrypoint != _command(made):
        raise ConfigError(
            f"{job.job_id} makes {made.output} already, by another command: {job.entrypoint}. Wait until it has ended, "
            "or end it by --stop"
        )
    console.print(f"{job.job_id} is at work already.", markup=False)
    return job.job_id


def _started(
    server: JobServer, config: SubmitConfig, made: Submission, variables: dict[str, str]
) -> str:
    """Start the next attempt and return its id."""
    _hint_at_endpoint(made, variables)
    with tempfile.TemporaryDirectory() as folder:
        shipping.fill(Path(folder), made.files, code=not config.image_has_code)
        ships = bool(made.files) or not config.image_has_code
        for _ in range(TRIES):
            last = server.latest(made.name)
            job_id = f"{made.name}-{last.attempt + 1 if last else 1}"
            if server.start(
                job_id,
                _command(made),
                Path(folder) if ships else None,
                variables,
                {"segjobs": version("segjobs"), "output": made.output},
            ):
                console.print(f"{job_id} is submitted to {server.address}.", markup=False)
                return job_id
            if running := _running(server, made):
                return running
    raise SubmitError(
        f"others submit {made.name} at the same time, and end at once: look at {server.address}"
    )


def _hint_at_endpoint(made: Submission, variables: dict[str, str]) -> None:
    """Say that this shell's store is not the cluster's."""
    name = "AWS_ENDPOINT_URL"
    given = any(argument.startswith("--endpoint-url") for argument in made.arguments)
    if os.environ.get(name) and name not in variables and not given:
        console.print(
            "AWS_ENDPOINT_URL is set here and does not travel: add --env AWS_ENDPOINT_URL if the job is to use it."
        )


def _follow(server: JobServer, job_id: str, *, image_has_code: bool) -> int:
    try:
        job = server.follow(job_id, _show)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{job_id} goes on on the cluster, and --stop in front of the -- ends it"
        ) from None
    _show_end(job, image_has_code=image_has_code)
    return job.exit_code


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _show_end(job: Job, *, image_has_code: bool) -> None:
    """Say how a job ended, and what to do where its log cannot say it."""
    if job.status == "STOPPED":
        error_console.print(
            f"{job.job_id} was stopped. Run the same command again to go on.", markup=False
        )
    elif job.driver_exit_code is None and job.status == "FAILED":
        error_console.print(
            f"{job.job_id} was lost: {job.message.strip()}\nRun the same command again to go on.",
            markup=False,
        )
    elif job.exit_code and (missing := _MISSING.search(job.message)):
        code = missing[1].partition(".")[0] in shipping.PACKAGES
        remedy = (
            "leave --image-has-code out, or start the cluster"
            if code and image_has_code
            else "start the cluster"
        )
        error_console.print(
            f"The cluster's image lacks {missing[1]}: {remedy} with an image of infra/Dockerfile, of segjobs "
            f"{version('segjobs')}.",
            markup=False,
        )


def _stop(server: JobServer, made: Submission) -> int:
    job = server.latest(made.name)
    if job is None or job.ended:
        console.print(
            f"Nothing is at work on {made.output}: there is nothing to stop.", markup=False
        )
        return 0
    server.stop(job)
    console.print(f"{job.job_id} is stopped. Submit the same command again to go on.", markup=False)
    return 0
