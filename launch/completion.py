"""Shell completion of the commands, for bash, zsh and fish: a short script that asks `ssl-pretrain --complete`.

Answers come in a tenth of a second, since no torch is imported: flags are read from the source of the dataclasses.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ssl_pretrain import backbones, loggers, plugins
from ssl_pretrain.errors import UserError

from . import recipe_files
from .export import VERBS
from .export_to import FORMATS

COMMANDS = ("ssl-pretrain", "ssl-eval", "ssl-data", "ssl-export", "ssl-report")
WORDS_OF = {"ssl-data": ("check", "stats", "bench", "pack", "tokenize", "cache-teacher"), "ssl-export": VERBS}
CLASSES = ("Config", "Options", "Common", "Bench", "Tokens", "Pack", "Suite", "Run", "Launch")
SCRIPTS = {
    "bash": """\
_ssl_pretrain() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("$line")
    done < <(ssl-pretrain --complete "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null)
}
complete -o default -F _ssl_pretrain COMMANDS
""",
    "zsh": """\
#compdef COMMANDS
_ssl_pretrain() {
    local -a found
    found=("${(@f)$(ssl-pretrain --complete "${(@)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then
        compadd -- "${found[@]}"
    else
        _files
    fi
}
compdef _ssl_pretrain COMMANDS
""",
    "fish": """\
function __ssl_pretrain
    set -l found (ssl-pretrain --complete (commandline -opc) (commandline -ct) 2>/dev/null)
    if test -n "$found"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
for name in COMMANDS
    complete -c $name -f -a '(__ssl_pretrain)'
end
""",
}


def script(shell: str) -> str:
    """The script that a shell reads. Raises UserError for a shell that there is none for."""
    if shell not in SCRIPTS:
        raise UserError(f"--print-completion takes bash, zsh or fish, not {shell!r}")
    return SCRIPTS[shell].replace("COMMANDS", " ".join(COMMANDS))


def answer(words: list[str]) -> list[str]:
    """What may stand in the place of the last of these words of a command line. Empty: nothing, or any file."""
    if len(words) < 2:
        return []
    command, given, last = Path(words[0]).name, words[1:-1], words[-1]
    before = given[-1] if given else ""
    if before.startswith("--"):
        known = _flags(command, given)
        if before in known:
            values = _values(before) or known[before]
            if values is not None:  # it takes a value
                return _starting(last, values)
    if last.startswith("-"):
        return _starting(last, [*_flags(command, given), "--help", "--version"])
    if not given:
        return _starting(last, _first_words(command))
    if command == "ssl-pretrain" and given == ["reproduce"]:
        return _starting(last, recipe_files.names())
    if command == "ssl-export" and given == ["to"]:
        return _starting(last, list(FORMATS))
    return []


def _first_words(command: str) -> list[str]:
    if command == "ssl-eval":
        return sorted([*plugins.names("ssl_pretrain.eval"), "suite"])
    return ["reproduce"] if command == "ssl-pretrain" else list(WORDS_OF.get(command, ()))


def _starting(word: str, choices: list[str]) -> list[str]:
    return sorted({choice for choice in choices if choice.startswith(word)})


def _values(flag: str) -> list[str]:
    """The names that the value of a flag may be, of those that no type lists."""
    if flag == "--method":
        return plugins.names("ssl_pretrain.methods")
    if flag == "--encoder":
        return backbones.names()
    if flag == "--logger":
        return plugins.names(loggers.GROUP)
    return [*recipe_files.names(), "list"] if flag == "--config" else []


def _flags(command: str, given: list[str]) -> dict[str, list[str] | None]:
    """The flags of a command with these words, each with its choices ([]: any value; None: it takes none)."""
    modules = []
    if command == "ssl-pretrain":
        method, encoder = _given(given, "--method"), _given(given, "--encoder") or "vit_small"
        modules = ["ssl_pretrain.config", "ssl_pretrain.launch.options"]
        if method in plugins.own("ssl_pretrain.methods"):
            modules.append(f"ssl_pretrain.methods.{method}")
        if encoder in backbones.own():
            modules.append(f"ssl_pretrain.backbones.{encoder.rstrip('0123456789').split('_')[0]}")
    elif command == "ssl-eval" and given:
        modules = ["ssl_pretrain.launch.options", "ssl_pretrain.eval._evaluation"]
        modules += ["ssl_pretrain.launch.suite"] if given[0] == "suite" else [f"ssl_pretrain.eval.{given[0]}"]
    elif command == "ssl-export" and given:
        files = {"to": "export_to", "resize": "export_resize", "card": "export_card", "import": "export"}
        modules = [f"ssl_pretrain.launch.{files[given[0]]}"] if given[0] in files else []
    elif command in COMMANDS:
        modules = [f"ssl_pretrain.launch.{command.removeprefix('ssl-')}"]
    found: dict[str, list[str] | None] = {}
    for name in modules:
        if (file := _file(name)) is not None:
            found |= dict(_fields(file))
    return found


def _given(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words[:-1] else None


def _file(module: str) -> Path | None:
    """The file of a module of this package, not imported."""
    package, _, name = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / f"{name}.py").is_file():
            return Path(folder) / f"{name}.py"
    return None


@cache
def _fields(file: Path) -> tuple[tuple[str, list[str] | None], ...]:
    """The flags of the dataclasses of options in a file, and what each takes."""
    classes = [each for each in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(each, ast.ClassDef)]
    return tuple(pair for each in classes if each.name in CLASSES for pair in _flags_of(each))


def _flags_of(kind: ast.ClassDef) -> Iterator[tuple[str, list[str] | None]]:
    for line in kind.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            name = line.target.id.replace("_", "-")
            hint = ast.unparse(line.annotation)
            if "bool" in hint:
                yield f"--{name}", None
                yield f"--no-{name}", None
            else:
                yield f"--{name}", [choice for each in ast.walk(line.annotation) for choice in _choices(each)]


def _choices(hint: ast.AST) -> list[str]:
    """The words of a Literal."""
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "Literal":
        inner = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        return [str(each.value) for each in inner if isinstance(each, ast.Constant)]
    return []


def command(argv: list[str]) -> int:
    """Carry out `--complete WORDS` or `--print-completion SHELL`. Raises UserError for an unknown shell."""
    if argv[0] == "--complete":
        sys.stdout.write("".join(f"{word}\n" for word in answer(argv[1:])))
    else:
        sys.stdout.write(script(argv[1] if len(argv) > 1 else ""))
    return 0
