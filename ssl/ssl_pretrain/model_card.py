"""The model card of an export: README.md with the YAML header that the Hugging Face hub reads, and a description.

Names of methods, data and files come from users and files: in the header YAML quotes them, in the text they are one line
without markup.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
# Of the lineage: other networks that the weights come from; with several teachers also teacher2 and so on.
STARTS = ("init_from", "teacher", "tokenizer", "anchor")
_FURTHER_TEACHER = re.compile(r"teacher\d+")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # a model's name on the hub


@dataclass(frozen=True)
class Card:
    """What a card says beside the lineage."""

    name: str  # the encoder's
    library: str  # whose loader the hub should name: timm, transformers, ssl-pretrain
    shape: tuple[int, int, int]  # channels, height, width of an image
    dim: int  # width of the features
    readers: Mapping[str, str]  # library -> the line of code that loads it, or the reason why it cannot
    code: str | None = None  # of the user, that makes the encoder, as `encoder.load` takes it


@dataclass(frozen=True)
class Score:
    """A result of an evaluator."""

    evaluator: str
    data: str
    split: str
    top1: float  # percent


def text(card: Card, lineage: Mapping[str, Any], scores: Sequence[Score] = ()) -> str:
    """The whole file."""
    import yaml  # not needed to read an export

    header = yaml.safe_dump(_header(card, lineage, scores), sort_keys=False, allow_unicode=True, width=1000)
    channels, height, width = card.shape
    starts = [f"- {_words(what)}: {_words(_origin_text(lineage[what]))}" for what in _starts(lineage)]
    facts = [f"- {_words(name)}: {_words(value)}" for name, value in lineage.items() if name not in _starts(lineage)]
    results = [f"- {_words(s.evaluator)} on {_words(s.data)}, {_words(s.split)}: top-1 {s.top1:.2f} %" for s in scores]
    readers = [f"- {library}: {how}" for library, how in card.readers.items()]
    code = "" if card.code is None else f', code="{card.code}"'  # nothing is imported because a file names it
    return "\n".join(
        [
            f"---\n{header}---\n",
            f"# {card.name}, pretrained with {_words(lineage.get('method', 'an unknown method'))}\n",
            *facts,
            *starts,
            f"- input: {channels} x {height} x {width} pixels, preprocessing in config.json",
            f"- features: {card.dim} wide",
            *(["", "Scores:", "", *results] if results else []),
            f"""
```python
from PIL import Image

from ssl_pretrain import encoder

model = encoder.load("this folder"{code})
features = model(model.preprocess([Image.open("cat.jpg")]))  # .pooled (1, {card.dim})
```

Other loaders:
""",
            *readers,
            "",
            "Made by ssl-pretrain. It was trained without labels; evaluate it on your task before you use it.",
            "",
        ]
    )


def with_origins(networks: Mapping[str, Any], init_from: str | Path | None) -> dict[str, Any]:
    """What the lineage of a run says of other networks: source and licence of each, as far as they are known. networks:
    facts of the frozen ones, each with its `spec`; where they have source and licence, these count."""
    found = {name: {**facts, **origin(facts["spec"]), **facts} for name, facts in networks.items()}
    if init_from is not None:
        found["init_from"] = {"spec": str(init_from), **origin(str(init_from))}
    return found


def scores_below(folder: Path, fingerprint: str) -> list[Score]:
    """The top-1 results below a folder that belong to the encoder with this fingerprint, sorted by path. Files that are
    no such results are left out."""
    found = []
    for path in sorted(folder.rglob("results.json")):
        try:
            result = json.loads(path.read_bytes())
            protocol = result["protocol"]
            if protocol["encoder_fingerprint"] == fingerprint:
                score = float(result["metrics"]["top1"])
                found.append(
                    Score(str(result["evaluator"]), str(protocol["data"]), str(protocol["test"]["split"]), score)
                )
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return found


def origin(spec: str) -> dict[str, Any]:
    """Source and licence of the network that a spec names, and the networks that it comes from itself."""
    for file in (Path(spec) / "config.json", Path(spec) / "encoder" / "config.json"):
        try:
            lineage = json.loads(file.read_bytes())["lineage"]
            known = {
                name: lineage[name] for name in ("method", "source", "license", *_starts(lineage)) if name in lineage
            }
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        return {"source": UNKNOWN, "license": UNKNOWN, **known}
    return {"source": spec, "license": UNKNOWN}


def _header(card: Card, lineage: Mapping[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
    method = str(lineage.get("method", UNKNOWN))
    header: dict[str, Any] = {
        "library_name": card.library,
        "license": str(lineage.get("license", UNKNOWN)),
        "pipeline_tag": "image-feature-extraction",
        "tags": list(
            dict.fromkeys(["image-feature-extraction", "self-supervised", "ssl-pretrain", card.library, method])
        ),
    }
    if bases := list(dict.fromkeys(_bases(lineage))):
        header["base_model"] = bases[0] if len(bases) == 1 else bases
    if scores:
        results = [
            {
                "task": {"type": "image-classification", "name": score.evaluator},
                "dataset": {"type": score.data, "name": score.data, "split": score.split},
                "metrics": [{"type": "accuracy", "value": round(score.top1, 3), "name": f"top-1 ({score.evaluator})"}],
            }
            for score in scores
        ]
        header["model-index"] = [{"name": f"{card.name}, {method}", "results": results}]
    return header


def _bases(lineage: Mapping[str, Any]) -> list[str]:
    """Names on the hub of the models that the weights come from."""
    found = [str(lineage["source"])] if _HUB.fullmatch(str(lineage.get("source", ""))) else []
    start = lineage.get("init_from")
    return found + (_bases(start) if isinstance(start, Mapping) else [])


def _origin_text(origin: Any) -> str:
    """One line on a network: its name, source and licence, then the networks that it comes from."""
    if not isinstance(origin, Mapping):
        return str(origin)
    spec, source, licence = (origin.get(name, UNKNOWN) for name in ("spec", "source", "license"))
    own = f"{spec} (source: {source}; licence: {licence})"
    return "; ".join([own, *(f"its {what}: {_origin_text(origin[what])}" for what in _starts(origin))])


def _starts(lineage: Mapping[str, Any]) -> list[str]:
    """The names of the networks in a lineage."""
    more = (name for name in lineage if _FURTHER_TEACHER.fullmatch(name))
    return [*(name for name in STARTS if name in lineage), *more]


def _words(value: Any) -> str:
    """A value as one line of Markdown without markup."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")
