"""How numbers are written, on the page, in the charts and in the terminal."""

from hybridize.report.measures import Score

EN_DASH = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"
TIMES = "\N{MULTIPLICATION SIGN}"


def percent(share: float | None) -> str:
    """`0.8571` as `85.7 %`, with a space that does not break; a dash for nothing."""
    return EN_DASH if share is None else f"{100 * share:.1f}{NBSP}%"


def interval(score: Score) -> str:
    """The 95% interval as `52.1-66.4 %`."""
    return f"{100 * score.low:.1f}{EN_DASH}{percent(score.high)}"


def times(ratio: float | None) -> str:
    """`1.817` as `1.82 x`; a dash for nothing."""
    return EN_DASH if ratio is None else f"{ratio:.2f}{NBSP}{TIMES}"


def number(value: float | int | None) -> str:
    """A count with thousands set apart, a measurement to at least four digits, a dash for nothing."""
    if value is None:
        return EN_DASH
    if isinstance(value, float) and 999.95 <= abs(value) < 1e15:
        value = round(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}"


def short_count(value: float) -> str:
    """`131072` as `131k`, for axes; powers of ten."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)}{suffix}"
    return _three_digits(value)


def token_count(value: float) -> str:
    """`55900000000` as `55.9B tokens`, as papers write it."""
    return f"{short_count(value).replace('G', 'B')}{NBSP}tokens"


def short_bytes(value: float) -> str:
    """`1048576` as `1 MiB`; powers of two."""
    for exponent, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 2**exponent:
            return f"{_three_digits(value / 2**exponent)} {suffix}"
    return f"{_three_digits(value)} B"


def _three_digits(value: float) -> str:
    """Three significant digits, more where the number is longer, and no exponent for a large one."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`4210` as `1 h 10 min`; the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def listing(layers: tuple[int, ...]) -> str:
    """`layers 1, 3, 8`, ascending."""
    if not layers:
        return "no layer"
    return ("layers " if len(layers) > 1 else "layer ") + ", ".join(str(layer) for layer in sorted(layers))


def and_list(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
