"""ssl-pretrain: self-supervised pretraining of vision encoders. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
