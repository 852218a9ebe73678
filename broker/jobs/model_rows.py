"""Model descriptors become rows: names looked up, ids made the same way everywhere.

A descriptor has bakeoff's form (bench/descriptor.py), as people write it or as its store keeps it.
The ids are upstream's: UUID5 of the weights' hash, or, while that is unknown, of the first source,
the parameter count and the size, and then `provisional`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from uuid import UUID, uuid5

from broker.documents.times import parse_time
from broker.errors import Violation
from broker.jobs import quantizations
from db.models import NewCreator, NewModel, NewSource

MODEL_NAMESPACE = UUID("dbc87c22-6b6d-4f89-9757-d186f0f62719")
CREATOR_NAMESPACE = UUID("efaf4f4e-cbd1-43f7-a535-f72079513d00")

Lookups = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class ModelRows:
    """The rows that a model descriptor adds to the database."""

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
        for kind in ("architecture", "file_format")
        if descriptor[kind] not in lookups[kind]
    ]
    known = lookups["quantization"]
    if quantizations.find(descriptor["quantization"], known) is None:
        wrong.append(Violation(f"{at}/quantization", f"is unknown; known: {', '.join(known)}"))
    wrong += [
        Violation(f"{at}/sources/{i}/source_type", f"is unknown; known: {', '.join(known)}")
        for known in [lookups["source_type"]]
        for i, source in enumerate(descriptor.get("sources") or ())
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
    creator = descriptor.get("creator")
    if creator and not (creator.get("name") or creator.get("display_name")):
        wrong.append(Violation(f"{at}/creator/name", "is missing: give it or a display_name"))
    if not wrong and descriptor.get("uuid") not in (None, str(model_id_of(descriptor))):
        detail = (
            f"is not the id of this descriptor ({model_id_of(descriptor)}): its hash, or its url,"
            " count and size, were edited after bakeoff stored it; correct them or leave uuid out"
        )
        wrong.append(Violation(f"{at}/uuid", detail))
    return wrong


def rows(descriptor: Mapping[str, Any], lookups: Lookups) -> ModelRows:
    """Return the rows of a descriptor that `check` found nothing wrong with."""
    get = descriptor.get
    model_id = model_id_of(descriptor)
    creator = _creator(descriptor["creator"]) if get("creator") else None
    quantization = quantizations.find(descriptor["quantization"], lookups["quantization"])
    assert quantization is not None, "`check` has refused unknown ones"
    model = NewModel(
        model_id=model_id,
        name=descriptor["name"],
        creator_id=creator.creator_id if creator else None,
        model_hash=_hash(descriptor),
        parameter_count_b=float(descriptor["parameter_count_b"]),
        active_parameter_count_b=float(
            get("active_parameter_count_b") or descriptor["parameter_count_b"]
        ),
        architecture_id=lookups["architecture"][descriptor["architecture"]],
        context_length_default=_int(get("context_length_default")),
        context_length_min=_int(get("context_length_min")),
        context_length_max=_int(get("context_length_max")),
        file_format_id=lookups["file_format"][descriptor["file_format"]],
        quantization_id=lookups["quantization"][quantization],
        model_source_mtime=_time(get("model_source_mtime")),
        model_source_size=_int(get("model_source_size")),
        release_date=date.fromisoformat(descriptor["release_date"])
        if get("release_date")
        else None,
        version=get("version"),
        description=get("description"),
        predecessor_model_id=UUID(predecessor)
        if (predecessor := get("predecessor_model_id"))
        else None,
        provisional=not get("model_hash"),
    )
    sources = tuple(
        NewSource(
            model_id,
            lookups["source_type"][source["source_type"]],
            source["url"],
            source.get("source_metadata"),
        )
        for source in get("sources") or ()
    )
    return ModelRows(model, creator, sources)


def model_id_of(descriptor: Mapping[str, Any]) -> UUID:
    """Return the deterministic model_id of a descriptor.

    Of numbers as they are written, so that 8 and 8.0 are two models, and with None for a size that
    is not known: the texts that bakeoff makes.
    """
    if model_hash := _hash(descriptor):
        return uuid5(MODEL_NAMESPACE, model_hash)
    url = descriptor["sources"][0]["url"]
    count, size = descriptor["parameter_count_b"], descriptor.get("model_source_size")
    return uuid5(MODEL_NAMESPACE, f"{url}|{count}|{size}")


def _hash(descriptor: Mapping[str, Any]) -> str | None:
    """The weights' hash as bakeoff writes it, and makes its id of: `sha256:` and 64 digits."""
    model_hash = descriptor.get("model_hash")
    return f"sha256:{model_hash.removeprefix('sha256:')}" if model_hash else None


def _creator(creator: Mapping[str, Any]) -> NewCreator:
    homepage, shown = creator.get("homepage"), creator.get("display_name") or creator["name"]
    return NewCreator(
        creator_id=uuid5(CREATOR_NAMESPACE, homepage or shown),
        name=creator.get("name") or shown,
        display_name=shown,
        homepage=homepage,
        service_identifiers=creator.get("service_identifiers"),
        provisional=not homepage,
    )


def _is_date(text: str | None) -> bool:
    """Return whether a date of the right form is one: the form allows the year 0000."""
    try:
        return text is None or date.fromisoformat(text) is not None
    except ValueError:
        return False


def _time(text: str | None) -> datetime | None:
    return parse_time(text, "/model_source_mtime") if text else None


def _int(value: float | None) -> int | None:
    # JSON Schema counts 4096.0 as an integer; the database driver does not.
    return None if value is None else int(value)
