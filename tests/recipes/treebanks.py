"""Trees for tests of parsing, made by hand."""


def tree(*words):
    """A sentence in CoNLL-U of (form, tag, head, relation)."""
    lines = [f"{n}\t{w}\t_\t{t}\t{t}\t_\t{h}\t{r}" for n, (w, t, h, r) in enumerate(words, start=1)]
    return "\n".join(lines) + "\n\n"


CROSSING = tree(("a", "X", 3, "dep"), ("b", "X", 4, "dep"), ("c", "X", 0, "root"), ("d", "X", 3, "dep"))
