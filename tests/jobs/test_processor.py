"""What is said of an arithmetic."""

import pytest

from jobs import processor


@pytest.mark.parametrize(
    ("precision", "gpus", "has_bf16", "words"),
    [
        ("fp32", False, False, "fp32"),
        ("bf16", True, False, "bf16"),
        ("bf16", False, True, "bf16"),
        (
            "bf16",
            False,
            False,
            "bf16, which this processor only imitates: fp32-fast is many times as fast here",
        ),
    ],
)
def test_an_arithmetic_that_is_only_imitated_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch, precision: str, gpus: bool, has_bf16: bool, words: str
) -> None:
    monkeypatch.setattr(processor, "cpu_has_bf16", lambda: has_bf16)
    assert processor.in_words(precision, "fp32-fast", gpus=gpus) == words


def test_the_processor_is_asked() -> None:
    assert processor.cpu_has_bf16() in (True, False)
