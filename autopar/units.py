"""Numbers with units, as people read them."""

from __future__ import annotations

import math


def seconds_text(seconds: float) -> str:
    """`1.20 s`, `345 ms`, `6.78 us`."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * scale >= 1 or unit == "us":
            return f"{_digits(seconds * scale)} {unit}"
    raise AssertionError


def signed_seconds(seconds: float) -> str:
    """A difference: `-1.5 ms`, `+3 us`."""
    return ("-" if seconds < 0 else "+") + seconds_text(abs(seconds))


def bytes_text(nbytes: float) -> str:
    """`512 B`, `1.5 MiB`."""
    power = 0 if abs(nbytes) < 1 else min(4, int(math.log(abs(nbytes), 1024)))
    return f"{_digits(nbytes / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent and without idle zeros."""
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text
