"""The objective a model is trained on, and the loop that samples from it."""
