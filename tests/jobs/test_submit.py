"""What submit says and ends with, against a job API that does what each test says.

The real one is in `test_submit_cluster.py`; its answers are those of Ray's own client there.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import requests
from ray.exceptions import AuthenticationError

from jobs import ray_jobs, submit
from jobs.__main__ import main
from jobs.ray_jobs import Job, JobServer

COMMAND = ["init", "--arch", "small", "--weights", "random", "--output", "s3://bucket/models/one"]
ENTRYPOINT = "python -m jobs " + " ".join(COMMAND)


class Api:
    """Ray's client, of a cluster that is in this process."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.submitted: list[dict[str, Any]] = []
        self.files: list[dict[str, bytes]] = []
        # What becomes of a job when its log was read, and what is in the log.
        self.ends: list[dict[str, Any]] = [{"status": "SUCCEEDED", "driver_exit_code": 0}]
        self.logs: list[list[str | Exception]] = [["hello\n"]]
        self.faster: Callable[[str], None] | None = None
        self.stops = True
        self.down: Exception | None = None

    def client(self, address: str) -> "Api":
        self.address = address
        return self

    def add(self, job_id: str, **more: Any) -> None:
        about = {
            "status": "RUNNING",
            "entrypoint": ENTRYPOINT,
            "message": None,
            "driver_exit_code": None,
        }
        job = SimpleNamespace(submission_id=job_id, **{**about, **more})
        job.status = SimpleNamespace(value=job.status)
        self.jobs[job_id] = job

    def list_jobs(self) -> list[SimpleNamespace]:
        self._answer()
        # A driver that nobody submitted has no id of that kind.
        return [SimpleNamespace(submission_id=None), *self.jobs.values()]

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        self._answer()
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.jobs[job_id]

    def submit_job(self, **given: Any) -> None:
        if self.faster:
            faster, self.faster = self.faster, None
            faster(given["submission_id"])
        if given["submission_id"] in self.jobs:
            raise RuntimeError("Request failed with status code 400: ... already exists. Please")
        self.submitted.append(given)
        folder = given["runtime_env"].get("working_dir")
        self.files.append(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
            if folder
            else {}
        )  # fmt: skip
        self.add(given["submission_id"], entrypoint=given["entrypoint"])

    def stop_job(self, job_id: str) -> None:
        if self.stops:
            self.jobs[job_id].status.value = "STOPPED"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self._answer()
        for piece in self.logs.pop(0) if len(self.logs) > 1 else self.logs[0]:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
        end = dict(self.ends.pop(0) if len(self.ends) > 1 else self.ends[0])
        self.jobs[job_id].status.value = end.pop("status")
        self.jobs[job_id].__dict__.update(end)

    def _answer(self) -> None:
        if self.down:
            raise self.down


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", made.client)
    monkeypatch.setattr(ray_jobs, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(ray_jobs, "PATIENCE_S", 0.05)
    monkeypatch.setattr(ray_jobs, "STOP_PATIENCE_S", 0.05)
    for name in ray_jobs.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return made


def run(*arguments: str, command: list[str] = COMMAND) -> int:
    return main(["submit", *arguments, "--", *command])


def words(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def test_it_is_followed_to_its_end(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    said = words(capsys)
    (job,) = api.submitted
    assert job["entrypoint"] == ENTRYPOINT
    assert f"{job['submission_id']} is submitted to http://127.0.0.1:8265. hello" in said
    assert job["runtime_env"]["env_vars"] == ray_jobs.STOP_VARIABLES
    assert job["metadata"]["output"] == "s3://bucket/models/one"
    assert {"jobs/__main__.py", "segmodel/masks.py"} <= api.files[0].keys()


@pytest.mark.parametrize(
    ("end", "code", "what"),
    [
        ({"status": "FAILED", "driver_exit_code": 3}, 3, "hello"),
        ({"status": "FAILED", "driver_exit_code": -9}, 137, "hello"),
        ({"status": "STOPPED", "driver_exit_code": None}, 130, "-1 was stopped. Run the same command again to go on."),
        (
            {"status": "FAILED", "message": "Job supervisor actor died: node lost"},
            1,
            "-1 was lost: Job supervisor actor died: node lost Run the same command again to go on.",
        ),
        (
            {"status": "FAILED", "driver_exit_code": 1, "message": "ModuleNotFoundError: No module named 'torchvision.ops'"},
            1,
            "The cluster's image lacks torchvision.ops: start the cluster with an image of infra/Dockerfile",
        ),
    ],
)  # fmt: skip
def test_it_ends_as_the_job_does(
    api: Api, end: dict[str, Any], code: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api.ends = [end]
    assert run() == code
    assert what in words(capsys)


def test_an_image_without_code_is_told(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.ends = [
        {
            "status": "FAILED",
            "driver_exit_code": 1,
            "message": "/usr/bin/python: No module named jobs",
        }
    ]
    assert run("--image-has-code") == 1
    assert "lacks jobs: leave --image-has-code out, or start the cluster with an image" in words(
        capsys
    )
    assert "working_dir" not in api.submitted[0]["runtime_env"]


def test_configuration_files_travel_without_code_too(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\n")
    assert run("--image-has-code", command=[*COMMAND, "--config", str(file)]) == 0
    ((name, content),) = api.files[0].items()
    assert content == b"seed: 3\n"
    assert api.submitted[0]["entrypoint"].endswith(f"--config {name}")


def test_one_that_runs_is_followed(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--no-wait") == 0
    assert "Follow it by the same command without --no-wait, or at http://127.0.0.1:8265." in words(
        capsys
    )
    assert run() == 0
    assert "-1 is at work already. hello" in words(capsys)
    assert len(api.submitted) == 1
    # It has ended since.
    assert run() == 0
    assert [job["submission_id"][-2:] for job in api.submitted] == ["-1", "-2"]


def test_another_command_for_the_same_output_is_refused(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--no-wait") == 0
    assert run(command=[*COMMAND, "--seed", "7"]) == 2
    assert "makes s3://bucket/models/one already, by another command: python -m jobs init" in words(
        capsys
    )


def test_who_is_slower_follows(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.faster = api.add
    assert run() == 0
    assert "-1 is at work already." in words(capsys)
    assert api.submitted == []


def test_who_is_always_slower_gives_up(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit_job(**given: Any) -> None:
        api.add(given["submission_id"], status="FAILED")
        raise RuntimeError("Job already exists.")

    monkeypatch.setattr(api, "submit_job", submit_job)
    assert run() == 1
    assert "others submit segjobs-init-" in words(capsys)
    assert len(api.jobs) == submit.TRIES


def test_stop(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--stop") == 0
    assert "Nothing is at work on s3://bucket/models/one" in words(capsys)
    run("--no-wait")
    assert run("--stop") == 0
    assert "-1 is stopped. Submit the same command again to go on." in words(capsys)
    assert run("--stop") == 0
    assert "there is nothing to stop" in words(capsys)


def test_one_that_does_not_stop_is_named(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.stops = False
    run("--no-wait")
    assert run("--stop") == 1
    assert "-1 was told to stop and still runs: look at http://127.0.0.1:8265" in words(capsys)


def test_ctrl_c_stops_the_looking_only(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.logs = [["half ", KeyboardInterrupt()]]  # type: ignore[list-item]
    assert run() == 130
    said = words(capsys)
    assert (
        "-1 goes on on the cluster, and --stop in front of the -- ends it. Run the same command again"
        in said
    )
    assert [job.status.value for job in api.jobs.values()] == ["RUNNING"]


def test_a_connection_that_breaks_repeats_nothing(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    api.logs = [
        ["one\n", "tw", RuntimeError("WebSocket connection closed unexpectedly")],
        ["one\ntwo\n", aiohttp.ClientConnectionError("reset")],
        ["one\ntwo\nthree\n"],
    ]
    assert run() == 0
    assert "one two three" in words(capsys)


def test_a_cluster_that_is_gone_ends_it(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    async def tail(job_id: str) -> AsyncIterator[str]:
        yield "half "
        api.down = ConnectionError("Failed to connect to Ray at address")
        raise RuntimeError("WebSocket connection closed unexpectedly")

    api.tail_job_logs = tail  # type: ignore[method-assign]
    assert run() == 1
    said = words(capsys)
    assert "no Ray dashboard answers at http://127.0.0.1:8265: name it by --address" in said
    assert (
        "may be lost with its head node; what it finished is in its output. Run the same command again"
        in said
    )


def test_a_cluster_that_was_started_anew_is_told(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    async def tail(job_id: str) -> AsyncIterator[str]:
        api.jobs.clear()
        yield ""

    api.tail_job_logs = tail  # type: ignore[method-assign]
    assert run() == 1
    assert "knows no such job any more: it was started anew. Run the same command again" in words(
        capsys
    )


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ConnectionError("Failed to connect"), "no Ray dashboard answers at http://127.0.0.1:8265"),
        (requests.Timeout("slow"), "no Ray dashboard answers at"),
        (AuthenticationError("401"), "wants a token, or another one: set RAY_AUTH_MODE=token"),
        (RuntimeError("Request failed with status code 500: Traceback\n  x\nKeyError: 'y'."), "do not agree: KeyError: 'y'"),
    ],
)  # fmt: skip
def test_what_the_api_says_is_said_plainly(
    api: Api, error: Exception, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api.down = error
    assert run() == 1
    said = words(capsys)
    assert what in said
    assert "Traceback" not in said


def test_the_flag_wins_over_the_environment(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        ray_jobs,
        "JobSubmissionClient",
        lambda address: seen.append((address, ray_jobs.os.environ.get("RAY_API_SERVER_ADDRESS"))),
    )
    JobServer(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:1")
    JobServer(None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://api:2/")
    JobServer(None)
    JobServer("http://flag:3")
    assert [address for address, _ in seen] == [
        "http://127.0.0.1:8265",
        "http://ray:1",
        "http://api:2",
        "http://flag:3",
    ]
    assert all(address == known for address, known in seen)
    assert ray_jobs.os.environ["RAY_API_SERVER_ADDRESS"] == "http://api:2/"


def test_a_store_of_this_shell_is_pointed_at(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    hint = "AWS_ENDPOINT_URL is set here and does not travel: add --env AWS_ENDPOINT_URL"
    assert run() == 0
    assert hint in words(capsys)
    assert run("--env", "AWS_ENDPOINT_URL") == 0
    assert (
        api.submitted[1]["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000"
    )
    assert hint not in words(capsys)
    assert run(command=[*COMMAND, "--endpoint-url", "http://127.0.0.1:9000"]) == 0
    assert hint not in words(capsys)


def test_stop_and_no_wait_exclude_one_another(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--stop", "--no-wait")
    assert stop.value.code == 2
    assert "--stop and --no-wait exclude one another" in words(capsys)


def test_a_secret_that_may_not_travel_is_refused(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    assert run("--env", "AWS_SECRET_ACCESS_KEY") == 2
    said = words(capsys)
    assert "--ship-credentials" in said
    assert "planted" not in said
    assert api.submitted == []


def test_exit_codes_are_those_of_a_shell() -> None:
    def job(status: str, code: int | None) -> Job:
        return Job(
            job_id="x-1", attempt=1, entrypoint="", status=status, message="", driver_exit_code=code
        )

    assert [job(*one).exit_code for one in (("SUCCEEDED", 0), ("SUCCEEDED", None), ("FAILED", None), ("FAILED", -15))] == [0, 0, 1, 143]  # fmt: skip
    assert not job("PENDING", None).ended
