"""Ranks that sleep while nobody asks anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mmcore.inference.engine import Engine

# As long as a person may think. A main rank that has died closes its connections, which ends the others at once.
PATIENCE = timedelta(days=365)


class Standby:
    """Calls the other ranks to their engine when there is work. All ranks make one.

    In `Engine.follow` a rank waits for minutes at most, and between GPUs it keeps its GPU busy with that.
    Here it waits as long as it takes, by the host's network.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_awake = False
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None

    @contextmanager
    def awake(self) -> Iterator[None]:
        """On the main rank: the others take part in the engine's steps.

        After an exception they are left to the launcher, which ends them: nobody knows where they stand.

        Raises:
            RuntimeError: a step has failed with a ValueError, which is no mistake of the user's here.
        """
        self._tell(True)
        self.is_awake = True
        try:
            yield
        except ValueError as error:
            raise RuntimeError(f"the engine has failed: {error}") from error
        self.engine.close()
        self.is_awake = False

    def release(self) -> None:
        """On the main rank: let the others go, if they sleep."""
        if not self.is_awake:
            self._tell(False)

    def follow(self) -> None:
        """On the other ranks: wake and sleep with the main one until it lets this one go."""
        while self._hear():
            self.engine.follow()

    def _tell(self, is_work: bool) -> None:
        if self.group is not None:
            dist.broadcast_object_list([is_work], 0, self.group)

    def _hear(self) -> bool:
        heard = [False]
        dist.broadcast_object_list(heard, 0, self.group)
        return heard[0]
