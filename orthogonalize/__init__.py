"""Edit a concept out of, or into, a language model's weights, and prove it."""
