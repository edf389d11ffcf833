"""Evaluators of exported encoders. Each file is one evaluator; its name is the subcommand of `ssl-eval`."""
