"""One fuzz target under libFuzzer: `python -m tests.fuzz.one image|tar [libFuzzer's options]`."""

import random
import sys
import warnings

import atheris

# Only what is imported in here is watched for coverage; Pillow's and Arrow's C code is not.
WATCHED = ["segmodel", "jobs.tar", "jobs.index", "jobs.read", "jobs.chunks", "jobs.store"]
PLUGINS = ["Jpeg", "Png", "WebP", "Tiff", "Bmp", "Gif"]
# atheris itself has imported it by now.
sys.modules.pop("tarfile", None)
with atheris.instrument_imports(
    include=[*WATCHED, "tarfile", "PIL.ImageFile", *(f"PIL.{name}ImagePlugin" for name in PLUGINS)]
):
    from tests.fuzz import targets

TARGETS = {
    "image": (targets.check_image, targets.mended_image),
    "tar": (targets.check_tar, targets.mended_tar),
}


def main() -> None:
    """Fuzz until libFuzzer's options say stop; a failure leaves its input behind."""
    check, mended = TARGETS[sys.argv[1]]
    # A reader that warns changes what the whole process prints; the decoder is not to.
    warnings.simplefilter("error")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed: bytes = atheris.Mutate(data, max_size)
        # One in four keeps its wrong checksums.
        return mended(changed) if random.Random(seed).random() < 0.75 else changed

    atheris.Setup([sys.argv[0], *sys.argv[2:]], check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
