"""Render the Jinja templates of this folder: values are escaped, missing ones are errors."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..show.numbers import bits, brief, exact, percent, plural, size
from ..show.safe_text import clean
from .formatting import (
    VERDICT_STYLES,
    format_count,
    format_failed,
    format_figure,
    format_interval,
    format_step,
    format_value,
)

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent


@cache
def environment() -> "Environment":
    """Return the environment: autoescape on, undefined names raise, control characters are removed from all text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_controls,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "as_bits": bits,
        "as_percent": lambda share: _unbroken(percent(share)),
        "as_size": lambda number: _unbroken(size(number)),
        "as_figure": lambda value, unit: (
            format_figure(value, unit) if value.reason else _unbroken(format_figure(value, unit))
        ),
        "as_value": lambda value, unit: _unbroken(format_value(value, unit)),
        "as_interval": format_interval,
        "brief": brief,
        "exact": exact,
        "failed": format_failed,
        "plural": plural,
    }
    made.globals |= {"format_step": format_step, "format_count": format_count, "verdict_styles": VERDICT_STYLES}
    return made


def render(template: str, **context: Any) -> str:
    """Render a template of this folder.

    Raises:
        jinja2.UndefinedError: The template uses a name that `context` does not have.
    """
    return environment().get_template(template).render(**context)


def read_asset(name: str) -> str:
    """Read a style sheet or script of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def _unbroken(text: str) -> str:
    """Keep a number and its unit on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _without_controls(value: Any) -> Any:
    """Clean what a template prints, before it is escaped; markup (what other macros made) is left as it is."""
    return value if hasattr(value, "__html__") else clean(str(value))
