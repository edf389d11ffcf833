"""Weights & Biases: curves, scores and pictures, on its server or, with WANDB_MODE=offline, in the run folder."""

import os
import secrets
from pathlib import Path
from typing import Any, final

import numpy as np

from .. import plugins
from ..errors import UserError
from . import Logger
from ._rows import Row, Rows

SECONDS_TO_CONNECT, SECONDS_TO_FINISH = 25.0, 25.0  # less than a run waits for a logger at its end
PROJECT = "ssl-pretrain"  # unless WANDB_PROJECT names another one


@final
class Wandb(Logger):
    """A run of the library wandb, with everything off that is not what a Logger gets: code, git, console, machine, error
    reports. The key is what `wandb login` stored or WANDB_API_KEY; it is not read here."""

    def begin(self, out: Path, config: dict[str, Any], step: int) -> None:
        """Open the run, or the same run again. Raises UserError without a login."""
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # before its import
        wandb = plugins.optional("wandb", "--logger wandb", "'ssl-pretrain[wandb]'")
        self._image = wandb.Image
        self._rows = Rows(out, out / "wandb" / "continue.json")
        run = self._rows.run or secrets.token_hex(4)
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            finish_timeout=SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            host="",
            init_timeout=SECONDS_TO_CONNECT,
            program="",
            program_relpath="",
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_executable="",
            x_save_requirements=False,
        )
        wandb.setup(settings)
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise UserError("wandb is not logged in: run 'wandb login', or set WANDB_API_KEY or WANDB_MODE=offline")
        self._run = wandb.init(
            id=run,
            resume="allow" if online else None,  # without a server there is nothing to ask
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", out.name),
            config=config,
            allow_val_change=True,
            dir=out,
            settings=settings,
        )
        self._rows.begin(run, step, self._send)

    def metrics(self, line: dict[str, Any]) -> None:
        """See `Logger.metrics`."""
        self._rows.metrics(line)

    def scores(self, group: str, values: dict[str, float], step: int) -> None:
        """See `Logger.scores`."""
        self._rows.scores(group, values, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See `Logger.picture`."""
        self._rows.picture(name, pixels, step)

    def end(self, state: str) -> None:
        """Send what is left; a run that did not finish is marked as failed, and may be continued."""
        self._rows.flush()
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state == "finished" else 1)

    def _send(self, row: Row) -> None:
        pictures = {f"pictures/{name}": self._image(pixels) for name, pixels in row.pictures.items()}
        self._run.log({**row.numbers, **pictures, "time": row.time}, step=row.step)
