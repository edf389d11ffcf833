"""What the training loop calls and its reader can skip."""
