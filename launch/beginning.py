"""What a new run begins with besides its own flags: the settings that the weights of --init-from fix."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import config, flags
from ssl_pretrain.config import Run
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import start_weights

from .options import Launch


@dataclass(frozen=True)
class Beginning:
    """The start weights of a command, and the settings that they fix, by flag."""

    text: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial: bool = False

    @classmethod
    def read(cls, argv: list[str], written: Mapping[str, Any], method: str, data: str) -> "Beginning":
        """That of the command line `argv` and its YAML file. Raises UserError if the weights cannot be described."""
        text = flags.word(argv, "--init-from") or written.get("init_from")
        if text is not None:
            try:
                flags.check(text, str)
            except ValueError as problem:
                raise UserError(f"init_from: {problem}") from None
        text = start_weights.normalised(text)
        if text is None:
            return cls()
        out = flags.word(argv, "--out") or written.get("out")
        partial = "--partial" in argv or (written.get("partial") is True and "--no-partial" not in argv)
        folder = config.folder_of(Path(out) if out else None, method, data)
        return cls(text, start_weights.settings(text, folder, partial=partial), partial)

    def check_encoder(self, asked: str | None) -> None:
        """Raise UserError for another --encoder than that of the weights. It is checked before the other flags, because
        the flags that exist depend on the encoder."""
        if self.text is not None and not self.partial and asked is not None:
            fixed = {"encoder": self.settings["encoder"]}
            start_weights.refuse_contradictions("--init-from", self.text, fixed, {"encoder": asked})

    def checked(self, run: Run, launch: Launch, knobs: Any, options: Any) -> tuple[Run, Launch, Any, Any]:
        """The settings of a command, with the value of --init-from as config.yaml has it. Raises UserError where they
        contradict the weights."""
        if self.text is None:
            return run, launch, knobs, options
        if not self.partial:
            given = config.plain(run, options)
            start_weights.refuse_contradictions("--init-from", self.text, self.settings, given)
        return dataclasses.replace(run, init_from=self.text), launch, knobs, options
