"""Distillation of labels in fine-tuning: a fine-tuned encoder with its classifier teaches a second classifier of a student
(DeiT: Touvron et al., ICML 2021, section 4; the specific stage of G2SD: Huang et al., CVPR 2023).

Shapes: B images, D floats of the feature, C classes.
"""

import json
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssl_pretrain.data.views import Sight
from ssl_pretrain.encoder import Encoder, load
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen

Kind = Literal["hard", "soft"]
HEAD = "head.safetensors"  # beside encoder/, as `finetune --save` writes it


@final
class LabelTeacher:
    """A frozen classifier, from the folder of `ssl-eval finetune --save`.

    Raises UserError for a folder without a classifier, and for other classes or channels than the student's.
    """

    def __init__(
        self,
        folder: str,
        student: Encoder,
        classes: tuple[str, ...],
        kind: Kind,
        temperature: float,
        device: torch.device,
        code: str | None = None,
    ) -> None:
        """code: name of the code that the teacher may import (`encoder.load`)."""
        self.folder, self.kind, self.temperature = folder, kind, temperature
        self.head, header = _head(Path(folder))
        self.head.to(device)
        self.feature, theirs = str(header["feature"]), tuple(header["classes"])
        if theirs != classes:
            raise UserError(
                f"--teacher {folder} tells {_listed(theirs)} apart and the data has {_listed(classes)}: fine-tune a "
                f"teacher on the same classes"
            )
        opened, own = load(folder, code=code), student.preprocessing
        how = opened.preprocessing
        if how.channels != own.channels:
            raise UserError(
                f"--teacher {folder} takes images of {how.channels} channels, and the encoder of {own.channels}"
            )
        self.size = how.crop
        self.encoder = Frozen(
            opened.backbone.to(device),
            spec=folder,
            fingerprint=opened.fingerprint,
            sight=Sight(opened.backbone.stride, how.interpolation, opened.backbone.unit),
            own=(how.mean, how.std),
            run=(own.mean, own.std),
        )

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the student's images (B, channels, H, W), resized where the teacher's have another size."""
        if tuple(images.shape[-2:]) != tuple(self.size):
            images = F.interpolate(images, size=tuple(self.size), mode="bilinear", antialias=True)
        features = self.encoder(images)
        x = features.patches.mean(1) if self.feature == "mean" else getattr(features, self.feature)
        return self.head(x)

    def loss(self, logits: Tensor, images: Tensor) -> Tensor:
        """The distillation loss () float32 of the student's logits (B, C). "hard": the cross-entropy with the teacher's
        class of each image. "soft": the divergence of the student's probabilities from the teacher's, both at the
        temperature, times its square (Hinton et al., 2015)."""
        wanted, own = self.logits(images).float(), logits.float()
        if self.kind == "hard":
            return F.cross_entropy(own, wanted.argmax(1))
        t = self.temperature
        return (
            t
            * t
            * F.kl_div((own / t).log_softmax(1), (wanted / t).log_softmax(1), reduction="batchmean", log_target=True)
        )

    def facts(self) -> dict[str, Any]:
        """What the protocol says of it."""
        return {
            "folder": self.folder,
            "fingerprint": self.encoder.fingerprint,
            "loss": self.kind,
            **({"temperature": self.temperature} if self.kind == "soft" else {}),
        }


def _head(folder: Path) -> tuple[nn.Linear, dict[str, Any]]:
    """The classifier in the folder, and what its header says."""
    try:
        with safe_open(folder / HEAD, "pt") as file:
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            header = json.loads((file.metadata() or {})["head"])
        header["feature"], header["classes"]
    except FileNotFoundError:
        raise UserError(
            f"--teacher {folder} has no classifier ({HEAD}): give the folder that `ssl-eval finetune --save` wrote"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"--teacher: {folder / HEAD} cannot be read: {problem}") from None
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.requires_grad_(False), header


def _listed(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:4])}{', ...' if len(classes) > 4 else ''})"
