"""The embedded models: training script, weights, card."""
