"""Many runs: one measurement over a grid of models, tasks, corruptions and seeds."""
