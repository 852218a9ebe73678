"""A model of the harness's config as the descriptor that an enqueued run carries.

The descriptor comes from a folder of JSON files in bakeoff's form (its store names them by their
ids), or is worked out from what the config says. A guess that could be wrong is no guess: a wrong
quantization or parameter count makes a wrong VRAM need, and a runner that goes out of memory after
hours.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.jobs import quantizations
from client.documents import read_document
from client.output import CommandFailed

REQUIRED = ("name", "parameter_count_b", "architecture", "quantization", "file_format")
MAX_BILLIONS = 100_000  # a larger num_params counts parameters, not billions of them


class Undescribed(Exception):
    """A model has no usable descriptor; `problems` says what is missing and how to give it."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class DescriptorFile:
    """A model descriptor and the file it came from."""

    path: Path
    body: Mapping[str, Any]


def read_folder(folder: Path) -> tuple[DescriptorFile, ...]:
    """Return the descriptors of a folder's *.json files. Raises CommandFailed for a bad file."""
    return tuple(DescriptorFile(path, _read(path)) for path in sorted(folder.glob("*.json")))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():  # a pipe would be waited for
        raise CommandFailed(f"{path}: is not a file")
    body = read_document(path)
    if not isinstance(body, dict):
        raise CommandFailed(f"{path}: a model descriptor is a JSON object")
    return body


def describe(
    model: Mapping[str, Any], files: Sequence[DescriptorFile], known: Collection[str]
) -> dict[str, Any]:
    """Return the descriptor of one entry of `models`, which has an id. Raises Undescribed.

    `known` are the quantizations of bakeoff's table.
    """
    found = _find(model, files)
    if found is None:
        return _from_config(model, known)
    missing = [name for name in REQUIRED if found.body.get(name) is None]
    if missing:
        raise Undescribed(f"its descriptor {found.path} lacks {', '.join(missing)}: add them")
    _refuse_other_weights(model, found, known)
    return dict(found.body)


def _find(model: Mapping[str, Any], files: Sequence[DescriptorFile]) -> DescriptorFile | None:
    """By the file named after the id; else by the id or alias as its name; else by the weights."""
    file_name = _file_name(model.get("gguf"))
    stem = file_name.removesuffix(".gguf").lower()
    names = [name for name in (model["id"], model.get("alias")) if isinstance(name, str)]
    ways: tuple[Callable[[DescriptorFile], bool], ...] = (
        lambda file: file.path.stem == model["id"],
        lambda file: file.body.get("name") in names,
        lambda file: stem != "" and str(file.body.get("name")).lower() == stem,
        lambda file: _is_of_weights(file.body, model.get("gguf")),
    )
    for way in ways:
        found = [file for file in files if way(file)]
        if len(found) > 1:
            paths = ", ".join(str(file.path) for file in found)
            raise Undescribed(
                f"several descriptors fit ({paths}): name one of them {model['id']}.json"
            )
        if found:
            return found[0]
    return None


def _is_of_weights(body: Mapping[str, Any], gguf: Any) -> bool:
    """Return whether a source is this very file, or its repository in this file's quantization."""
    *folders, file_name = re.split(r"[\\/]", gguf) if isinstance(gguf, str) else [""]
    if not file_name:
        return False
    listed = body.get("sources")
    sources = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    urls = [str(source.get("url")).rstrip("/") for source in sources]
    if any(url.endswith(f"/{file_name}") or url == file_name for url in urls):
        return True
    if len(folders) < 2:
        return False
    repository = "/".join(folders[:2])
    of_repository = any(url.endswith(f"/{repository}") for url in urls) or any(
        isinstance(source.get("source_metadata"), dict)
        and source["source_metadata"].get("hf_repo") == repository
        for source in sources
    )
    named = quantizations.in_file_name(file_name)
    return of_repository and [quantizations.canonical(str(body.get("quantization")))] == named


def _refuse_other_weights(
    model: Mapping[str, Any], found: DescriptorFile, known: Collection[str]
) -> None:
    """Two quantizations of one model often share their alias: the file decides which it is."""
    named = quantizations.in_file_name(_file_name(model.get("gguf")))
    said = quantizations.canonical(str(found.body["quantization"]))
    if len(named) == 1 and named[0] in known and said != named[0]:
        raise Undescribed(
            f"its descriptor {found.path} says {said}, and its gguf {named[0]}: correct the one, or"
            f" name the right descriptor {model['id']}.json"
        )


def _from_config(model: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    file_name = _file_name(model.get("gguf"))
    total, active = _billions(model.get("num_params")), _billions(model.get("num_active_params"))
    put = f"put a descriptor {model['id']}.json into the --models folder"
    other = f", or {put}"
    problems = []
    if total is None:
        problems.append(
            f"no usable parameter count: set num_params (such as 7.6 or 7600000000){other}"
        )
    elif model.get("num_active_params") is not None and not 0 < (active or 0) <= total:
        problems.append(f"num_active_params is not above 0 and up to num_params: correct it{other}")
    if not file_name:
        problems.append(f"no gguf: set it to the weights' file name{other}")
    else:
        problems += _quantization_problems(file_name, put, known)
    if total is None or problems:
        raise Undescribed(*problems)
    return _descriptor(model, file_name, quantizations.in_file_name(file_name)[0], total, active)


def _quantization_problems(file_name: str, put: str, known: Collection[str]) -> list[str]:
    named = quantizations.in_file_name(file_name)
    if len(named) == 1 and named[0] in known:
        return []
    listed = ", ".join(known)
    if len(named) == 1:
        no_need = f"{file_name} is in {named[0]}, of which bakeoff's table has no VRAM need"
        nearest = "that names the nearest it has by bytes per weight"
        return [f"{no_need}: {put} {nearest}; known: {listed}"]
    what = "names no quantization" if not named else f"names {' and '.join(named)}"
    return [f"{file_name} {what}: rename it so that it names one, or {put}; known: {listed}"]


def _descriptor(
    model: Mapping[str, Any], file_name: str, quantization: str, total: float, active: float | None
) -> dict[str, Any]:
    # Named by id: two quantizations of one model often share their alias.
    descriptor = {
        "name": model["id"],
        "parameter_count_b": total,
        "architecture": "MoE" if active is not None and active < total else "Dense",
        "quantization": quantization,
        "file_format": "GGUF",
        "sources": [{"source_type": "local_file", "url": file_name}],
    }
    if active is not None:
        descriptor["active_parameter_count_b"] = active
    if isinstance(model.get("ctx"), int):
        descriptor["context_length_default"] = model["ctx"]
    return descriptor


def _file_name(gguf: Any) -> str:
    """Without its folders: the same weights are the same model on every machine."""
    return re.split(r"[\\/]", gguf)[-1] if isinstance(gguf, str) else ""


def _billions(count: Any) -> float | None:
    if isinstance(count, bool) or not isinstance(count, int | float) or count <= 0:
        return None
    return float(count) if count <= MAX_BILLIONS else count / 1e9
