"""The fuzz targets hold for their seeds, and are able to fail."""

from collections.abc import Callable

import pytest

from jobs import index
from segmodel import images
from tests.fuzz import corpus, targets
from tests.fuzz.__main__ import describe

IMAGES, TARS = corpus.images(), corpus.tars()


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    data = IMAGES[name]
    assert targets.mended_image(data) == data
    targets.check_image(data)
    for cut in range(0, len(data), 29):
        targets.check_image(data[:cut])


@pytest.mark.parametrize("name", TARS)
def test_tars(name: str) -> None:
    data = TARS[name]
    assert targets.mended_tar(data) == data
    targets.check_tar(data)
    for cut in range(0, len(data), 487):
        targets.check_tar(data[:cut])


def test_a_mended_png_is_whole_again() -> None:
    png = IMAGES["png"]
    changed = png[:40] + b"?" + png[41:]
    assert targets.mended_image(changed) != changed
    assert targets.mended_image(targets.mended_image(changed)) == targets.mended_image(changed)
    header = targets.sealed(TARS["gnu"][:500] + b"?" + TARS["gnu"][501:512])
    assert targets.mended_tar(TARS["gnu"][:500] + b"?" + TARS["gnu"][501:]).startswith(header)


def test_an_unexpected_exception_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_DAMAGE", ())
    with pytest.raises(OSError, match="truncated"):
        targets.check_image(IMAGES["jpeg"][:-40])


def test_a_lost_image_is_a_finding(
    make_tar: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = index._scan

    def lossy(*of: object) -> object:
        found, damage = whole(*of)  # type: ignore[arg-type]
        return found[:-1], damage

    monkeypatch.setattr(index, "_scan", lossy)
    with pytest.raises(AssertionError):
        targets.check_tar(make_tar([("a.jpg", b"1"), ("b.jpg", b"2")]))


def test_what_a_run_says() -> None:
    log = (
        "#30\tINITED cov: 700 ft: 1100 corp: 28/40Kb exec/s: 0 rss: 110Mb\n"
        "#900\tNEW    cov: 710 ft: 1200 corp: 40/50Kb lim: 20000 exec/s: 90 rss: 112Mb L: 9/9\n"
    )
    assert describe("image", log) == (
        "image: 900 executions; edges 700 -> 710, features 1100 -> 1200, inputs 28 -> 40; "
        "memory 110 -> 112 MiB"
    )
    assert describe("tar", "no module").startswith("tar: did not start")
