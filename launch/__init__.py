"""The commands, and how processes are started."""
