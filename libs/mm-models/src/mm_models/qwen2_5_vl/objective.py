"""What a Qwen2.5-VL is trained to do."""

from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.tokens.objective import Average, NextToken


def objective(
    config: Qwen25VLConfig, task: str, *, expert: str | None = None, boundary: float | None = None, average: Average
) -> NextToken:
    """Predicting the answers of conversations. There are no experts. average: see `NextToken`."""
    return NextToken(average, task)
