"""`search`: packs on the Hub, by words, base model and the tag `lorary`."""

from dataclasses import dataclass
from typing import Any, Final

from .client import LIBRARY, Hub

BASE_TAG: Final = "base_model:adapter:"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A pack on the Hub, as its model card describes it: nothing of it is verified before it is pulled."""

    repo: str
    name: str | None  # of the domain
    version: int | None
    base: str | None
    base_weights: str | None  # digest
    bits_per_byte: float | None
    bits_per_byte_of_base: float | None
    downloads: int
    likes: int
    updated: str  # ISO 8601
    is_private: bool


def search(query: str | None, *, base: str | None, limit: int, hub: Hub) -> list[SearchResult]:
    """Packs on the Hub, the most downloaded first.

    Args:
        query: Words in the name of the repository; all if not given.
        base: The Hub id of the base model.
        limit: At most so many.
        hub: The Hub.

    Raises:
        RemoteError: The Hub cannot be asked.
    """
    tags = [LIBRARY, *([BASE_TAG + base] if base else [])]

    def ask() -> list[Any]:
        return list(
            hub.api.list_models(search=query, filter=tags, sort="downloads", limit=limit, full=True, cardData=True)
        )

    return [_found(model) for model in hub.ask("the Hub", ask)]


def _found(model: Any) -> SearchResult:
    card = model.card_data.to_dict() if model.card_data else {}
    own = card.get(LIBRARY)
    own = own if isinstance(own, dict) else {}
    tagged = [tag.removeprefix(BASE_TAG) for tag in model.tags or [] if tag.startswith(BASE_TAG)]
    return SearchResult(
        repo=str(model.id),
        name=_of(str, own.get("name")),
        version=_of(int, own.get("version")),
        base=_of(str, own.get("base")) or (tagged[0] if tagged else None),
        base_weights=_of(str, own.get("base_weights")),
        bits_per_byte=_of(float, own.get("bits_per_byte")),
        bits_per_byte_of_base=_of(float, own.get("bits_per_byte_of_base")),
        downloads=model.downloads or 0,
        likes=model.likes or 0,
        updated=model.last_modified.isoformat(timespec="seconds") if model.last_modified else "",
        is_private=bool(model.private),
    )


def _of(kind: type, value: object) -> Any:
    """The value if it is of the kind: a card is written by anybody."""
    return value if type(value) is kind else None
