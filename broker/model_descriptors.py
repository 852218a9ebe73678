"""Model descriptors become rows: names looked up, ids made the same way everywhere.

The ids are upstream's: UUID5 of the weights' hash, or, while that is unknown, of the first source,
the parameter count and the size, and then `provisional`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any
from uuid import UUID, uuid5

from broker.errors import Violation
from db.models import NewCreator, NewModel, NewSource

MODEL_NAMESPACE = UUID("dbc87c22-6b6d-4f89-9757-d186f0f62719")
CREATOR_NAMESPACE = UUID("efaf4f4e-cbd1-43f7-a535-f72079513d00")

Lookups = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class ModelRows:
    """What a descriptor adds to the database."""

    model: NewModel
    creator: NewCreator | None
    sources: tuple[NewSource, ...]


def check(descriptor: Mapping[str, Any], lookups: Lookups, at: str) -> list[Violation]:
    """Return what is wrong with a descriptor that fits the schema.

    An unknown name is refused with the known ones and never inserted (upstream's rule), and so is
    a model without a parameter count: its VRAM need could not be told.
    """
    wrong = [
        Violation(f"{at}/{kind}", f"is unknown; known: {', '.join(lookups[kind])}")
        for kind in ("quantization", "architecture", "file_format")
        if descriptor[kind] not in lookups[kind]
    ]
    wrong += [
        Violation(f"{at}/sources/{i}/source_type", f"is unknown; known: {', '.join(known)}")
        for known in [lookups["source_type"]]
        for i, source in enumerate(descriptor.get("sources", ()))
        if source["source_type"] not in known
    ]
    total = descriptor.get("parameter_count_b")
    active = descriptor.get("active_parameter_count_b")
    if total is None:
        wrong.append(Violation(f"{at}/parameter_count_b", "is missing: VRAM need depends on it"))
    elif active is not None and active > total:
        wrong.append(Violation(f"{at}/active_parameter_count_b", "is more than parameter_count_b"))
    if not descriptor.get("model_hash") and not descriptor.get("sources"):
        wrong.append(
            Violation(f"{at}/sources", "is missing: a model needs a model_hash or a source")
        )
    if not _is_date(descriptor.get("release_date")):
        wrong.append(Violation(f"{at}/release_date", "is not a date we can store"))
    return wrong


def rows(descriptor: Mapping[str, Any], lookups: Lookups) -> ModelRows:
    """Return the rows of a descriptor that `check` found nothing wrong with."""
    get = descriptor.get
    model_id = model_id_of(descriptor)
    creator = _creator(descriptor["creator"]) if get("creator") else None
    model = NewModel(
        model_id=model_id,
        name=descriptor["name"],
        creator_id=creator.creator_id if creator else None,
        model_hash=get("model_hash"),
        parameter_count_b=float(descriptor["parameter_count_b"]),
        active_parameter_count_b=float(
            get("active_parameter_count_b", descriptor["parameter_count_b"])
        ),
        architecture_id=lookups["architecture"][descriptor["architecture"]],
        context_length_default=_int(get("context_length_default")),
        context_length_min=_int(get("context_length_min")),
        context_length_max=_int(get("context_length_max")),
        file_format_id=lookups["file_format"][descriptor["file_format"]],
        quantization_id=lookups["quantization"][descriptor["quantization"]],
        model_source_size=_int(get("model_source_size")),
        release_date=date.fromisoformat(descriptor["release_date"])
        if get("release_date")
        else None,
        version=get("version"),
        description=get("description"),
        provisional=not get("model_hash"),
    )
    sources = tuple(
        NewSource(
            model_id,
            lookups["source_type"][source["source_type"]],
            source["url"],
            source.get("metadata"),
        )
        for source in get("sources", ())
    )
    return ModelRows(model, creator, sources)


def model_id_of(descriptor: Mapping[str, Any]) -> UUID:
    """Return the deterministic model_id of a descriptor."""
    if descriptor.get("model_hash"):
        return uuid5(MODEL_NAMESPACE, descriptor["model_hash"])
    url = descriptor["sources"][0]["url"]
    size = descriptor.get("model_source_size", "")
    return uuid5(MODEL_NAMESPACE, f"{url}|{descriptor['parameter_count_b']}|{size}")


def _creator(creator: Mapping[str, Any]) -> NewCreator:
    homepage = creator.get("homepage")
    creator_id = uuid5(CREATOR_NAMESPACE, homepage or creator["display_name"])
    return NewCreator(
        creator_id, creator.get("name"), creator["display_name"], homepage, homepage is None
    )


def _is_date(text: str | None) -> bool:
    """Return whether a date of the right form is one: the form allows the year 0000."""
    try:
        return text is None or date.fromisoformat(text) is not None
    except ValueError:
        return False


def _int(value: float | None) -> int | None:
    # JSON Schema counts 4096.0 as an integer; the database driver does not.
    return None if value is None else int(value)
