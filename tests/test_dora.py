"""dora_linear and its norm: what test_ops.py cannot see of them."""

import pytest
import torch
from law import bound, error

import peftops.functional as F


def test_a_magnitude_that_is_the_norm_is_lora():
    x, w, a, b = torch.randn(5, 16), torch.randn(24, 16), torch.randn(4, 16), torch.randn(24, 4)
    m = F.dora_weight_norm(w, a, b, scaling=0.5)
    exact, same = [F.lora_linear(*(t.to(d) for t in (x, w, a, b)), scaling=0.5) for d in (torch.float64, torch.float32)]
    y = F.dora_linear(x, w, a, b, m, scaling=0.5)
    assert error(y, exact) <= bound(same, exact)


@pytest.mark.parametrize("mode", ["peft", "lora"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p, detach, mode):
    torch.manual_seed(0)
    x, w, a, b, m, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, 8), (6, 8), (3, 8), (6, 3), (6,), (6,)))
    n = F.dora_weight_norm(w, a, b, scaling=0.7)

    def f(*leaves):
        torch.manual_seed(1)
        options = {"norm": n} if detach else {"detach_norm": False}
        return F.dora_linear(leaves[0], w, *leaves[1:], scaling=0.7, dropout_p=p, dropout_mode=mode, **options)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, a, b, m, bias)])
