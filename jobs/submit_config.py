"""The configuration of `submit`; that of what it runs is the verb's own."""

from dataclasses import dataclass

from jobs.config import ConfigError, option


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Run a verb as a job of a Ray cluster, follow it, and end as it ends."""

    command: list[str] = option(
        "after `--`: the verb and its flags, such as -- predict --input URI ...", positional=True
    )
    address: str | None = option(
        "the cluster's dashboard, such as http://head:8265; RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, then "
        "http://127.0.0.1:8265, if left out",
        None,
    )
    no_wait: bool = option("say the job's name and end; run again without it to follow", False)  # noqa: FBT003
    stop: bool = option("end the job of this command instead, if it is at work", False)  # noqa: FBT003
    env: list[str] = option(
        "names of environment variables that the job gets as they are here, such as AWS_PROFILE AWS_DEFAULT_REGION; no "
        "credentials",
        (),
    )
    image_has_code: bool = option(
        "run the segjobs that the cluster's image has, instead of uploading this one",
        False,  # noqa: FBT003
    )

    def __post_init__(self) -> None:
        # As the command line gives it, whoever made this.
        object.__setattr__(self, "env", list(self.env))
        if self.stop and self.no_wait:
            raise ConfigError("--stop and --no-wait exclude one another: give one")
