"""One fault in one function, described by a change of its syntax tree."""

import ast
import copy
from dataclasses import dataclass
from pathlib import Path


class DoesNotApply(Exception):
    """The function, or the code to replace in it, is not there: the catalogue must follow the code."""


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that should see it.

    Attributes:
        fault: what goes wrong, in words; unique.
        file: path from the root of the repository.
        function: qualified name, `Class.method`; "" for the module's own statements and class bodies.
        old: expression or statements of the function as Python; layout and comments do not count. It must be there
            exactly once.
        new: what stands there instead.
        tests: file of the tests that should fail.
        words: which of them, as pytest's -k takes it.
    """

    fault: str
    file: str
    function: str
    old: str
    new: str
    tests: str
    words: str

    def applied(self, source: str) -> str:
        """The source of the file with the fault in it.

        Raises:
            DoesNotApply: see there.
        """
        tree = ast.parse(source)
        scope = _function(tree, self.function) if self.function else tree
        if scope is None:
            raise DoesNotApply(f"{self.file} has no function {self.function} ({self.fault})")
        old, new = _code(self.old), _code(self.new)
        found = _expressions(scope, old) if isinstance(old, ast.expr) else _statements(scope, old)
        if len(found) != 1:
            raise DoesNotApply(
                f"{self.file}, {self.function or 'module'}: `{self.old}` is there {len(found)} times ({self.fault})"
            )
        if isinstance(old, ast.expr) and not isinstance(new, ast.expr):
            raise DoesNotApply(f"`{self.new}` is not an expression ({self.fault})")
        if isinstance(old, list) and isinstance(new, ast.expr):
            new = [ast.Expr(new)]
        place, name, index = found[0]
        value = getattr(place, name)
        if isinstance(old, ast.expr):
            if index is None:
                setattr(place, name, new)
            else:
                value[index] = new
        else:
            value[index : index + len(old)] = new
        changed = ast.unparse(ast.fix_missing_locations(tree))
        if changed == ast.unparse(ast.parse(source)):
            raise DoesNotApply(f"`{self.old}` becomes what it was ({self.fault})")
        return changed + "\n"

    def apply_to(self, root: Path) -> None:
        """Put the fault into the file below a root."""
        path = root / self.file
        if not path.is_file():
            raise DoesNotApply(f"{self.file} does not exist ({self.fault})")
        path.write_text(self.applied(path.read_text()))


def _code(text: str) -> ast.expr | list[ast.stmt]:
    body = ast.parse(text).body
    if len(body) == 1 and isinstance(body[0], ast.Expr):
        return body[0].value
    return copy.deepcopy(body)


def _function(tree: ast.Module, name: str) -> ast.AST | None:
    scope: ast.AST = tree
    for part in name.split("."):
        inside = (n for n in ast.walk(scope) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part)
        scope = next((n for n in inside if n is not scope), None)  # type: ignore[assignment]
        if scope is None:
            return None
    return scope


def _same(one: ast.AST, other: ast.AST) -> bool:
    return type(one) is type(other) and ast.dump(one) == ast.dump(other)


Place = tuple[ast.AST, str, int | None]  # the node that holds it, the name of its field, the index in that field


def _expressions(scope: ast.AST, old: ast.expr) -> list[Place]:
    found: list[Place] = []
    for node in ast.walk(scope):
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.AST) and _same(value, old):
                found.append((node, name, None))
            elif isinstance(value, list):
                found += [(node, name, i) for i, v in enumerate(value) if isinstance(v, ast.AST) and _same(v, old)]
    return found


def _statements(scope: ast.AST, old: list[ast.stmt]) -> list[Place]:
    found: list[Place] = []
    for node in ast.walk(scope):
        for name, value in ast.iter_fields(node):
            if not isinstance(value, list):
                continue
            for i in range(len(value) - len(old) + 1):
                if all(isinstance(v, ast.AST) and _same(v, o) for v, o in zip(value[i:], old, strict=False)):
                    found.append((node, name, i))
    return found
