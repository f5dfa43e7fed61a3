"""Format numbers for people."""

import math


def short(number: float) -> str:
    """Format a count in at most four characters and a letter.

    >>> short(999), short(12_300), short(98_304), short(1_234_567)
    ('999', '12.3 K', '98.3 K', '1.23 M')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}" if abs(number) < 999.5 * size else f"{number / size:.0f} {letter}"
    return f"{number:,.0f}"


def size(number: int) -> str:
    """Format a number of bytes.

    >>> size(512), size(8_665_248)
    ('512 B', '8.67 MB')
    """
    return f"{number} B" if number < 1000 else short(number).replace("K", "k") + "B"


def bits(number: float | None) -> str:
    """Format bits per byte; what rounds to zero has no sign.

    >>> bits(2.91449), bits(-0.0001), bits(None)
    ('2.914', '0.000', '-')
    """
    return "-" if number is None or math.isnan(number) else f"{number:z.3f}"


def percent(share: float | None, *, digits: int = 0) -> str:
    """Format a share of 1 as a percentage; what rounds to zero has no sign.

    >>> percent(0.964), percent(0.0312, digits=1), percent(-0.0001), percent(None)
    ('96 %', '3.1 %', '0 %', '-')
    """
    return "-" if share is None or math.isnan(share) else f"{share * 100:z.{digits}f} %"


def exact(number: float | None) -> str:
    """Format a number for a pipe; empty if there is none.

    >>> exact(0.5), exact(-0.0), exact(None)
    ('0.5', '0', '')
    """
    return "" if number is None or math.isnan(number) else f"{number:z.6g}"


def clock(seconds: float) -> str:
    """Format the time left.

    >>> clock(7.2), clock(62), clock(3700)
    ('0:07', '1:02', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Format the time that something took.

    >>> duration(4.24), duration(62), duration(3700)
    ('4.2 s', '1 min 2 s', '1 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def brief(digest: str) -> str:
    """Shorten a digest to 12 digits.

    >>> brief("sha256:0123456789abcdef0123")
    'sha256:0123456789ab'
    """
    kind, colon, value = digest.partition(":")
    return f"{kind}{colon}{value[:12]}"


def plural(number: int, word: str) -> str:
    """Format a count with its noun.

    >>> plural(1, "pack"), plural(2, "pack")
    ('1 pack', '2 packs')
    """
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
