"""The image: what it installs, and that it is what KubeRay and Ray's launcher count on."""

import re
import shlex
from collections.abc import Iterator

import pytest

from tests.infra.rules import ROOT

FILE = ROOT / "infra" / "Dockerfile"
# Of the system, besides what the base image has.
PROGRAMS = {
    "wget": "KubeRay's probes have no wget",
    "rsync": "Ray's launcher copies nothing into it without rsync",
    "openssh-client": "the head of `ray up` reaches no worker without ssh",
}


def problems(text: str) -> Iterator[str]:
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    before, user, _ = text.partition("\nUSER ")
    installed = dict(
        re.findall(r" ([a-z][a-z-]+)=(\S+)", re.findall("apt-get install .*", "\n".join(lines))[0])
    )
    yield from (words for name, words in PROGRAMS.items() if name not in installed)
    if not user or text.rpartition("\nUSER ")[2].split()[0] in ("0", "root"):
        yield "it runs as root"
    home = re.search(r"\bHOME=(\S+)", before)
    if home is None or f"\nWORKDIR {home[1]}\n" not in text:
        yield "the launcher would put what belongs below ~ into /root"
    if not re.search(r"^FROM python:3\.\d+-slim-[a-z]+$", text, re.MULTILINE):
        yield "it is of no known version of Python and Debian"
    yield from _install_problems("\n".join(lines))
    for line in lines:
        for path in line.split()[1:-1] if line.startswith("COPY ") else []:
            if not (ROOT / path).exists():
                yield f"there is no {path} to copy"
    copied = {path for line in lines if line.startswith("COPY ") for path in line.split()[1:-1]}
    yield from (f"{name} is not in it" for name in ("jobs", "segmodel") if name not in copied)


def _install_problems(text: str) -> Iterator[str]:
    """Name what is installed besides the installer, what is locked, and this package."""
    calls = [shlex.split(call) for call in re.findall(r"\bpip install ([^&\n]*)", text)]
    named = [[word for word in call if not word.startswith("--")] for call in calls]
    if ["-r", "requirements.lock"] not in named or not re.search("--require-hashes -r", text):
        yield "what is installed is not what is locked"
    if ["."] in named and "--no-deps" not in calls[named.index(["."])]:
        yield "the package would bring versions of its own"
    for names in named:
        if names not in (["uv>=0.9,<1"], ["-r", "requirements.lock"], ["."]):
            yield f"{' '.join(names)} is not locked"


def test_the_image_has_what_counts_on_it() -> None:
    assert list(problems(FILE.read_text())) == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("rsync=3.2.* ", "", "without rsync"),
        ("openssh-client=1:9.2* ", "", "without ssh"),
        ("wget=1.21.*", "curl=8.*", "no wget"),
        ("USER 1000", "USER root", "it runs as root"),
        ("HOME=/home/ray", "HOMES=/home/ray", "into /root"),
        ("WORKDIR /home/ray", "WORKDIR /home/rays", "into /root"),
        ("--require-hashes ", "", "not what is locked"),
        ("-r requirements.lock", "ray torch", "not what is locked; ray torch is not locked"),
        ("--no-deps .", ".", "versions of its own"),
        ("USER 1000", "RUN pip install ray==2.9.0\nUSER 1000", "ray==2.9.0 is not locked"),
        ("FROM python:3.12-slim-bookworm", "FROM python:latest", "no known version of Python"),
        ("COPY jobs jobs", "COPY job jobs", "there is no job to copy; jobs is not in it"),
    ],
)
def test_a_planted_error_is_named(right: str, wrong: str, words: str) -> None:
    text = FILE.read_text()
    assert right in text
    assert words in "; ".join(problems(text.replace(right, wrong)))
