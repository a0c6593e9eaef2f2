"""What a user's function refers to, in a form that can be compared later and hashed into a key.

A kernel freezes what its rule read when it was traced: globals, enclosed variables, attributes of modules and classes,
the functions that it calls. The bytecode says which these are. Numbers and containers of them are taken by value,
functions by their code and what they refer to in turn, those of torch and Python by name.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABCMeta
from collections.abc import Iterable
from contextlib import suppress
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import torch

Form = tuple[Any, ...]  # nested tuples of strings

_ATOMS = {bool, int, float, complex, str, bytes, type(None), type(...), slice}
_ATOMS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_CONTAINERS = {tuple, list, dict, set, frozenset}
_LARGEST = 64  # elements of a container, because it is read again in every step
_LIBRARIES = {"torch", "builtins", "math", "cmath", "operator", "_operator", "_functools", "itertools"}
# What these return depends on more than their arguments, or is more than a value.
_IMPURE = {"compile", "eval", "exec", "globals", "hash", "id", "input", "locals", "open", "vars", "__import__"}
_PLAIN_LOOKUP: tuple[Any, ...] = (object.__getattribute__, SimpleNamespace.__getattribute__)
_MISSING = object()


class UnknownReferenceError(Exception):
    """A function refers to what it may find changed without anybody noticing; the message names it."""


def is_own(function: Any) -> bool:
    """Whether this is a function of the package, which no user can make refer to anything."""
    if not isinstance(function, FunctionType) or function.__closure__:
        return False
    return is_of_package(function.__globals__.get("__name__"))


def is_of_package(module: Any) -> bool:
    """Whether a module of this name is one of the package's."""
    return str(module).startswith("compiled_optim.")


def references(function: Any) -> Form:
    """A function and what it refers to. If two forms are equal, both functions do the same.

    Raises:
        UnknownReferenceError: for objects, for functions of other libraries, for what a function imports or assigns.
    """
    return _form(function, {})


def all_references(functions: Iterable[Any]) -> Form | None:
    """The `references` of those functions that are not the package's own; None if all are.

    Raises:
        UnknownReferenceError: as `references`.
    """
    return tuple([references(function) for function in functions if not is_own(function)]) or None


def refer_to(functions: Iterable[Any], form: Form) -> bool:
    """Whether `all_references` are still these."""
    try:
        return all_references(functions) == form
    except UnknownReferenceError:
        return False


def _form(value: Any, seen: dict[Any, str]) -> Form:
    kind = type(value)
    if kind in _ATOMS:
        return kind.__name__, repr(value)
    if kind is FunctionType:
        return _function(value, seen)
    if kind is MethodType and isinstance(value.__func__, FunctionType):
        return _function(value.__func__, seen, value.__self__)
    name = _library_name(value)
    if name:
        return "name", name
    if isinstance(value, type) and is_of_package(value.__module__):
        return "name", f"{value.__module__}.{value.__qualname__}"
    if kind is functools.partial and not vars(value):
        return "partial", *(_form(part, seen) for part in (value.func, value.args, value.keywords))
    if kind not in _CONTAINERS:
        raise UnknownReferenceError(f"which is a {kind.__name__}")
    if len(value) > _LARGEST:
        raise UnknownReferenceError(f"which is a {kind.__name__} of more than {_LARGEST} values")
    if kind in (list, dict):  # they may contain themselves
        if id(value) in seen:
            return "again", seen[id(value)]
        seen[id(value)] = str(len(seen))
    parts = [_form(part, seen) for part in (value.items() if kind is dict else value)]
    return kind.__name__, *(sorted(parts, key=repr) if kind in (set, frozenset) else parts)


def _library_name(value: Any) -> str:
    """The name of what torch and Python define, or an empty string."""
    if isinstance(value, torch.no_grad | torch.enable_grad):  # found in a function that they decorate
        value = type(value)
    if isinstance(value, FunctionType):
        module = None if value.__closure__ else value.__globals__.get("__name__")
    elif isinstance(value, MethodDescriptorType):
        module = value.__objclass__.__module__
    elif isinstance(value, BuiltinFunctionType | type):
        # a bound method depends on its object
        bound = getattr(value, "__self__", None) if isinstance(value, BuiltinFunctionType) else None
        module = value.__module__ if bound is None or isinstance(bound, ModuleType | type) else None
    else:
        return ""
    name = value.__name__
    stateful = name in _IMPURE or name.startswith(("get_", "are_", "rand", "seed")) or name.endswith("_enabled")
    if str(module).split(".")[0] not in _LIBRARIES or stateful:
        return ""
    return f"{module}.{value.__qualname__}"


def _function(function: Any, seen: dict[Any, str], *bound: Any) -> Form:
    """``bound``: its first argument, if that is known."""
    if not bound:
        name = _library_name(function)
        if name:
            return "name", name
    key = (id(function), *map(id, bound))
    if key in seen:
        return "again", seen[key]
    seen[key] = str(len(seen))
    code = _analyse(function.__code__)
    if code.problem:
        raise UnknownReferenceError(code.problem)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    parts: list[Form] = []
    for where, name, *attributes in code.reads:
        if where == "argument" and not bound:
            continue
        value: Any = _MISSING
        if where == "argument":
            value = bound[0]
        elif where == "cell":
            with suppress(ValueError):  # the variable may have no value yet
                value = cells[name].cell_contents
        else:
            value = function.__globals__.get(name, function.__builtins__.get(name, _MISSING))
        try:
            for attribute in attributes:
                if type(value) in _ATOMS or type(value) in _CONTAINERS or _library_name(value):
                    break  # its attributes follow from the value
                value = _attribute(value, attribute)
            parts.append(("missing",) if value is _MISSING else _form(value, seen))
        except UnknownReferenceError as error:
            text = str(error)
            raise UnknownReferenceError(
                f"{'.'.join((name, *attributes))}, {text}" if text.startswith("which") else text
            ) from None
    defaults = (function.__defaults__, function.__kwdefaults__)
    return "function", code.digest, *(_form(value, seen) for value in defaults), *parts


def _attribute(owner: Any, name: str) -> Any:
    """``owner.name``, where to read it is to look it up."""
    kind = type(owner)
    if kind is ModuleType:
        if name not in vars(owner) and "__getattr__" in vars(owner):
            raise UnknownReferenceError(f"which {owner.__name__} computes")
        return vars(owner).get(name, _MISSING)
    is_class = isinstance(owner, type)
    plain = kind in (type, ABCMeta) if is_class else kind.__getattribute__ in _PLAIN_LOOKUP
    if not plain or hasattr(kind, "__getattr__"):
        raise UnknownReferenceError(f"which is read of a {kind.__name__}")
    found = next((vars(c)[name] for c in (owner if is_class else kind).__mro__ if name in vars(c)), _MISSING)
    if not is_class:
        if isinstance(found, MemberDescriptorType):  # a slot
            return getattr(owner, name, _MISSING)
        if not hasattr(type(found), "__set__"):
            own = getattr(owner, "__dict__", {})
            if name in own:
                return own[name]
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, classmethod):
        return MethodType(found.__func__, owner if is_class else kind)
    if isinstance(found, FunctionType):
        return found if is_class else MethodType(found, owner)
    if hasattr(type(found), "__get__"):
        raise UnknownReferenceError("which is computed when it is read")
    return found


class _Code(NamedTuple):
    """``reads``: where a name is looked up ("global", "cell" or "argument"), the name, and attributes of that.

    ``problem``: why that is not all.
    """

    digest: str
    reads: tuple[tuple[str, ...], ...]
    problem: str


@functools.lru_cache(maxsize=256)
def _analyse(code: CodeType) -> _Code:
    import dis  # not at the top, because a warm start reads no bytecode

    inner = [_analyse(c) for c in code.co_consts if isinstance(c, CodeType)]
    problem = next((c.problem for c in inner if c.problem), "")
    first = code.co_varnames[0] if code.co_argcount else None
    reads: list[list[str]] = [list(read) for c in inner for read in c.reads if read[0] == "global"]
    cells = [read for c in inner for read in c.reads if read[0] == "cell"]
    reads += [list(read) for read in cells if read[1] in code.co_freevars]
    if first in code.co_cellvars:
        reads.append(["argument", str(first)])
    extended: list[str] | None = None  # what the instruction before has read
    for instruction in dis.get_instructions(code):
        name, argument = instruction.opname, instruction.argval
        if name == "EXTENDED_ARG":
            continue
        if extended and name in ("LOAD_ATTR", "LOAD_METHOD") and not instruction.is_jump_target:
            extended.append(argument)
            continue
        extended = None
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            extended = ["global", argument]
        elif name.startswith("LOAD") and "DEREF" in name and argument in code.co_freevars:
            extended = ["cell", argument]
        elif "LOAD_FAST" in name and first in (argument if isinstance(argument, tuple) else (argument,)):
            extended = ["argument", str(first)]
        elif name in ("IMPORT_NAME", "LOAD_BUILD_CLASS", "STORE_GLOBAL", "DELETE_GLOBAL"):
            problem = problem or f"what {code.co_name} imports, defines or assigns"
        elif name in ("STORE_DEREF", "DELETE_DEREF") and argument in code.co_freevars:
            problem = problem or f"{argument}, which {code.co_name} assigns"
        if extended:
            reads.append(extended)
    constants = [_form(c, {}) for c in code.co_consts if not isinstance(c, CodeType)]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    handlers = getattr(code, "co_exceptiontable", b"")  # since Python 3.11
    content = (code.co_code, handlers, constants, [c.digest for c in inner], names, counts)
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    return _Code(digest, tuple(dict.fromkeys(map(tuple, reads))), problem)
