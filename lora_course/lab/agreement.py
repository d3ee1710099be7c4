"""How far two results lie apart that should be one."""

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries, computed in fp32. Of adapters: `states.relative_error`."""
    found, expected = found.detach().float(), expected.detach().float()
    return ((found - expected).norm() / expected.norm()).item()
