"""Search the Hub for packs, by text, base model and the tag `lorary`."""

from dataclasses import dataclass
from typing import Any, Final

from .client import LIBRARY, Hub

BASE_TAG: Final = "base_model:adapter:"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Pack on the Hub as its model card describes it; nothing is verified before a pull."""

    repo: str
    name: str | None  # domain
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
    """Return packs on the Hub, most downloaded first.

    Args:
        query: Text in the repository name; None for all.
        base: Hub id of the base model.
        limit: Maximum number of results.
        hub: Connection to the Hub.

    Raises:
        RemoteError: The search failed.
    """
    tags = [LIBRARY, *([BASE_TAG + base] if base else [])]

    def list_models() -> list[Any]:
        return list(
            hub.api.list_models(search=query, filter=tags, sort="downloads", limit=limit, full=True, cardData=True)
        )

    return [_search_result(model) for model in hub.call("the Hub", list_models)]


def _search_result(model: Any) -> SearchResult:
    front_matter = model.card_data.to_dict() if model.card_data else {}
    own = front_matter.get(LIBRARY)
    own = own if isinstance(own, dict) else {}
    base_models = [tag.removeprefix(BASE_TAG) for tag in model.tags or [] if tag.startswith(BASE_TAG)]
    return SearchResult(
        repo=str(model.id),
        name=_typed(str, own.get("name")),
        version=_typed(int, own.get("version")),
        base=_typed(str, own.get("base")) or (base_models[0] if base_models else None),
        base_weights=_typed(str, own.get("base_weights")),
        bits_per_byte=_typed(float, own.get("bits_per_byte")),
        bits_per_byte_of_base=_typed(float, own.get("bits_per_byte_of_base")),
        downloads=model.downloads or 0,
        likes=model.likes or 0,
        updated=model.last_modified.isoformat(timespec="seconds") if model.last_modified else "",
        is_private=bool(model.private),
    )


def _typed(kind: type, value: object) -> Any:
    """Return the value if it has this type: model cards are untrusted input."""
    return value if type(value) is kind else None
