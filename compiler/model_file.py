"""Finding a model and its inputs in what the user names.

    found = load("model.py")                    # or "package.module:attribute"
    found.model, found.args, found.kwargs       # a LoadedModel
    found.run()                                 # a Script: it calls torch.compile(..., backend="aicc") itself

A file may define (the first that is there counts):
1. `model`, and `example_inputs` or `inputs`: a tensor, a tuple of arguments, a dict of keyword arguments, or a function that returns these;
2. a class `Model`, and `get_inputs()` and optionally `get_init_inputs()` (the arguments of the constructor), in the file or in the class;
3. a call of torch.compile with backend="aicc": then it is a script.
`more_inputs`, a list of such arguments, gives further calls for `aicc explain`: other sizes and types, to see what compiles again.
Files run with their folder on sys.path, as `python model.py` would have it.
"""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .errors import UserError

__all__ = ["EXAMPLE", "LoadedModel", "Script", "defined_names", "load", "namespace"]

EXAMPLE = '''\
    import torch
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 10))
    example_inputs = (torch.randn(8, 64),)
    # or: class Model(torch.nn.Module), with get_inputs() -> [...] and optionally get_init_inputs() -> [...]
    # or: torch.compile(model, backend="aicc")(*example_inputs), anywhere in the file'''

_INPUTS = ("example_inputs", "inputs")


@dataclass(frozen=True)
class LoadedModel:
    """A module or function, and the arguments to call it with."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    more: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Script:
    """A file that compiles something itself."""

    name: str
    path: Path

    def run(self) -> None:
        """Runs the file as `python FILE` would. UserError with file and line if it fails."""
        saved_argv, saved_path = sys.argv, list(sys.path)
        sys.argv = [str(self.path)]
        sys.path.insert(0, str(self.path.parent.resolve()))
        try:
            runpy.run_path(str(self.path), run_name="__main__")
        except SystemExit as e:
            if e.code not in (None, 0):
                raise UserError(f"{self.path} ended with exit code {e.code}") from e
        except Exception as e:
            raise UserError(_failure(self.path, e)) from e
        finally:
            sys.argv, sys.path[:] = saved_argv, saved_path


def load(spec: str) -> LoadedModel | Script:
    """The model that `spec` names; see the module docstring. UserError says what was looked for."""
    path = Path(spec)
    module_name, colon, attribute = spec.rpartition(":")
    if colon and not path.exists() and not module_name.endswith(".py"):
        return _from_attribute(spec, module_name, attribute)
    if colon and module_name.endswith(".py") and not path.exists():
        return _from_namespace(spec, vars(_execute(Path(module_name), _read(Path(module_name)))), attribute)
    tree = _read(path)
    defined = _top_level_names(tree)
    if not _says_model(defined) and _compiles_with_aicc(tree):
        return Script(path.stem, path)
    return _from_namespace(str(path), vars(_execute(path, tree)))


# -- files

def defined_names(path: Path) -> set[str]:
    """What a Python file binds at its top level, without running it. UserError if it cannot be read."""
    return _top_level_names(_read(path))


def namespace(path: Path) -> dict[str, Any]:
    """Runs a Python file and returns its names. UserError with file and line if it fails."""
    return vars(_execute(path, _read(path)))


def _read(path: Path) -> ast.Module:
    try:
        source = path.read_text()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.py"))[:8] if path.parent.is_dir() else []
        hint = f"; {path.parent}/ has {', '.join(near)}" if near else ""
        raise UserError(f"no file '{path}'{hint}. Give a Python file, or package.module:attribute") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"'{path}' cannot be read: {getattr(e, 'strerror', None) or e}") from e
    try:
        return ast.parse(source, filename=str(path))
    except SyntaxError as e:
        line = (e.text or "").rstrip("\n")
        indent = len(line) - len(line.lstrip())
        caret = " " * max(0, (e.offset or 1) - 1 - indent) + "^"
        raise UserError(f"{path}:{e.lineno}:{e.offset}: {e.msg}\n    {line.strip()}\n    {caret}") from e
    except ValueError as e:  # null bytes
        raise UserError(f"'{path}' is not Python source: {e}") from e


def _execute(path: Path, tree: ast.Module) -> ModuleType:
    """Runs the file as a module (not as __main__), which stays in sys.modules: classes in it can then be pickled and inspected."""
    module = ModuleType(f"aicc_model_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        exec(compile(tree, str(path), "exec"), vars(module))
    except SystemExit as e:
        raise UserError(f"{path} ended the process (exit code {e.code}) before it defined a model") from e
    except Exception as e:
        raise UserError(_failure(path, e)) from e
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _failure(path: Path, error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    where = f"{path}:{frames[-1].lineno}" if frames else str(path)
    line = f"\n    {frames[-1].line}" if frames and frames[-1].line else ""
    return f"{where}: {type(error).__name__}: {error}{line}"


def _top_level_names(tree: ast.Module) -> set[str]:
    """What the file binds outside of functions and classes; conditional and loop bodies count."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.split(".")[0])
        if not _is_main_guard(node):
            pending.extend(ast.iter_child_nodes(node))
    return names


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))


def _says_model(names: set[str]) -> bool:
    return ("model" in names and any(n in names for n in _INPUTS)) or "Model" in names


def _compiles_with_aicc(tree: ast.Module) -> bool:
    return any(isinstance(n, ast.Call) and any(k.arg == "backend" and isinstance(k.value, ast.Constant) and k.value.value == "aicc"
                                               for k in n.keywords) for n in ast.walk(tree))


# -- names

def _from_attribute(spec: str, module_name: str, attribute: str) -> LoadedModel:
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise UserError(f"no module '{e.name}' (looking for '{spec}'); it is searched from the current folder and what is installed") from e
    except Exception as e:
        raise UserError(f"importing '{module_name}' failed: {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove("")
    return _from_namespace(spec, vars(module), attribute)


def _from_namespace(where: str, names: Mapping[str, Any], attribute: str = "") -> LoadedModel:
    if attribute:
        if attribute not in names:
            public = [n for n, v in names.items() if callable(v) and not n.startswith("_")]
            raise UserError(f"'{where}': there is no '{attribute}'; callables there: {', '.join(public[:12]) or 'none'}")
        found = names[attribute]
        if isinstance(found, tuple) and len(found) == 2 and callable(found[0]):
            return LoadedModel(attribute, found[0], *_arguments(where, found[1]))
    else:
        found = names.get("model", names.get("Model"))
    name = attribute or Path(where).stem
    key = next((n for n in _INPUTS if n in names), None)
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        make_inputs = getattr(found, "get_inputs", None) or names.get("get_inputs")
        if make_inputs is not None or key is not None:
            args, kwargs = _arguments(where, getattr(found, "get_init_inputs", None) or names.get("get_init_inputs") or ())
            found = _construct(where, found, args, kwargs)
            return LoadedModel(name, found, *_arguments(where, make_inputs if make_inputs is not None else names[str(key)]), _more(where, names))
    elif callable(found):
        if key is None and callable(names.get("get_inputs")):
            return LoadedModel(name, found, *_arguments(where, names["get_inputs"]), _more(where, names))
        if key is not None:
            return LoadedModel(name, found, *_arguments(where, names[key]), _more(where, names))
    raise UserError(_nothing_found(where, names, attribute))


def _construct(where: str, cls: type[torch.nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.nn.Module:
    try:
        return cls(*args, **kwargs)
    except TypeError as e:
        raise UserError(f"{where}: {cls.__name__} cannot be constructed from get_init_inputs(): {e}") from e
    except Exception as e:
        raise UserError(f"constructing {cls.__name__} failed: {_failure(Path(where), e)}") from e


def _arguments(where: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if callable(value) and not isinstance(value, torch.Tensor):
        try:
            value = value()
        except Exception as e:
            raise UserError(f"the function that makes the inputs failed: {_failure(Path(where), e)}") from e
    if isinstance(value, torch.Tensor):
        return (value,), {}
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(value), {}
    raise UserError(f"{where}: the inputs must be a tensor, a tuple or list of arguments, or a dict of keyword arguments; "
                    f"got {type(value).__name__}")


def _more(where: str, names: Mapping[str, Any]) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]:
    calls = names.get("more_inputs", ())
    if not isinstance(calls, (list, tuple)):
        raise UserError(f"{where}: `more_inputs` must be a list with the arguments of one call per entry; got {type(calls).__name__}")
    return tuple(_arguments(where, call) for call in calls)


def _nothing_found(where: str, names: Mapping[str, Any], attribute: str) -> str:
    has = [n for n in ("model", "Model", "get_inputs", "get_init_inputs", *_INPUTS) if n in names]
    if attribute:
        return (f"'{where}': found {attribute} ({type(names[attribute]).__name__}), but a callable was wanted, and beside it `example_inputs`, "
                f"`inputs` or `get_inputs()`. For example:\n{EXAMPLE}")
    return (f"{where} defines no model with inputs (it has {', '.join(has) or 'none of these names'}). Looked for\n"
            f"  - `model`, and `example_inputs` or `inputs`;\n"
            f"  - a class `Model`, and `get_inputs()` and optionally `get_init_inputs()`;\n"
            f"  - a call of torch.compile(..., backend=\"aicc\").\n"
            f"For example:\n{EXAMPLE}")
