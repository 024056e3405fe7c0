"""Which attention heads carry a task through a prompt."""
