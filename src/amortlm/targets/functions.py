"""Functions that a target calls: how they are named in saved files, imported and called.

Importing a function runs the code of its module. So a saved posterior or a run file only names the function, as
"my_package.rules:is_polite", and `Trust` holds the modules that the user allows. Functions that ship with amortlm have
fixed names and need no trust.
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

SHIPPED = {
    "dice.log_prob": ("amortlm.lab.tasks.dice", "log_prob"),
    "numbers.is_valid": ("amortlm.lab.tasks.numbers", "is_valid"),
}
NAMES = {f"{module}:{name}": fixed for fixed, (module, name) in SHIPPED.items()}
NAMES["amortlm.tasks.numbers:is_valid"] = (
    "numbers.is_valid"  # the name in files that were saved before functions had fixed names
)
REFERENCE = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")
WRITE = "write 'package.module:function'"


class Function(NamedTuple):
    """A function and the reference by which it can be imported; None for a lambda, a local function, and a function
    of `__main__`."""

    call: Callable[..., Any]
    reference: str | None


@dataclass(frozen=True)
class Trust:
    """Modules whose functions a saved target may name. All code of a trusted module may run.

    modules   names (of a package: with all modules in it), or paths of .py files
    beside    a folder whose .py files are also trusted

    Raises ConfigError for other values and missing files.
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
        """The trusted .py file of a module name, if there is one."""
        named = [str(m) for m in self.modules if Path(m).name == f"{module}.py"]
        if self.beside is not None and "." not in module and (self.beside / f"{module}.py").is_file():
            named.append(str(self.beside / f"{module}.py"))
        return named[0] if named else None

    def covers(self, module: str) -> bool:
        return any(module == m or module.startswith(f"{m}.") for m in self.modules)

    def find(self, reference: Any) -> Function:
        """The function of a reference. Raises ConfigError if it is not trusted, before anything is imported."""
        shipped = SHIPPED.get(NAMES.get(str(reference), str(reference)))
        if shipped is not None:
            module, name = shipped
            return Function(getattr(importlib.import_module(module), name), NAMES[f"{module}:{name}"])
        parts = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        if parts is None:
            raise ConfigError(
                f"function {reference!r}: {WRITE}, or the name of a function of amortlm: {', '.join(SHIPPED)}"
            )
        module, name = parts.groups()
        file = self.file(module)
        if is_standard(module):
            raise ConfigError(
                f"function {reference!r}: functions of Python's standard library cannot be named; write one of your "
                "own that calls it, in a module with another name"
            )
        if file is None and not self.covers(module):
            raise ConfigError(
                f"function {reference!r} is not imported, because that runs the code of {module!r}. If you trust the "
                f"module, give trust=[{module!r}] in Python, --trust {module} on the command line (--trust "
                f"FOLDER/{module.split('.')[-1]}.py for a file). Or, in Python, pass target= to from_pretrained"
            )
        return Function(self._defined(_import(reference, module, file), name, reference), reference)

    def _defined(self, module: ModuleType, name: str, reference: str) -> Callable[..., Any]:
        """The function of that name in a module. Raises ConfigError if the module imported it from a module that is
        not trusted."""
        found = getattr(module, name, None)
        if not callable(found):
            raise ConfigError(f"cannot import {reference!r} (no function {name!r} there); {WRITE}")
        home = getattr(found, "__module__", None)
        if home != module.__name__ and not (
            isinstance(home, str) and not is_standard(home) and self.covers(home)
        ):
            raise ConfigError(
                f"function {reference!r} is defined in another module, {home!r}: name it there, and trust that module"
            )
        return found


def is_standard(module: str) -> bool:
    return module.split(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names}


def _import(reference: str, module: str, file: str | None) -> ModuleType:
    """Import a module. A module with a file does not go through `sys.path`, where it could shadow another module."""
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
    """The function that a user gives in Python, directly or by a reference; the reference is then trusted. Raises
    ConfigError if it is neither."""
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
    """The references in a target's JSON form, except those to functions of amortlm."""
    terms = spec if isinstance(spec, list) else []
    for name, arguments in chain.from_iterable(term.items() for term in terms if isinstance(term, dict)):
        found = arguments.get("function") if isinstance(arguments, dict) else arguments
        if (
            name in ("predicate", "relation", "verifier")
            and isinstance(found, str)
            and found not in {*NAMES, *SHIPPED}
        ):
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
    """Does the function take two positional arguments?"""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return sum(p.kind in positional for p in inspect.signature(fn).parameters.values()) >= 2
    except ValueError:  # a C function without a signature
        return False


def check_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not (
        isinstance(timeout, int | float) and 0 < timeout <= threading.TIMEOUT_MAX
    ):
        raise ConfigError(f"timeout is a positive number of seconds, or None for no limit; got {timeout!r}")
    return timeout


def call(fn: Callable[..., Any], *arguments: Any, timeout: float | None, what: str) -> Any:
    """`fn(*arguments)`. Raises RewardError, whose message begins with `what`, if fn raises an error or takes more than
    `timeout` seconds. Python cannot stop the thread of a late call: it continues until fn returns or the process
    ends."""
    try:
        return fn(*arguments) if timeout is None else _in_time(fn, arguments, timeout)
    except _LateError:
        raise RewardError(
            f"{what} did not return within {timeout:g} seconds; make it faster, or give it a longer timeout"
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


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def name_of(fn: Callable[..., Any]) -> str:
    """The same in every process, unlike repr(fn)."""
    return getattr(fn, "__qualname__", type(fn).__name__)
