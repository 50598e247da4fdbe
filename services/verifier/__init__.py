"""The verifier: scores completions in a sandbox."""
