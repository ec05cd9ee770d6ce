"""A teacher on ranks of its own, which serve the student's ranks.

NeMo's strategy and Megatron's groups always use the whole world. So the processes of one launch are divided into two
worlds before either starts ``torch.distributed``. The first ranks are the student's world, in which NeMo's trainer runs
as usual; the others are the teacher's world, with Megatron's groups in its own layout and without NeMo. One gloo group
over all processes, outside of both worlds, connects them (:class:`Bridge`). Both worlds use the launcher's store; the
teacher's world and the bridge have their own key prefixes in it.

The protocol: before each step the student's first rank sends every teacher rank a header, ``[op, m, b, s]``. The first
rank of each student replica sends the tokens to the ranks of the teacher replicas that run them. The teacher's last
stage delivers its results to the student's (:mod:`~nemo_minitron.distillation.teachers.placement`). A final header ends
the protocol. A world that fails closes its connections, which ends the other world.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_minitron.distillation.losses.fused_head import OutputHead
from nemo_minitron.distillation.teachers.frozen import Teacher
from nemo_minitron.distillation.teachers.own_layout import OutputLayer, run_replica
from nemo_minitron.distillation.teachers.placement import Transfer, deliver, packed_requests
from nemo_minitron.errors import ConfigError, MinitronError, first_line
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.device import Device
from nemo_minitron.runtime.groups import Groups, ParallelLayout, initialize

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.distillation.losses.state_hooks import TeacherStates

__all__ = ["Bridge", "RemoteTeacher", "becomes_teacher", "serve_teacher"]

_END, _STEP = 0, 1
_REQUESTS, _RESULTS = 1, 2
"""Tags: what one rank sends another of each kind keeps its order."""


def becomes_teacher(student: ParallelLayout, teacher: ParallelLayout) -> bool:
    """Whether this process is a teacher rank. If not, it sees only the student's world from here on.

    Call it before anything starts ``torch.distributed`` or builds a trainer: it sets ``WORLD_SIZE`` and
    ``LOCAL_WORLD_SIZE``, from which these take the number of processes.

    Raises:
        ConfigError: if the number of launched processes is not the sum of both layouts.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != student.world_size + teacher.world_size:
        raise ConfigError(
            f"the student's layout needs {student.world_size} processes and the teacher's {teacher.world_size} further "
            f"ones; {world} are running"
        )
    if rank >= student.world_size:
        return True
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) - (rank - int(os.environ.get("LOCAL_RANK", rank)))
    os.environ["WORLD_SIZE"] = str(student.world_size)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(local, student.world_size))
    return False


def _store(timeout: datetime.timedelta) -> dist.TCPStore:
    """A further client of the launcher's store, or of the store of the student's first rank.

    The student's store starts a minute after these ranks, once NeMo is imported. A client without a server retries at
    ever longer intervals, so this waits for the server's port first.

    Raises:
        ConfigError: if no store starts in time.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection(address, timeout=10).close()
            break
        except OSError as error:
            if time.monotonic() > limit:
                raise ConfigError(
                    f"the student's first rank does not answer at {address[0]}:{address[1]} ({error}); look at its log"
                ) from error
            time.sleep(0.2)
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )


class Bridge:
    """Messages between the two worlds, over gloo and through the memory of the hosts.

    The student's ranks come first, the teacher's after them. Collective over the processes of both worlds.

    Args:
        student, teacher: layouts.
        rank: of this process among all.
        timeout_minutes: longest wait for a message; after it an error is raised.
    """

    def __init__(self, student: ParallelLayout, teacher: ParallelLayout, *, rank: int, timeout_minutes: float) -> None:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        self.first_teacher = student.world_size
        self._group = dist.ProcessGroupGloo(
            dist.PrefixStore("minitron-bridge", _store(timeout)),
            rank,
            student.world_size + teacher.world_size,
            timeout,
        )

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> dist.Work:
        """Start sending a tensor on the CPU."""
        return self._group.send([tensor], rank, tag)

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> torch.Tensor:
        """Fill a tensor on the CPU."""
        self._group.recv([tensor], rank, tag).wait()
        return tensor

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """See :class:`~nemo_minitron.distillation.teachers.placement.Link`."""
        works = [self.send(tensor.cpu(), rank, _RESULTS) for tensor, rank in sends]
        for tensor, rank in receives:
            host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
            self.receive(host, self.first_teacher + rank, _RESULTS)
            if host is not tensor:
                tensor.copy_(host)
        for work in works:
            work.wait()


class RemoteTeacher:
    """On the student's ranks, stands for a teacher that runs on other ranks.

    Memory: on the last stage the teacher's output layer (see :class:`OutputLayer`), and for each micro-batch of a step
    what is delivered. Communication a step: 8 bytes a token to each rank of one teacher replica, and the delivery. The
    student waits for the teacher.

    Args:
        checkpoint: the teacher; only its output layer is read.
        groups: the student's.
        layout: the teacher's.
        dtype: of the delivered tensors.
        timeout_minutes: of the bridge.
        student_rows: the student's vocabulary, where it is not as large as the teacher's.
    """

    states: TeacherStates | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Groups,
        layout: ParallelLayout,
        dtype: torch.dtype,
        *,
        timeout_minutes: float,
        student_rows: int | None = None,
    ) -> None:
        self.groups, self.layout = groups, layout
        self.transfer = Transfer(checkpoint.shape, groups.layout, layout, student_rows)
        self.bridge = Bridge(groups.layout, layout, rank=dist.get_rank(), timeout_minutes=timeout_minutes)
        self._output = OutputLayer(checkpoint, self.transfer, groups, dtype)
        self._like = torch.empty(0, dtype=dtype, device=groups.device.torch)

    def _teachers(self, replica: int) -> list[int]:
        """The bridge's ranks of a replica of the teacher."""
        layout = self.layout
        return [
            self.bridge.first_teacher + layout.rank(tensor=tensor, data=replica, pipeline=stage)
            for stage in range(layout.pipeline)
            for tensor in range(layout.tensor)
        ]

    def _announce(self, header: list[int]) -> None:
        if self.groups.is_main:
            message = torch.tensor(header)
            everyone = range(self.layout.world_size)
            for work in [self.bridge.send(message, self.bridge.first_teacher + rank, _REQUESTS) for rank in everyone]:
                work.wait()

    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """See :class:`~nemo_minitron.distillation.teachers.frozen.TeacherSource`; all student ranks call it.

        Raises:
            MinitronError: if a rank of the teacher has ended, or does not answer in time.
        """
        try:
            return self._exchanged(batches)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # which has no class of its own
                raise
            first = self.bridge.first_teacher
            raise MinitronError(
                f"teacher_placement=own_ranks: a rank of the teacher does not answer ({first_line(error)}); look at "
                f"the logs of ranks {first} to {first + self.layout.world_size - 1}. The same command goes on from the "
                "last checkpoint"
            ) from error

    def _exchanged(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """The step's requests sent, and their results."""
        micro_batch_size, sequence = batches[0]["tokens"].shape
        self._announce([_STEP, len(batches), micro_batch_size, sequence])
        works = []
        if self.groups.tp_rank == 0 and self.groups.is_first_stage:
            requests = packed_requests(batches, torch.device("cpu"))
            for replica in range(self.layout.data):
                part = requests[_share(self.transfer, replica, self.groups.dp_rank, len(batches))]
                if len(part):
                    part = part.contiguous()
                    works += [self.bridge.send(part, rank, _REQUESTS) for rank in self._teachers(replica)]
        received = deliver(
            self.transfer,
            self.bridge,
            {},
            teacher_rank=None,
            student_rank=dist.get_rank(),
            micro_batches=len(batches),
            micro_batch_size=micro_batch_size,
            sequence=sequence,
            like=self._like,
        )
        for work in works:
            work.wait()
        return received

    def logits(self, kept: torch.Tensor) -> torch.Tensor:
        """``[s, b, V/tp]`` in the student's layout."""
        return self._output.logits(kept)

    def head(self, kept: torch.Tensor) -> OutputHead | None:
        """See :class:`~nemo_minitron.distillation.teachers.frozen.TeacherSource`."""
        return self._output.head(kept)

    def close(self) -> None:
        """Let the teacher's ranks end."""
        self._announce([_END, 0, 0, 0])


def _share(transfer: Transfer, replica: int, student_replica: int, micro_batches: int) -> slice:
    """The micro-batches of one student replica that a teacher replica runs."""
    numbers = transfer.replica(replica, micro_batches * transfer.student.data)
    first = student_replica * micro_batches
    start, stop = (min(max(end - first, 0), micro_batches) for end in (numbers.start, numbers.stop))
    return slice(start, stop)


def serve_teacher(
    checkpoint: Checkpoint,
    student: ParallelLayout,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    timeout_minutes: float,
    seed: int = 1234,
    device: Device | None = None,
    student_rows: int | None = None,
) -> int:
    """Run the micro-batches that the student's ranks send, until they are done. Every teacher rank calls it.

    Args:
        checkpoint: the teacher.
        student, layout: the student's layout, and the teacher's.
        dtype: of its weights, activations and the delivered tensors.
        timeout_minutes: longest wait for a message; after it an error is raised.
        seed: of Megatron's random-state tracker.
        device: of this process; None for the device chosen at its start.
        student_rows: the student's vocabulary; None where it is as large as the teacher's.

    Returns:
        Steps served.

    Raises:
        ShapeError: if the layout cannot split it.
        CheckpointError: if the checkpoint cannot be read.
    """
    place = int(os.environ["RANK"])
    device, timeout = cpu.ensure(device), datetime.timedelta(minutes=timeout_minutes)
    device.use()
    dist.init_process_group(
        device.backend,
        store=dist.PrefixStore("minitron-teacher", _store(timeout)),
        rank=place - student.world_size,
        world_size=layout.world_size,
        timeout=timeout,
    )
    groups = initialize(layout, device=device, seed=seed, timeout_minutes=timeout_minutes)
    transfer = Transfer(checkpoint.shape, student, layout, student_rows)
    teacher = Teacher.load(checkpoint, groups, dtype=dtype)
    if transfer.hidden:
        teacher.drop_output_layer()
    bridge = Bridge(student, layout, rank=place, timeout_minutes=timeout_minutes)
    steps = 0
    while True:
        header = bridge.receive(torch.empty(4, dtype=torch.int64), 0, _REQUESTS)
        op, micro_batches, micro_batch_size, sequence = header.tolist()
        if op == _END:
            return steps
        parts = []
        for replica in range(student.data):
            share = _share(transfer, groups.dp_rank, replica, micro_batches)
            if share.stop > share.start:
                part = torch.empty(share.stop - share.start, 2, micro_batch_size, sequence, dtype=torch.int32)
                parts.append(bridge.receive(part, student.rank(tensor=0, data=replica, pipeline=0), _REQUESTS))
        first = transfer.replica(groups.dp_rank, micro_batches * student.data).start
        results = run_replica(teacher, transfer, torch.cat(parts).to(device.torch), first) if parts else {}
        deliver(
            transfer,
            bridge,
            results,
            teacher_rank=dist.get_rank(),
            student_rank=None,
            micro_batches=micro_batches,
            micro_batch_size=micro_batch_size,
            sequence=sequence,
            like=torch.empty(0, dtype=dtype, device=device.torch),
        )
        steps += 1
