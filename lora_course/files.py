"""Files that are written whole or not at all, by one writer at a time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def make_folder(folder: str | Path) -> Path:
    """The folder as a path, made if it is not there. Raises ValueError where a file of that name is in the way."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):  # a file there, above it, or a link to nothing
        raise ValueError(
            f"{folder} can't be a folder: a file or a broken link is in the way. Give another name."
        ) from None
    return folder


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError where it is none, or cut short."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} can't be read ({error}): it is cut short or no safetensors file. Take another copy."
        ) from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError where it is none, or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and RecursionError's kin included
        raise ValueError(
            f"{path} is no JSON ({error}): it was cut short or edited. Take another copy."
        ) from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a failed or killed write leaves the old one.

    The content goes to a name of its own first, so that writers at the same moment do not mix theirs.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together, the one that readers ask for first as the last.

    What fails or is killed while they are written leaves the old ones. Between two of the exchanges that follow, the last
    one is missing: no reader takes an old description for new tensors.
    """
    unfinished = {p: p.with_name(f"{p.name}.{uuid.uuid4().hex}.unfinished") for p in contents}
    try:
        for path, content in contents.items():
            with unfinished[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the new name with nothing in it
        if len(contents) > 1:
            list(contents)[-1].unlink(missing_ok=True)
        for path, file_written in unfinished.items():
            os.replace(file_written, path)
    except BaseException:
        for file_written in unfinished.values():
            with suppress(OSError):
                file_written.unlink(missing_ok=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the block no other process of this machine writes to `folder`; what killed writers left there is gone."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    with FileLock(Path(tempfile.gettempdir()) / f"lora-course-{name}.lock"):
        for left in folder.glob(
            f"*.{'[0-9a-f]' * 32}.unfinished"
        ):  # no file of another's that is called so
            left.unlink(missing_ok=True)
        yield
