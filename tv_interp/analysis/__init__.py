"""The questions: who writes, who reads, through which paths."""
