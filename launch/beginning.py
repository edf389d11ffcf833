"""What a run begins with: the settings that the weights of --init-from or --init-state fix."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import config, flags
from ssl_pretrain.config import Run
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import start_weights

from .options import Launch

NAMES = ("init_from", "init_state")


@dataclass(frozen=True)
class Beginning:
    """The start weights of a command, and the settings that they fix, by flag."""

    flag: str = "--init-from"
    text: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial: bool = False

    @classmethod
    def read(cls, argv: list[str], written: dict[str, Any], method: str, data: str) -> "Beginning":
        """That of the command line `argv` and its YAML file `written`. Start weights of the command line replace those of
        the file, which are taken out of `written` with what belongs to them. Raises UserError if the weights cannot be
        described."""
        given = {name: flags.word(argv, "--" + name.replace("_", "-")) for name in NAMES}
        for name in NAMES:
            try:
                flags.check(written.get(name), str | None)
            except ValueError as problem:
                raise UserError(f"{name}: {problem}") from None
        texts = {name: start_weights.normalised(given[name] or written.get(name)) for name in NAMES}
        if any(given.values()):
            before = {name: start_weights.normalised(written.pop(name, None)) for name in NAMES}
            texts = {name: start_weights.normalised(given[name]) for name in NAMES}
            if any(before.values()) and before != texts:
                for key in ("init_fingerprint", "branch", "partial"):
                    written.pop(key, None)
        if written.get("init_fingerprint") is None:  # any
            written.pop("init_fingerprint", None)
        for name, text in texts.items():
            if text is not None:
                partial = "--partial" in argv or (written.get("partial") is True and "--no-partial" not in argv)
                out = flags.word(argv, "--out") or written.get("out")
                folder = config.folder_of(Path(out) if out else None, method, data)
                flag = "--" + name.replace("_", "-")
                return cls(flag, text, _settings(name, text, folder, method, partial), partial)
        return cls()

    @property
    def fixed(self) -> dict[str, Any]:
        """Those of the settings that no flag may contradict."""
        return {} if self.partial else self.settings

    def check_encoder(self, asked: str | None) -> None:
        """Raise UserError for another --encoder than that of the weights. It is checked before the other flags, because
        the flags that exist depend on the encoder."""
        if self.text is not None and asked is not None and "encoder" in self.fixed:
            fixed = {"encoder": self.fixed["encoder"]}
            start_weights.refuse_contradictions(self.flag, self.text, fixed, {"encoder": asked})

    def checked(self, run: Run, launch: Launch, knobs: Any, options: Any) -> tuple[Run, Launch, Any, Any]:
        """The settings of a command, with the start weights named as config.yaml has them. Raises UserError where they
        contradict the weights. Knobs of the method are free."""
        if self.text is None:
            return run, launch, knobs, options
        start_weights.refuse_contradictions(self.flag, self.text, self.fixed, config.plain(run, options))
        start: dict[str, Any] = {self.flag[2:].replace("-", "_"): self.text}
        return dataclasses.replace(run, **start), launch, knobs, options


def _settings(name: str, text: str, out: Path, method: str, partial: bool) -> dict[str, Any]:
    if name == "init_from":
        return start_weights.settings(text, out, partial=partial)
    from ssl_pretrain.loop import start_state  # torch: only now

    return start_state.settings(text, out, method, partial=partial)
