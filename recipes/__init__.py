"""Recipes that ship with the package: YAML files with flags of `ssl-pretrain`, used by their names (`--config NAME`)."""
