"""The learner service: owns the run, trains with DeepSpeed."""
