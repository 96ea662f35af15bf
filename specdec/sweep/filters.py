"""Which settings of a grid to keep, as expressions over their fields: `k <= 4 and drafter == 'model'`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from specdec.errors import InputError
from specdec.sweep.setting import FIELDS, Setting

_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
# No power, and products of numbers only, so that no expression computes for long.
_NUMBERS = (int, float)


class Filter:
    """An expression over the fields of a setting: names, literals, `and or not`, comparisons, `in`, and `+ - * / // %`.

    Nothing else is admitted: no calls, no attributes. Ordering a field that is None (`k <= 4` where nothing is drafted)
    is false. Raises `InputError` for what cannot be read, when it is made, and for what cannot be compared, when used.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._body = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise InputError(f"{text!r} is no expression like k <= 4 and drafter == 'model': {error}") from None
        self._check(self._body)

    def __repr__(self) -> str:
        return f"Filter({self.text!r})"

    def __call__(self, setting: Setting) -> bool:
        return bool(self._value(self._body, setting.as_dict()))

    def _refuse(self, what: str) -> InputError:
        return InputError(f"{self.text!r}: {what}; use fields of a setting, literals, and, or, not, in, ==, <, …")

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            if node.id not in FIELDS:
                raise InputError(f"{self.text!r}: a setting has no {node.id!r}; it has {', '.join(FIELDS)}")
            return
        if isinstance(node, ast.Constant):
            return
        if isinstance(node, (ast.BoolOp, ast.Tuple, ast.List)):
            children: list[ast.expr] = node.values if isinstance(node, ast.BoolOp) else node.elts
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            children = [node.operand]
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            children = [node.left, node.right]
        elif isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
            children = [node.left, *node.comparators]
        else:
            raise self._refuse(f"{type(node).__name__} is not allowed")
        for child in children:
            self._check(child)

    def _value(self, node: ast.AST, fields: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            return fields[node.id]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Tuple, ast.List)):
            return [self._value(child, fields) for child in node.elts]
        if isinstance(node, ast.BoolOp):
            both = isinstance(node.op, ast.And)
            return (all if both else any)(self._value(child, fields) for child in node.values)
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, fields)
            return not value if isinstance(node.op, ast.Not) else self._computed(operator.sub, 0, value)
        if isinstance(node, ast.BinOp):
            left, right = self._value(node.left, fields), self._value(node.right, fields)
            return self._computed(_ARITHMETIC[type(node.op)], left, right)
        assert isinstance(node, ast.Compare)
        return self._compared(node, fields)

    def _computed(self, operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        if left is None or right is None:
            return None
        if not isinstance(left, _NUMBERS) or not isinstance(right, _NUMBERS):
            raise self._refuse(f"{left!r} and {right!r} are not both numbers")
        try:
            return operation(left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise self._refuse(str(error)) from None

    def _compared(self, node: ast.Compare, fields: Mapping[str, Any]) -> bool:
        left = self._value(node.left, fields)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self._value(comparator, fields)
            if isinstance(op, _ORDERS) and (left is None or right is None):
                return False
            try:
                if not _COMPARISONS[type(op)](left, right):
                    return False
            except TypeError:
                raise self._refuse(f"{left!r} and {right!r} cannot be compared so") from None
            left = right
        return True
