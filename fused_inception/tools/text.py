"""Text for terminals."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], names: int = 1) -> list[str]:
    """Columns of equal width; the first `names` start left, numbers end right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def rate(per_second: float) -> str:
    """Whole where it is large, else three significant digits."""
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"
