"""AdamW that keeps 6 bytes of a bf16 weight beside it, instead of 12: for a large model on few GPUs.

    weight      bf16, the model's own
    remainder   16 bits: with the weight, the float32 master of which the weight is the nearest bf16
    moments     bf16, both

The master is whole, so no update is lost to rounding. The moments are not: a change of less than 1/256 of one
can be lost, which is why the second one must not be slow (see `OptimizerConfig.states`). They and the
gradients are turned to float32 part by part, where the update is computed. Before it, gradients are summed in
bf16: of 128 micro batches the sum is off by 1.4 % of its norm (measured with random numbers).

On a GPU an update is one kernel (`mmcore.training.lean_adam_kernel`), elsewhere torch's own operators.
Transformer Engine's FusedAdam has such states too, but turns all moments of a group to float32 at once, whenever
it updates and whenever it is saved: 8 bytes a weight more at the worst moment
(transformer_engine/pytorch/optimizers/fused_adam.py at 04912bf). And the 16-bit remainders that it gives
megatron-core for a master cannot be loaded from a fully reshardable checkpoint.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

# Weights that are updated together; what they need beside takes 32 bytes a weight.
PART = 1 << 24


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 masters of bf16 weights and their int16 remainders."""
    low = remainder.int() & 0xFFFF
    high = weight.view(torch.int16).int() - (low > 0x8000).int()  # the weight was rounded up
    return (high * 0x10000 + low).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 masters as the nearest bf16 weights and int16 remainders.

    Exact, but for those halfway between two weights, which move by their last bit towards the one they become
    (ties go to even, as everywhere in torch): else `join` could not tell to which side they were rounded.
    """
    bits = master.contiguous().view(torch.int32)
    weight, low = master.bfloat16(), bits & 0xFFFF
    was_rounded_up = weight.view(torch.int16) != bits >> 16
    return weight, torch.where(low == 0x8000, low + 2 * was_rounded_up - 1, low).to(torch.int16)


class LeanAdam(torch.optim.Optimizer):
    """What megatron-core's distributed optimizer asks of an Adam that keeps the masters itself.

    Of each parameter, which is flat and bf16, the state is `exp_avg` and `exp_avg_sq` in bf16 and
    `master_param`, the int16 remainders. Its gradient is `decoupled_grad`, of any precision. The step count
    lives in the group, as in mmcore.host.Adam.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """
        Args:
            groups: of an AdamW: `params`, `lr`, `betas`, `eps`, `weight_decay`.
        """
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                gradient = getattr(parameter, "decoupled_grad", None)
                if gradient is not None:
                    self._initialize(parameter)
                    state = self.state[parameter]
                    names = ("master_param", "exp_avg", "exp_avg_sq")
                    rows = (parameter, gradient, *(state[name] for name in names))
                    flat = tuple(row.view(-1) for row in rows)
                    if parameter.is_cuda and _has_triton():
                        from mmcore.training import lean_adam_kernel  # Triton's, which is for GPUs

                        lean_adam_kernel.update(flat, group)
                        continue
                    for part in zip(*(row.split(PART) for row in flat), strict=True):
                        update(part, group)

    def _initialize(self, parameter: Tensor) -> None:
        """As if the parameter had been updated by nothing so far, where it has no state."""
        if not self.state[parameter]:
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[parameter][name] = torch.zeros_like(parameter)
            self.state[parameter]["master_param"] = torch.zeros_like(parameter, dtype=torch.int16)

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """One of a parameter's states as float32; "master_param" is the whole master."""
        value = self.state[parameter][name]
        return join(parameter, value) if name == "master_param" else value.float()

    @torch.no_grad()
    def set_scaled_state(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """The reverse; a master also sets the weight that it rounds to."""
        self._initialize(parameter)
        if name == "master_param":
            weight, value = split(value.to(parameter.device))
            parameter.copy_(weight)
        self.state[parameter][name].copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn the remainders into bf16."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def update(part: tuple[Tensor, ...], group: dict[str, Any]) -> None:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) in float32, in place.

    Args:
        part: flat: weight bf16, gradient of any precision, remainder int16, both moments bf16.
        group: of the optimizer, its step counted.
    """
    weight, gradient, remainder, exp_avg, exp_avg_sq = part
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    first = exp_avg.float().lerp_(gradient, 1 - beta1)
    second = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    master = join(weight, remainder).mul_(1 - group["lr"] * group["weight_decay"])
    root = second.div_(1 - beta2 ** group["step"]).sqrt_().add_(group["eps"])
    master.addcdiv_(first, root, value=-group["lr"] / (1 - beta1 ** group["step"]))
    for kept, value in zip((weight, remainder), split(master), strict=True):
        kept.copy_(value)
