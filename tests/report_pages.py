"""What is on a page of ssl-report, read from its HTML."""

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser


@dataclass
class Curve:
    """The points of one run in a chart."""

    run: int
    steps: list[int]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


def charts(page: str) -> dict[str, list[Curve]]:
    """The curves on a page by the names of their numbers."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    names = dict(re.findall(r'data-chart="(\d+)"><figcaption><b>.*?<code>(.*?)</code>', page))
    assert len(names) == len(data["charts"])
    return {
        names[str(i)]: [
            Curve(each["run"], data["steps"][each["x"]], each["y"], each.get("low", []), each.get("high", []))
            for each in chart["curves"]
        ]
        for i, chart in enumerate(data["charts"])
    }


class Elements(HTMLParser):
    """Tags, attributes and text of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # of which tag, name, value
        self.text = ""
        self._raw = False  # within a script or a style
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data + "\n"


def table(page: str, section: str) -> list[list[str]]:
    """The rows of the first table of a section, cells without their tags."""
    (inside,) = re.findall(rf'<section id="{section}".*?<table.*?>(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", inside, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]
