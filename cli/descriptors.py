"""A model of the harness's config as the descriptor that an enqueued run carries.

The descriptor comes from a folder of JSON files, or is worked out from what the config says. A
guess that could be wrong is no guess: a wrong quantization or parameter count makes a wrong VRAM
need, and a runner that goes out of memory after hours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.documents import read_document
from cli.output import CommandFailed

REQUIRED = ("name", "parameter_count_b", "architecture", "quantization", "file_format")
MAX_BILLIONS = 100_000  # a larger num_params counts parameters, not billions of them

# Upstream's quantization names as tokens of a file name: `Q2_K_XL` is not q2_k, nor is `Q4_0_4_4`
# q4_0. Only for guessing; what exists is decided by the service's lookup table.
_QUANTIZATION = re.compile(
    r"(?<![a-z0-9])(?:fp32|fp16|bf16|q8_0|q6_k|q5_k_m|q5_k_s|q5_0|q5_1|q4_k_m|q4_k_s|q4_0|q4_1"
    r"|q3_k_l|q3_k_m|q3_k_s|q2_k|iq4_xs|iq4_nl|iq3_m|iq3_s|iq3_xxs|iq2_m|iq2_xs|iq2_xxs|iq1_m"
    r"|iq1_s)(?![a-z0-9_])"
)


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
    body = read_document(path)
    if not isinstance(body, dict):
        raise CommandFailed(f"{path}: a model descriptor is a JSON object")
    return body


def describe(model: Mapping[str, Any], files: Sequence[DescriptorFile]) -> dict[str, Any]:
    """Return the descriptor of one entry of `models`, which has an id. Raises Undescribed."""
    found = _find(model, files)
    if found is None:
        return _from_config(model)
    missing = [name for name in REQUIRED if found.body.get(name) is None]
    if missing:
        raise Undescribed(f"its descriptor {found.path} lacks {', '.join(missing)}: add them")
    return dict(found.body)


def _find(model: Mapping[str, Any], files: Sequence[DescriptorFile]) -> DescriptorFile | None:
    """The file named after the id comes first, then descriptors that carry the id or alias."""
    names = {model["id"], model.get("alias")}
    found = [file for file in files if file.path.stem == model["id"]] or [
        file for file in files if file.body.get("name") in names and file.body.get("name")
    ]
    if len(found) > 1:
        paths = ", ".join(str(file.path) for file in found)
        raise Undescribed(f"several descriptors fit ({paths}): name one of them {model['id']}.json")
    return found[0] if found else None


def _from_config(model: Mapping[str, Any]) -> dict[str, Any]:
    file_name = _file_name(model.get("gguf"))
    quantizations = set(_QUANTIZATION.findall(file_name.lower()))
    total, active = _billions(model.get("num_params")), _billions(model.get("num_active_params"))
    problems = []
    if total is None:
        problems.append("no usable parameter count: set num_params (such as 7.6 or 7600000000)")
    elif model.get("num_active_params") is not None and not 0 < (active or 0) <= total:
        problems.append("num_active_params is not above 0 and up to num_params: correct it")
    if not file_name:
        problems.append("no gguf: set it to the weights' file name")
    elif len(quantizations) != 1:
        problems.append(f"{file_name} does not name exactly one known quantization: rename it")
    if total is None or problems:
        other = f", or put a descriptor {model['id']}.json into the --models folder"
        raise Undescribed(*(problem + other for problem in problems))
    return _descriptor(model, file_name, quantizations.pop(), total, active)


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
