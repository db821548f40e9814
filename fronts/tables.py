"""tables.py - tables of text: one function, used by every script that prints one."""


def table(columns):
    """columns: {head: cells}, cells being texts, all columns of one length -> the table, a line per row under its head.

    The first column is aligned on the left, the others on the right; each is as wide as its widest text.
    """
    texts = [[head, *cells] for head, cells in columns.items()]
    widths = [max(map(len, column)) for column in texts]
    lines = ["  ".join(text.ljust(w) if j == 0 else text.rjust(w) for j, (text, w) in enumerate(zip(line, widths)))
             for line in zip(*texts)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def shown(values, form):
    """Numbers as texts in a format like ".3f"; a dash for each None."""
    return ["-" if x is None else format(x, form) for x in values]


def plus_minus(values, errors, form):
    """Numbers with their standard errors as texts: "0.52 ± 0.03"."""
    return [f"{x:{form}} ± {se:{form}}" for x, se in zip(values, errors)]
