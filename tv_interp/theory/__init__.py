"""Linear transformers (arXiv 2506.09048): what one vector can carry, in closed form and trained."""
