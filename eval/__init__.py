"""Evaluators of exported encoders: one file an evaluator; the file name is the word after `ssl-eval`."""
