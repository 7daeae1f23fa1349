"""The optimizer's state by whole parameters, as a checkpoint and a change of what is trained want it.

megatron-core's distributed optimizer deals masters and moments to the replicas by the bytes of DDP's buffers, which no
other layout has. It can gather whole parameters, but all of them at once, on every rank, and copies them twice: 36
bytes of the host's memory for each trained parameter, 30 on each of two replicas (measured at 0.16.1, as
tests/training/test_peaks.py does). Here whole parameters are dealt to the replicas and go round one by one, so a
rank holds 12 bytes of those that are its own, and its GPU beside the training one parameter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore import host
from mmcore.checkpoint_shards import read_shards

from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip  (after ours, which mends it)
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories  # isort: skip

# Of each trained parameter: its float32 master and AdamW's two moments.
State = dict[str, Tensor]
KINDS = ("param", "exp_avg", "exp_avg_sq")

# Bytes that a rank reads of a checkpoint before they go where they belong.
PORTION = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What an optimizer knows of the parameters that it trains."""

    updates: int
    owners: Mapping[nn.Parameter, int]
    """Of each, the data parallel rank that has its state."""
    states: Mapping[nn.Parameter, State]
    """Of those that are this rank's: float32, flat, on the host."""


def optimizer_state(optimizer: Any) -> Known:
    """Gather what the optimizer knows of this rank's part of the model. All ranks call it."""
    updates, owners = _updates(optimizer), deal(optimizer)
    states = {parameter: state for parameter, state in _whole(optimizer, updates, owners) if state}
    return Known(updates=updates, owners=owners, states=states)


def set_optimizer_state(optimizer: Any, known: Known) -> None:
    """Give a new optimizer what was known of its parameters; to the others their weights and zero moments.

    mcore has one count of updates for all parameters, by which AdamW corrects the moments. Those of a
    parameter that thaws are taken for old ones: with the default betas its first update is 0.45 lr, not
    lr. (A stage's warmup begins at 0 anyway.)
    """
    for inner in _inner(optimizer):
        inner.load_state_dict(inner.state_dict())  # allocates
        for group in inner.param_groups:
            group["step"] = known.updates
    for inner, parameter in _trained(optimizer):
        _set(inner, parameter, known)


def sharded_optimizer(optimizer: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of the optimizer, as megatron-core's `fully_reshardable` lays it out. All ranks call it.

    Args:
        weights: the model's sharded state dict.
    """
    (inner,) = _inner(optimizer)
    updates, owners = _updates(optimizer), deal(optimizer)
    shards, found = _shards(weights), {}
    for index, (parameter, state) in enumerate(_whole(optimizer, updates, owners)):
        if state:
            found[index] = _as_shards(shards[parameter], state)
            for shard in nested_values(found[index]):
                if shard.data.untyped_storage().nbytes() > shard.data.nbytes:  # a half, of which mcore makes a copy
                    shard.data = shard.data.clone()  # now, while there is one
    content = inner.state_dict()
    for group in content["optimizer"]["param_groups"] if updates else ():
        group["step"] = updates  # a stage that trains nothing may not count them
    return {**content, "param_state": found, "param_state_sharding_type": "fully_reshardable"}


def load_optimizer(optimizer: Any, weights: Mapping[str, Any], folder: Path, content: Mapping[str, Any]) -> None:
    """Load what `sharded_optimizer` gave, at any layout. All ranks call it.

    Args:
        weights: the model's sharded state dict.
        content: what the checkpoint holds beside tensors.
    """
    (inner,) = _inner(optimizer)
    inner.load_state_dict({key: value for key, value in content.items() if not key.startswith("param_state")})
    owners, shards = deal(optimizer), _shards(weights)
    portions = _portions(owners)
    number = torch.tensor(len(portions), device=host.device())
    dist.all_reduce(number, dist.ReduceOp.MAX)  # reading is done by all ranks together
    for index in range(int(number)):
        portion = portions[index] if index < len(portions) else []
        states = {
            parameter: {kind: torch.empty(parameter.numel(), dtype=torch.float32) for kind in KINDS}
            for parameter in portion
            if owners[parameter] == inner.data_parallel_group.rank()
        }
        read_shards([_as_shards(shards[parameter], state) for parameter, state in states.items()], folder)
        known = Known(updates=0, owners=owners, states=states)
        for parameter in portion:
            _set(inner, parameter, known)


def deal(optimizer: Any) -> dict[nn.Parameter, int]:
    """Whose each trained parameter is among the data parallel ranks, about as many numbers for each; on all alike."""
    owners, load = {}, [0]
    for inner, parameter in _trained(optimizer):
        load += [0] * (inner.data_parallel_group.size() - len(load))
        owners[parameter] = load.index(min(load))
        load[owners[parameter]] += parameter.numel()
    return owners


def _inner(optimizer: Any) -> list[Any]:
    return [inner for inner in optimizer.chained_optimizers if not inner.is_stub_optimizer]


def _trained(optimizer: Any) -> Iterator[tuple[Any, nn.Parameter]]:
    """All that a rank's part of the model trains, and the optimizer of it, in one order on all replicas."""
    for inner in _inner(optimizer):
        for buffer in inner.buffers:
            for parameter in buffer.param_index_map:
                yield inner, parameter


def _updates(optimizer: Any) -> int:
    updates = torch.tensor(max([group.get("step", 0) for group in optimizer.param_groups], default=0))
    updates = updates.to(host.device())
    dist.all_reduce(updates, dist.ReduceOp.MAX)  # a stage that trained nothing has counted none
    return int(updates)


def _place(inner: Any, parameter: nn.Parameter) -> slice | None:
    """Which of a parameter's numbers this rank updates; None for none of them."""
    if parameter not in inner.model_param_gbuf_map:
        return None
    found = inner._get_model_param_range_map(parameter)["param"]
    return slice(found.start, found.end)


def _fresh(parameter: nn.Parameter, place: slice) -> State:
    weight = parameter.detach().flatten()[place].float()
    return {"param": weight, **{kind: torch.zeros_like(weight) for kind in KINDS[1:]}}


def _whole(
    optimizer: Any, updates: int, owners: Mapping[nn.Parameter, int]
) -> Iterator[tuple[nn.Parameter, State | None]]:
    """Each trained parameter's whole state, on the host of its owner; None elsewhere."""
    for inner, parameter in _trained(optimizer):
        place, group = _place(inner, parameter), inner.data_parallel_group
        part: State = {}
        if place:
            # Before the first update there are no moments.
            known = inner._get_main_param_and_optimizer_states if updates else lambda of, at=place: _fresh(of, at)
            part = known(parameter)
        is_own, state = owners[parameter] == group.rank(), {}
        for kind in KINDS:
            if group.size() == 1:
                whole = part[kind].detach()
            else:
                # Numbers go as the whole numbers that their bits are: of those a sum with zeros changes none.
                whole = torch.zeros(parameter.numel(), dtype=torch.int32, device=host.device())
                if place:
                    whole[place] = part[kind].detach().view(torch.int32)
                dist.reduce(whole, dist.get_global_rank(group, owners[parameter]), group=group)
                whole = whole.view(torch.float32)
            if is_own:
                state[kind] = torch.empty(parameter.numel(), dtype=torch.float32).copy_(whole)
        yield parameter, state or None


@torch.no_grad()
def _set(inner: Any, parameter: nn.Parameter, known: Known) -> None:
    """Give all replicas their parts of a parameter's state, from its owner."""
    place, group = _place(inner, parameter), inner.data_parallel_group
    if parameter not in known.owners:
        if place:
            inner._set_main_param_and_optimizer_states(parameter, _fresh(parameter, place))
        return
    owner, state, part = known.owners[parameter], known.states.get(parameter, {}), {}
    for kind in KINDS:
        if group.rank() == owner:
            whole = state[kind]
            whole = whole if group.size() == 1 else whole.to(host.device())
        else:
            whole = torch.empty(parameter.numel(), dtype=torch.float32, device=host.device())
        if group.size() > 1:
            dist.broadcast(whole, dist.get_global_rank(group, owner), group)
        if place:
            part[kind] = whole if group.size() == 1 else whole[place].clone()  # the whole goes
    if place:
        inner._set_main_param_and_optimizer_states(parameter, part)


def _shards(weights: Mapping[str, Any]) -> dict[Any, Any]:
    return {shard.data: shard for shard in nested_values(weights) if hasattr(shard, "replica_id")}


def _as_shards(weight: Any, state: State) -> dict[str, Any]:
    """A parameter's state, laid out as its weight: views of it, written by the rank that has it."""
    found = {}
    for kind, value in state.items():
        fields: dict[str, Any] = {
            "key": f"optimizer.state.{kind}.{weight.key}",
            "data": value.view(weight.data.shape),
            "replica_id": (*weight.replica_id[:-1], 0),
        }
        if not isinstance(weight, ShardedTensorFactory):
            fields["dtype"] = value.dtype
        found[kind] = replace(weight, **fields)
    apply_factories(found)
    return found


def _portions(owners: Mapping[nn.Parameter, int]) -> list[list[nn.Parameter]]:
    """Parameters in their order, cut where one rank's own have `PORTION` bytes; on all replicas alike."""
    portions: list[list[nn.Parameter]] = []
    load: dict[int, int] = {}
    for parameter, owner in owners.items():
        size = 4 * len(KINDS) * parameter.numel()
        if not portions or load.get(owner, 0) + size > PORTION:
            portions.append([])
            load = {}
        portions[-1].append(parameter)
        load[owner] = load.get(owner, 0) + size
    return portions
