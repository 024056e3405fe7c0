"""Where a model comes from, and the only code that knows TransformerLens classes."""
