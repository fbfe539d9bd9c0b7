"""The optimizers of the U-Net: AdamW, or Muon for the matrices and filters inside it and AdamW for the rest.

Papers: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon); the size of its steps is that of Liu et
al. 2025 (arXiv:2502.16982, Equation 4), so that one learning rate does for both. AdamW (Loshchilov & Hutter 2019,
arXiv:1711.05101, Algorithm 2) is PyTorch's own where it stands alone. PyTorch's Muon is not used: it takes no filters,
and computes in bfloat16, for which many CPUs have no instructions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_model import UNet
from training.reproducible import decay_groups

MOMENTUM = 0.95  # of Muon


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ (..., rows, columns), about: its singular values end up between 0.7 and 1.2.

    A Newton-Schulz iteration: the polynomial a s + b s³ + c s⁵, again and again, moves each singular value s towards 1.
    With G = X Xᵀ, one iteration is P X, P = a + b G + c G², and the next G is P G P. So the large X is needed only at
    the beginning and at the end, not in each iteration; all of these small matrices commute.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT, steps).mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # no singular value is above 1
    gram, product = x @ x.mT, None  # (..., rows, rows)
    for step in range(steps):
        polynomial = b * gram + c * (gram @ gram)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ (polynomial @ gram)
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon and a fused AdamW as one optimizer. Like that, it skips a step where `found_inf`, a 0-d tensor, is 1."""

    def __init__(self, network: UNet, lr: float, weight_decay: float) -> None:
        """First and last convolution (`conv_in`, `conv_out`) and all one-dimensional parameters are AdamW's."""
        matrices, gains = decay_groups(network, weight_decay)
        ends = {id(network.conv_in.weight), id(network.conv_out.weight)}
        outer = matrices | {"params": [p for p in matrices["params"] if id(p) in ends]}
        inner = matrices | {"params": [p for p in matrices["params"] if id(p) not in ends]}
        super().__init__([inner, outer, gains], {"lr": lr})

    def add_param_group(self, param_group: dict) -> None:
        """All groups but the first are AdamW's, those added later, too."""
        super().add_param_group(param_group)
        self._share()

    def __setstate__(self, state: dict) -> None:
        """After a copy, a pickle, or `load_state_dict`: groups and moments are other objects than before."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """AdamW steps all groups but the first, and keeps its moments with the others."""
        if groups := self.param_groups[1:]:
            self.adamw = torch.optim.AdamW(groups, fused=True)
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """`closure`, if there is one, computes the gradients; what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, skip = self.param_groups[0], getattr(self, "found_inf", None)
        go = 1.0 if skip is None else 1.0 - skip  # 0: nothing moves
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():  # matrices of one shape are one batch
            states = [self.state[parameter] for parameter in parameters]
            for state, parameter in zip(states, parameters, strict=True):
                state.setdefault("momentum", torch.zeros_like(parameter))
            gradient = torch.stack([parameter.grad for parameter in parameters])
            gradient = gradient if skip is None else gradient.nan_to_num_(0.0, 0.0, 0.0)
            momenta = [state["momentum"] for state in states]
            momentum = torch.stack(momenta).lerp_(gradient, (1 - MOMENTUM) * go)
            torch._foreach_copy_(momenta, momentum.unbind())
            ahead = gradient.lerp_(momentum, MOMENTUM).flatten(2)  # (k, C_out, C_in · 3 · 3) of filters
            size = 0.2 * max(ahead.shape[1:]) ** 0.5  # of about the size that AdamW's steps have
            moves = orthogonalised(ahead).mul_(group["lr"] * size * go).view_as(gradient)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * go)
            torch._foreach_sub_(parameters, moves.unbind())
        self.adamw.found_inf, self.adamw.grad_scale = skip, None
        self.adamw.step()
        return loss


def make_optimizer(name: str, network: UNet, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`name`: adamw or muon. Gains and biases do not decay in either."""
    if name == "muon":
        return Muon(network, lr, weight_decay)
    return torch.optim.AdamW(decay_groups(network, weight_decay), lr=lr, fused=True)
