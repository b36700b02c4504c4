"""Puts several modules into one file."""

import ast
from collections.abc import Sequence


def join_modules(texts: Sequence[str], names: Sequence[str]) -> str:
    """The modules' code one after the other, under the first one's docstring and everybody's imports.

    texts: of flat files, each with a docstring at its top and all imports before the rest; a later one may import
    from those before it. names: what they are called. Raises ValueError where two define one private name.
    """
    beside = {f".{name}" for name in names}
    parts = [_parts(text) for text in texts]
    imports = dict.fromkeys(
        ast.unparse(node) for _, nodes, _ in parts for node in nodes if f".{_source(node)}" not in beside
    )
    defined: set[str] = set()
    for _, _, rest in parts:
        own = {node.name for node in ast.parse(rest).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        if twice := defined & own:
            raise ValueError(f"two definitions of {', '.join(sorted(twice))} in {', '.join(names)}")
        defined |= own
    head = parts[0][0]
    return "\n".join([head, *imports, "", "", "\n\n\n".join(rest.strip() for _, _, rest in parts)]) + "\n"


def _source(node: ast.stmt) -> str | None:
    """What a relative import names."""
    return node.module if isinstance(node, ast.ImportFrom) and node.level else None


def _parts(text: str) -> tuple[str, list[ast.stmt], str]:
    """What stands before the imports, the imports, and what follows them."""
    body = ast.parse(text).body
    places = [i for i, node in enumerate(body) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports, lines = body[places[0] : places[-1] + 1], text.splitlines()
    if len(imports) != len(places):
        raise ValueError(f"something stands between the imports: {ast.unparse(imports[0])} ...")
    return "\n".join(lines[: imports[0].lineno - 1]), imports, "\n".join(lines[imports[-1].end_lineno :])
