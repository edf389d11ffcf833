"""Plugins of another package, as small as they can be: what tests install and put faults into. Some imports are for the
faults."""

BACKBONE = '''
"""A linear map of patches, as simple as an encoder can be."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.errors import UserError

SIZES = {"acme_small": {"width": 24}, "acme_wide": {"width": 48}}


@final
class Acme(Backbone):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (Acme)."""

        width: int
        """Channels of a feature."""
        side: int = 8
        """Side of a patch, pixels."""

    supports = frozenset()

    def __init__(self, image_size, in_chans, config):
        super().__init__()
        self.config, self.image_size, self.in_chans = config, image_size, in_chans
        self.dim, self.depth, self.stride = config.width, 1, (config.side, config.side)
        self.embed = nn.Conv2d(in_chans, config.width, config.side, config.side)
        self.layers = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU())

    def forward(self, images, *, keep=None, replace=None, attention="full", prefix_length=None, blocks=(), drop=None):
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        if min(images.shape[2:]) < self.config.side:
            raise UserError(f"images of {tuple(images.shape[2:])} pixels are smaller than a patch of {self.config.side}")
        x = self.embed(images)
        patches = self.layers(x.flatten(2).transpose(1, 2)).to(self.embed.weight.dtype)  # float32 under autocast, too
        return Features(cls=None, patches=patches, grid=tuple(x.shape[2:]), pooled=patches.mean(1))

    def layer_of(self, parameter):
        return {"embed": 0, "layers": 1}[parameter.split(".")[0]]
'''

UNITS = '''
"""Patches of which 2 x 2 make a mask unit: patches see their unit, units see each other."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.units import mask_of_patches, patches_of

SIZES = {"cells_small": {"width": 24}}


@final
class Cells(Backbone):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (Cells)."""

        width: int
        """Channels of a feature."""
        inner: int = 12
        """Channels of a patch embedding."""
        side: int = 4
        """Side of a patch, pixels."""

    supports = frozenset({"keep", "replace", "visible", "maps"})

    def __init__(self, image_size, in_chans, config):
        super().__init__()
        self.config, self.image_size, self.in_chans = config, image_size, in_chans
        self.dim, self.depth, self.stride = config.width, 1, (config.side, config.side)
        self.map_strides, self.map_channels = ((config.side, config.side),), (config.width,)
        self.embed = nn.Conv2d(in_chans, config.inner, config.side, config.side)
        self.within = nn.Linear(2 * config.inner, config.width)
        self.across = nn.Linear(config.width, config.width)

    @property
    def unit(self):
        return 2 * self.stride[0], 2 * self.stride[1]

    @property
    def token_dim(self):
        return self.config.inner

    def forward(self, images, *, keep=None, replace=None, attention="full", prefix_length=None, blocks=(), drop=None,
                visible=None, maps=False):
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        if images.shape[2] % self.unit[0] or images.shape[3] % self.unit[1]:
            raise UserError(f"images of {tuple(images.shape[2:])} pixels are no multiple of {self.unit}")
        x = self.embed(images)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        grid = (h // 2, w // 2)
        if replace is not None:
            mask, token = replace
            x = torch.where(mask_of_patches(mask, self, grid)[..., None], token, x)
        every = torch.arange(h * w // 4, device=x.device).expand(len(x), -1)
        units = every if keep is None else keep
        index = patches_of(units, self, grid)
        x = torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[2])).unflatten(1, (-1, 4))
        there = x.new_ones(x.shape[:2]) if visible is None else visible.to(x.dtype)
        x = torch.cat([x, x.mean(2, keepdim=True).expand_as(x)], 3)
        x = self.within(x) * there[:, :, None, None]
        seen = x.sum((1, 2), keepdim=True) / (4 * there.sum(1)[:, None, None, None])
        x = (x + self.across(seen).tanh()) * there[:, :, None, None]
        x = x.flatten(1, 2).to(self.embed.weight.dtype)
        pooled = x.sum(1) / (4 * there.sum(1, keepdim=True))
        if keep is None:
            x = torch.gather(x, 1, index.argsort(1)[..., None].expand_as(x))
            pyramid = x.transpose(1, 2).unflatten(2, (h, w))
        else:
            pyramid = x.transpose(1, 2).unflatten(2, (-1, 2))
        return Features(cls=None, patches=x, grid=(h, w), pooled=pooled, maps=(pyramid,) if maps else ())

    def layer_of(self, parameter):
        return {"embed": 0, "within": 1, "across": 1}[parameter.split(".")[0]]
'''

SOURCE = '''
"""Grey steps in bands, made and not read."""

import multiprocessing
import os
import time
from typing import final

import numpy as np

from ssl_pretrain.data.source import PluginSource
from ssl_pretrain.errors import UserError


@final
class Bands(PluginSource):
    def __init__(self, data, split):
        if not data.isdigit():
            raise UserError(f"bands:{data}: give the number of images, like bands:64")
        self.split, self.count = split, int(data)
        self.labels, self.classes = np.arange(len(self)) % self.count % 2, ("dark", "bright")
        self.fingerprint = f"ba{len(self):02d}{ {None: 0, 'train': 1, 'val': 2}[split] }"
        self.description = f"{len(self)} bands"

    @classmethod
    def splits(cls, data):
        return ["train", "val"]

    @classmethod
    def example(cls, folder):
        return "8"

    def __len__(self):
        return self.count * (2 if self.split is None else 1)

    def _place(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.split or ("train", "val")[index // self.count], index % self.count

    def __getitem__(self, index):
        split, number = self._place(index)
        pixels = np.random.default_rng([number, split == "val"]).integers(0, 100, (24, 32, 3))
        return (pixels + 150 * (number % 2)).astype(np.uint8)

    def name(self, index):
        split, number = self._place(index)
        return f"{split}:{number}"
'''

LOGGER = '''
"""A line of JSON for every call."""

import json
import threading
from typing import final

from ssl_pretrain.loggers import Logger


@final
class Diary(Logger):
    def _write(self, *what):
        with open(self.out / "diary.jsonl", "a") as file:
            file.write(json.dumps(what) + "\\n")

    def begin(self, out, config, step):
        self.out = out
        self._write("begin", config, step)
        config.clear()

    def metrics(self, line):
        self._write("metrics", line)
        line.clear()

    def scores(self, group, values, step):
        self._write("scores", group, values, step)
        values.clear()

    def picture(self, name, pixels, step):
        self._write("picture", name, [str(pixels.dtype), *pixels.shape], step)
        pixels[:] = 0

    def warning(self, text):
        self._write("warning", text)

    def end(self, state):
        self._write("end", state)


@final
class Broken(Logger):
    def begin(self, out, config, step):
        self.lines = 0

    def metrics(self, line):
        self.lines += 1
        assert self.lines < 3, "called again"
        if self.lines == 2:
            raise RuntimeError("the server is gone")

    def end(self, state):
        raise AssertionError("called again")
'''

EVALUATOR = '''
"""Classification by the nearest class mean of frozen features."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from ssl_pretrain.errors import UserError
from ssl_pretrain.eval._results import Outcome, classification

BASELINES = ("random", "pixels")
SHARED = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nearest class mean."""

    images: int = 6
    """Training images of each class that its mean is of; drawn by the seed."""


def evaluate(task, config):
    if config.images < 1:
        raise UserError(f"--images is {config.images}; it must be at least 1")
    train, test = task.features(("pooled",))
    known, asked = (side.features["pooled"] for side in (train, test))
    order = np.random.default_rng(task.seed).permutation(len(known))
    means = []
    for label in range(len(task.data.classes)):
        rows = [row for row in order if train.labels[row] == label][: config.images]
        means.append(known[rows].mean(0))
    distance = ((asked[:, None] - np.stack(means)) ** 2).sum(2)
    metrics = classification(distance.argsort(1), test.labels, task.data.classes)
    metrics["distance"] = float(distance.min(1).mean())
    protocol = {
        "headline": f"nearest mean of {config.images} images",
        "images": config.images,
        **task.protocol(train, test),
    }
    return Outcome(metrics, protocol, [])
'''
