"""Models of tokens: the loss of each token, the objective of predicting the next one, and answering by it."""

from mm_models.tokens.decode import greedy
from mm_models.tokens.head import IGNORED, token_losses
from mm_models.tokens.objective import NextToken

__all__ = ["IGNORED", "NextToken", "greedy", "token_losses"]
