"""Ray's job API: jobs by the name of what they make, their logs, and how they ended.

A submission id is `NAME-N`: Ray takes no id twice, so the Nth attempt at a name has its number.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import ray
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

# While a job is followed, its head may be too busy to answer, or a proxy may start again.
PATIENCE_S = 60.0
ASK_AGAIN_S = 1.0
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# In this order, as Ray reads them: the first is for the dashboard alone.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Drivers are told to stop as Ctrl-C does, and say how far they came; then they have this long.
STOP_VARIABLES = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
STOP_PATIENCE_S = 90.0
# They say at level INFO what we say ourselves.
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class SubmitError(RuntimeError):
    """The cluster did not do what was asked; the message says why, and what to do."""


class UnreachableError(SubmitError):
    """Nothing answers at the address; that may pass."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt, as the cluster knows it."""

    job_id: str
    attempt: int
    entrypoint: str
    status: str
    message: str
    driver_exit_code: int | None

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """What its driver ended with, as a shell says it; 130 where it was stopped."""
        if self.status == "STOPPED":
            return 130
        code = self.driver_exit_code
        if code is None:
            return 0 if self.status == "SUCCEEDED" else 1
        return code if code >= 0 else 128 - code


class JobServer:
    """The job API of one cluster."""

    def __init__(self, address: str | None) -> None:
        given = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
        self.address = (given or DEFAULT_ADDRESS).rstrip("/")
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _preferred(self.address), self._plain_errors():
            self._client = JobSubmissionClient(self.address)

    def latest(self, name: str) -> Job | None:
        """Return the last attempt at `name`, or None."""
        with self._plain_errors():
            found = [job for details in self._client.list_jobs() if (job := _job(details, name))]
        return max(found, key=lambda job: job.attempt, default=None)

    def start(
        self,
        job_id: str,
        entrypoint: str,
        folder: Path | None,
        variables: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> bool:
        """Start a job in what `folder` holds, and say whether it is ours: another may have been faster.

        Args:
            job_id: `NAME-N`.
            entrypoint: A command line for a shell.
            folder: Becomes the working directory of the driver and all its tasks; Ray keeps it by content.
            variables: Of the environment of the driver and all its tasks.
            metadata: Shown beside the job.
        """
        runtime_env: dict[str, object] = {"env_vars": {**STOP_VARIABLES, **variables}}
        if folder is not None:
            runtime_env["working_dir"] = str(folder)
        try:
            with self._plain_errors():
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=runtime_env,
                    metadata=dict(metadata),
                )
        except SubmitError as error:
            if "already exists" in str(error):
                return False
            raise
        return True

    def stop(self, job: Job) -> Job:
        """End a job and wait until it has.

        Raises:
            SubmitError: It has not in time.
        """
        with self._plain_errors():
            self._client.stop_job(job.job_id)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while not (now := self.job(job.job_id)).ended:
            if time.monotonic() > deadline:
                raise SubmitError(
                    f"{job.job_id} was told to stop and still runs: look at {self.address}"
                )
            time.sleep(ASK_AGAIN_S)
        return now

    def job(self, job_id: str) -> Job:
        """Return what the cluster knows of a job.

        Raises:
            SubmitError: It knows none of that id: it was started anew.
        """
        with self._plain_errors():
            details = self._client.get_job_info(job_id)
        found = _job(details, job_id.rpartition("-")[0])
        assert found is not None
        return found

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Hand the log of a job to `show`, piece by piece, until it has ended, and return how.

        Raises:
            SubmitError: The cluster is gone, or was started anew.
        """
        tail = _Tail(show)
        lost_at = None
        while True:
            # A connection that broke: whether the job lives is asked next.
            with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
                asyncio.run(tail.read(self._client, job_id))
            try:
                job = self.job(job_id)
            except UnreachableError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > PATIENCE_S:
                    raise SubmitError(
                        f"{error}. {job_id} may be lost with its head node; what it finished is in its output. "
                        "Run the same command again when the cluster is there, to follow it or to go on"
                    ) from error
            else:
                lost_at = None
                if job.ended:
                    return job
            time.sleep(ASK_AGAIN_S)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Raise what Ray's client raises as an error that says what to do."""
        try:
            yield
        except AuthenticationError as error:
            raise SubmitError(
                f"the cluster at {self.address} wants a token, or another one: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN to what the cluster was started with"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise UnreachableError(
                f"no Ray dashboard answers at {self.address}: name it by --address, and see that it is reachable "
                "(a port-forward or a tunnel to port 8265 of the head)"
            ) from error
        except RuntimeError as error:
            if isinstance(error, SubmitError):
                raise
            raise SubmitError(_words(error)) from error


@contextlib.contextmanager
def _preferred(address: str) -> Iterator[None]:
    """Have Ray take `address`: it prefers what the environment says to what it is told."""
    name = ADDRESS_VARIABLES[0]
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Tail:
    """Reads a log that is sent from its start at each connection, and hands on what is new."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._shown = show, 0

    async def read(self, client: JobSubmissionClient, job_id: str) -> None:
        """Read until the job has ended or the connection breaks."""
        length = 0
        async for piece in client.tail_job_logs(job_id):
            length += len(piece)
            if length > self._shown:
                self._show(piece[-(length - self._shown) :])
                self._shown = length


def _job(details: JobDetails, name: str) -> Job | None:
    """Return the job if it is an attempt at `name`."""
    found = re.fullmatch(re.escape(name) + r"-(\d+)", details.submission_id or "")
    if found is None:
        return None
    return Job(
        job_id=found[0],
        attempt=int(found[1]),
        entrypoint=details.entrypoint,
        status=str(details.status.value),
        message=details.message or "",
        driver_exit_code=details.driver_exit_code,
    )


def _words(error: RuntimeError) -> str:
    """Return what the server said, without the traceback that it sends along."""
    text = str(error)
    if "does not exist" in text:
        return "the cluster knows no such job any more: it was started anew. Run the same command again to go on"
    last = text.strip().rstrip(".").splitlines()[-1]
    return f"Ray {ray.__version__}'s client and the cluster do not agree: {last}"
