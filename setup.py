"""Maps the repository's folders to one import package, ssl_pretrain. `ssl/` is a source root and must never hold an
__init__.py: it would shadow Python's own ssl."""

from setuptools import setup

setup(
    package_dir={
        "": "ssl",
        "ssl_pretrain.methods": "methods",
        "ssl_pretrain.launch": "launch",
        "ssl_pretrain.eval": "eval",
        "ssl_pretrain.recipes": "recipes",
    },
    packages=[
        "ssl_pretrain",
        "ssl_pretrain.backbones",
        "ssl_pretrain.checkpoint",
        "ssl_pretrain.conformance",
        "ssl_pretrain.data",
        "ssl_pretrain.distributed",
        "ssl_pretrain.features",
        "ssl_pretrain.foreign",
        "ssl_pretrain.loggers",
        "ssl_pretrain.loop",
        "ssl_pretrain.optim",
        "ssl_pretrain.parts",
        "ssl_pretrain.tokenizer",
        "ssl_pretrain.methods",
        "ssl_pretrain.launch",
        "ssl_pretrain.eval",
        "ssl_pretrain.recipes",
    ],
    package_data={
        "ssl_pretrain": ["py.typed"],
        "ssl_pretrain.launch": ["report_assets/*"],
        "ssl_pretrain.recipes": ["*.yaml"],
    },
)
