"""The rollout service: samples completions with vLLM."""
