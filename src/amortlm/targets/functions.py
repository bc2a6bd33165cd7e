"""Functions that a target calls: by what name one is saved, who may say that it is imported, how it is called.

To import a function is to run code. So a posterior or a run file that names one, "my_package.rules:is_polite", is a
reference: `Trust` says which modules the user allows. Functions that ship have a fixed name and need none.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from amortlm.errors import ConfigError, RewardError

SHIPPED = {"numbers.is_valid": ("amortlm.lab.tasks.numbers", "is_valid")}
NAMES = {f"{module}:{name}": fixed for fixed, (module, name) in SHIPPED.items()}
NAMES["amortlm.tasks.numbers:is_valid"] = (
    "numbers.is_valid"  # as it was saved before functions had fixed names
)
REFERENCE = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")
WRITE = "write 'package.module:function'"


class Function(NamedTuple):
    """A function and the reference that finds it again: None for a lambda, a local function, one of `__main__`."""

    call: Callable[..., Any]
    reference: str | None


@dataclass(frozen=True)
class Trust:
    """Modules whose functions a saved target may name: whoever trusts a module lets all of it run.

    modules   names, each with what lies below it, or paths of .py files
    beside    a folder whose .py files count, too
    """

    modules: Sequence[str | Path] = ()
    beside: Path | None = None

    def __post_init__(self) -> None:
        listed = not isinstance(self.modules, str) and isinstance(self.modules, Iterable)
        if not listed or not all(isinstance(m, str | Path) for m in self.modules):
            raise ConfigError(f"trust is a list of module names or .py files, [{self.modules!r}]")
        object.__setattr__(self, "modules", tuple(map(str, self.modules)))
        missing = [m for m in self.modules if str(m).endswith(".py") and not Path(m).is_file()]
        if missing:
            raise ConfigError(f"trust: there is no file {missing[0]}")

    def file(self, module: str) -> str | None:
        """The .py file that a module name stands for here."""
        named = [str(m) for m in self.modules if Path(m).name == f"{module}.py"]
        if self.beside is not None and "." not in module and (self.beside / f"{module}.py").is_file():
            named.append(str(self.beside / f"{module}.py"))
        return named[0] if named else None

    def covers(self, module: str) -> bool:
        return any(module == m or module.startswith(f"{m}.") for m in self.modules)

    def find(self, reference: Any) -> Function:
        """The function. Raises ConfigError, before anything is imported, for one in a module that is not trusted."""
        shipped = SHIPPED.get(NAMES.get(str(reference), str(reference)))
        if shipped is not None:
            module, name = shipped
            return Function(getattr(importlib.import_module(module), name), NAMES[f"{module}:{name}"])
        parts = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        if parts is None:
            raise ConfigError(
                f"function {reference!r}: {WRITE}, or a name of those that ship: {', '.join(SHIPPED)}"
            )
        module, name = parts.groups()
        file = self.file(module)
        if is_standard(module):
            raise ConfigError(
                f"function {reference!r}: no function of Python's standard library is taken from a file; write one of "
                "your own that calls it, in a module with another name"
            )
        if file is None and not self.covers(module):
            raise ConfigError(
                f"function {reference!r} is not imported, for that runs the code of {module!r}. If you trust it, say "
                f"so: trust=[{module!r}] in Python, --trust {module} on the command line (--trust "
                f"FOLDER/{module.split('.')[-1]}.py for a file). Or, in Python, pass target= to from_pretrained"
            )
        return Function(self._defined(_import(reference, module, file), name, reference), reference)

    def _defined(self, module: ModuleType, name: str, reference: str) -> Callable[..., Any]:
        """The function of that name, unless the module only imported it from one that is not trusted."""
        found = getattr(module, name, None)
        if not callable(found):
            raise ConfigError(f"cannot import {reference!r} (no function {name!r} there); {WRITE}")
        home = getattr(found, "__module__", None)
        if home != module.__name__ and not (
            isinstance(home, str) and not is_standard(home) and self.covers(home)
        ):
            raise ConfigError(
                f"function {reference!r} is defined elsewhere, in {home!r}: name it where it is defined, and trust that"
            )
        return found


def is_standard(module: str) -> bool:
    return module.split(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names}


def _import(reference: str, module: str, file: str | None) -> ModuleType:
    """The module, from its file if it has one: not through `sys.path`, where it could stand in for another."""
    key = module if file is None else str(Path(file).resolve())
    try:
        if file is None:
            return importlib.import_module(module)
        if key in sys.modules:
            return sys.modules[key]
        spec = importlib.util.spec_from_file_location(key, file)
        assert spec is not None
        assert spec.loader is not None
        found = sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    except (Exception, SystemExit) as e:
        if file is not None:
            sys.modules.pop(key, None)
        raise ConfigError(f"cannot import {reference!r} ({type(e).__name__}: {e}); {WRITE}") from e


def function_of(fn: Callable[..., Any] | Function | str) -> Function:
    """What a user gives in Python: a function, or a reference, which is trusted since it is the user's own."""
    if isinstance(fn, Function):
        return fn
    if isinstance(fn, str):
        return Trust([fn.partition(":")[0]]).find(fn)
    if not callable(fn):
        raise ConfigError(f"{fn!r} is not a function; give one, or {WRITE[6:]}")
    home, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    reference = f"{home}:{name}"
    found = getattr(sys.modules.get(str(home)), name, None)
    if found is not fn or home == "__main__" or is_standard(str(home)) or not REFERENCE.fullmatch(reference):
        return Function(fn, None)
    return Function(fn, NAMES.get(reference, reference))


def references(spec: Any) -> Iterator[str]:
    """The functions that a target's JSON form names, except those that ship."""
    terms = spec if isinstance(spec, list) else []
    for name, arguments in chain.from_iterable(term.items() for term in terms if isinstance(term, dict)):
        found = arguments.get("function") if isinstance(arguments, dict) else arguments
        if name in ("predicate", "verifier") and isinstance(found, str) and found not in {*NAMES, *SHIPPED}:
            yield found
        elif name == "unordered" and isinstance(arguments, dict):
            yield from references(arguments.get("target"))


def require_reference(fn: Function) -> str:
    if fn.reference is None:
        raise ConfigError(
            f"{fn.call!r} cannot be saved by name: define it at the top level of an importable module of your own (not "
            f"__main__, not a lambda), or pass {WRITE[6:]}"
        )
    return fn.reference


def takes_row(fn: Callable[..., Any]) -> bool:
    """Does it take two arguments by position?"""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return sum(p.kind in positional for p in inspect.signature(fn).parameters.values()) >= 2
    except ValueError:  # of C, without a signature
        return False


def check_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not (
        isinstance(timeout, int | float) and 0 < timeout <= threading.TIMEOUT_MAX
    ):
        raise ConfigError(
            f"timeout is a positive number of seconds, or None to wait for ever; got {timeout!r}"
        )
    return timeout


def call(fn: Callable[..., Any], *arguments: Any, timeout: float | None, what: str) -> Any:
    """`fn(*arguments)`. Raises RewardError, which begins with `what`, for one that raises or takes more than `timeout`
    seconds. Then its thread is left alone, not stopped: Python cannot; it ends with the process."""
    try:
        return fn(*arguments) if timeout is None else _in_time(fn, arguments, timeout)
    except _LateError:
        raise RewardError(
            f"{what} did not return within {timeout:g} seconds; mend it, or give it a longer timeout"
        ) from None
    except (Exception, SystemExit) as e:
        raise RewardError(f"{what} raised {type(e).__name__}: {e}") from e


class _LateError(Exception):
    pass


def _in_time(fn: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> Any:
    done: dict[str, Any] = {}

    def work() -> None:
        try:
            with torch.no_grad():
                done["value"] = fn(*arguments)
        except BaseException as e:
            done["error"] = e

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if not done:
        raise _LateError
    if "error" in done:
        raise done["error"]
    return done["value"]
