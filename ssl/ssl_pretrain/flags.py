"""Command-line flags (and YAML keys) from frozen dataclasses: a field is a flag, the string below it is its help.

A field may be stored under an older name: `field(default=..., metadata={"stored_as": "old_name"})`. That name stays the
key in files, and is an alias of the flag.

Supported types: str, int, float, bool, pathlib.Path, Literal, tuples of these, unions, and any of them `| None`. Built
on argparse, so that `--help` and a mistyped flag are answered in a tenth of a second and in one line (docs/design.md).
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import UserError, nearest


def parse(
    kinds: Sequence[type],
    argv: Sequence[str],
    defaults: Mapping[str, Any],
    *,
    prog: str,
    description: str,
    epilog: str = "",
    common: Sequence[str] = (),
    decided: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    elsewhere: Callable[[str], str] | None = None,
) -> list[Any]:
    """One instance of each dataclass in `kinds`, filled from `argv`, else `defaults` (by field name), else its defaults.

    For `--help`: common: the fields that it shows first; decided: gives, for these instances, the values that fields with
    the default None will get, as far as they are known. A field's metadata "default" says in words what None means.
    elsewhere: what to say of an unknown flag ("--name") that other commands have, to append to the message; else "".

    `--help` prints every flag and leaves with 0. Raises UserError for an unknown flag (naming the nearest), a value
    that does not fit, a missing required flag, or an unknown key or unfit value in `defaults`.
    """
    known = {f.name: f for kind in kinds for f in dataclasses.fields(kind)}
    if len(known) != sum(len(dataclasses.fields(kind)) for kind in kinds):
        raise TypeError(f"two of {[k.__qualname__ for k in kinds]} have a field of the same name")
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    by_stored_name = {stored_name(f): name for name, f in known.items()}
    defaults = {by_stored_name.get(name, name): value for name, value in defaults.items()}
    for name, value in defaults.items():
        if name not in known:
            raise UserError(f"unknown key {name!r}{nearest(name, known)}")
        try:
            check(value, hints[name])
        except ValueError as problem:
            raise UserError(f"{name}: {problem}") from None

    known_values: Mapping[str, Any] = {}
    if decided is not None and {"-h", "--help"} & set(argv):
        with contextlib.suppress(UserError):  # of the other words: help is shown for them, too
            words = [word for word in argv if word not in ("-h", "--help")]
            known_values = decided(parse(kinds, words, defaults, prog=prog, description=description))
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=prog, help="show the version and exit")  # run_command's
    groups = {kind: parser.add_argument_group(_title(kind)) for kind in (None, *kinds)}
    fields = [(kind, f) for kind in kinds for f in dataclasses.fields(kind)]
    fields.sort(key=lambda each: common.index(each[1].name) if each[1].name in common else len(common))
    for kind, f in fields:
        default = defaults.get(f.name, _default(f))
        groups[None if f.name in common else kind].add_argument(
            *dict.fromkeys("--" + each.replace("_", "-") for each in (f.name, stored_name(f))),
            default=argparse.SUPPRESS,
            help=_help(docs(kind).get(f.name, ""), f, default, known_values.get(f.name)).replace("%", "%%"),
            **_argument(hints[f.name]),
        )
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        names = dict.fromkeys((*known, *by_stored_name, "help", "version"))
        flags = ["--" + name.replace("_", "-") for name in names]
        first = next((word for word in unknown if word.startswith("-")), None)
        if first is None:
            raise UserError(f"{prog}: unexpected {unknown[0]!r}: every option is a flag (--name value)")
        word = first.split("=")[0]
        raise UserError(f"{prog}: unknown flag {word}{(elsewhere(word) if elsewhere else '') or nearest(word, flags)}")

    given = {**defaults, **vars(namespace)}
    result = []
    for kind in kinds:
        values = {}
        for f in dataclasses.fields(kind):
            if f.name in given:
                values[f.name] = _tupled(given[f.name], hints[f.name])
            elif _default(f) is dataclasses.MISSING:
                raise UserError(f"{prog}: --{f.name.replace('_', '-')} is needed ({docs(kind).get(f.name, '')})")
        result.append(kind(**values))
    return result


def stored_name(field: dataclasses.Field) -> str:
    """The key of a field in files (config.yaml): its name, or the older name that its metadata gives."""
    return field.metadata.get("stored_as", field.name)


@functools.cache
def docs(kind: type) -> dict[str, str]:
    """The help of each field: the string literal that stands right below it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[line.target.id] = " ".join(below.value.value.split())
    return found


def check(value: Any, hint: Any) -> None:
    """Raise ValueError unless a value (from YAML, say) is of the type that the field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return check(value, option)
            except ValueError:
                continue
        raise ValueError(f"{value!r} is not {_name(hint)}")
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is not one of {', '.join(map(str, arguments))}{_close(value, arguments)}")
        return None
    if origin is tuple:
        if arguments[-1] is Ellipsis and not isinstance(value, list | tuple):
            return check(value, arguments[0])  # one number where several may stand
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} is not a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ValueError(f"{value!r} needs {len(kinds)} values")
        for item, kind in zip(value, kinds, strict=True):
            check(item, kind)
        return None
    if hint is type(None):
        fits = value is None
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif hint is Path:
        fits = isinstance(value, str | Path)
    else:
        fits = isinstance(value, hint)
    if not fits:
        raise ValueError(f"{value!r} is not {_name(hint)}")
    return None


class Range(NamedTuple):
    """The finite numbers that a flag may have: in words behind "it must", and whether one is among them."""

    words: str
    holds: Callable[[float], bool]


def at_least(least: int) -> Range:
    """From `least` on."""
    return Range(f"be at least {least}", lambda x: x >= least)


NOT_NEGATIVE, AT_LEAST_1 = at_least(0), at_least(1)
POSITIVE = Range("be above 0", lambda x: x > 0)
FROM_0_TO_1 = Range("lie between 0 and 1", lambda x: 0 <= x <= 1)
FROM_0_BELOW_1 = Range("be at least 0 and below 1", lambda x: 0 <= x < 1)
ABOVE_0_TO_1 = Range("be above 0 and at most 1", lambda x: 0 < x <= 1)
BETWEEN_0_AND_1 = Range("lie between 0 and 1, neither of them", lambda x: 0 < x < 1)


def within(values: Any, range_: Range, *names: str, ascending: bool = False) -> None:
    """Raise UserError unless these fields of a dataclass are None or in the range, every number of them where they are
    tuples; `ascending`: and none smaller than the one before it. For a `__post_init__`, before anything else is done."""
    for name in names:
        value = getattr(values, name)
        numbers = () if value is None else value if isinstance(value, tuple) else (value,)
        fits = all(math.isfinite(number) and range_.holds(number) for number in numbers)
        if not fits or (ascending and list(numbers) != sorted(numbers)):
            subject = "each" if isinstance(value, tuple) else "it"
            order = ", the smaller first" if ascending else ""
            raise UserError(f"--{name.replace('_', '-')} is {_show(value)}; {subject} must {range_.words}{order}")


def word(argv: list[str], flag: str) -> str | None:
    """The last value that `flag` ("--data") is given in `argv`, None without any; before anything is parsed."""
    found = None
    for at, word in enumerate(argv):
        if word == flag and at + 1 < len(argv):
            found = argv[at + 1]
        elif word.startswith(flag + "="):
            found = word.split("=", 1)[1]
    return found


def _title(kind: type | None) -> str:
    """The title of a group of flags: the first line of the dataclass."""
    return "Often used" if kind is None else (inspect.getdoc(kind) or kind.__qualname__).split("\n")[0].rstrip(".")


def _help(text: str, field: dataclasses.Field, default: Any, decided: Any) -> str:
    """The help of a flag with its default. decided: what the default None means for this command, where it is known."""
    if default is dataclasses.MISSING:
        return text
    before, found, rule = text.rpartition(" (default: ")
    if default is not None:
        if default == ():
            return text
        plain = before + "." * rule.endswith(").") if found else text  # the rule for None does not apply
        return f"{plain} (default: {_rounded(default)})"
    if "default" in field.metadata:
        return f"{text} (default: {field.metadata['default']})"
    if decided is None:
        return text
    return f"{before}{found}{_rounded(decided)}, {rule}" if found else f"{text} (default: {_rounded(decided)})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _argument(hint: Any) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) > 1:
            kinds = [_argument(each) for each in inner]
            return {"type": _either(hint, [kind["type"] for kind in kinds]), "metavar": _metavar(inner[0])}
        how = _argument(inner[0])
        if "type" in how:
            how["type"] = _converter(
                inner[0] if typing.get_origin(inner[0]) is not tuple else typing.get_args(inner[0])[0], none=True
            )
        return how
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is tuple:
        nargs = "+" if arguments[-1] is Ellipsis else len(arguments)
        return {"nargs": nargs, "type": _converter(arguments[0]), "metavar": _metavar(arguments[0])}
    return {"type": _converter(hint), "metavar": _metavar(hint)}


def _converter(hint: Any, none: bool = False) -> Any:
    def convert(text: str) -> Any:
        if none and text.lower() == "none":
            return None
        try:
            if typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                for choice in choices:
                    if str(choice) == text:
                        return choice
                raise ValueError
            if hint is int:
                return int(text.replace("_", ""))
            value = hint(text)
            if hint is float and not math.isfinite(value):  # "nan" and "inf" are read, and no flag means either
                raise ValueError
            return value
        except ValueError:
            if typing.get_origin(hint) is Literal:
                options = typing.get_args(hint)
                raise argparse.ArgumentTypeError(
                    f"{text!r} is not one of {', '.join(map(str, options))}{_close(text, options)}"
                ) from None
            raise argparse.ArgumentTypeError(f"{text!r} is not {_name(hint)}") from None

    return convert


def _either(hint: Any, converters: list[Any]) -> Any:
    """Take the first of several types that a word fits."""

    def convert(text: str) -> Any:
        for converter in converters:
            with contextlib.suppress(argparse.ArgumentTypeError):
                return converter(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {_name(hint)}")

    return convert


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    return {str: "TEXT", int: "N", float: "X", Path: "PATH"}.get(hint, hint.__name__.upper())


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_name(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}.get(
        hint, str(getattr(hint, "__name__", hint))
    )


def _close(word: Any, options: Iterable[Any]) -> str:
    hint = nearest(str(word), map(str, options))
    return hint if hint.startswith("; did") else ""


def _tupled(value: Any, hint: Any) -> Any:
    """A list, of argparse or YAML, as a tuple; and a single value where a field takes any number of them."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if typing.get_origin(hint) is tuple and not isinstance(value, tuple) else value


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _rounded(value: Any) -> str:
    """A value as a person writes it: 1.5e-4, not 0.00014999999999999999."""
    if isinstance(value, tuple | list):
        return " ".join(map(_rounded, value))
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 1e-3:
        number, _, power = f"{value:.3e}".partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}" if len(repr(value)) > 8 else repr(value).removesuffix(".0")  # a long one was computed
