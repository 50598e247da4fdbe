"""What carries: one file an external system, and `shared.rl`, which decides."""
