"""How the work fits into the memory that was allowed. Knows nothing of threads or files.

Every thread has a block of the output file to fill and a buffer for what the block is made from. Neither
grows with the model: a block holds pieces of tensors, and many sources only make the pieces smaller.
"""

from dataclasses import dataclass

from merger.ahead import WINDOWS
from merger.checksum import LEAF
from merger.errors import NotEnoughMemory
from merger.host import processors
from merger.plan import Plan

LARGEST_BLOCK = 2 << 20  # bytes: three inputs, the output and a thread's neighbours fit the last-level cache
SMALLEST_PIECE = 1024  # elements
DEFAULT_MEMORY = 1 << 30
MOST_AHEAD = 512 << 20  # bytes of remote files: eight requests of 16 MiB, four times over


@dataclass(frozen=True)
class Allotment:
    """Threads, and the bytes that each of them holds: a block of output and a buffer for its inputs. `ahead` are the
    bytes of remote files that may be fetched before they are needed; `whole` those for tensors that are made as a whole
    (before the blocks are), on a `device`; `measuring` those for the numbers that a first pass finds.
    """

    threads: int
    block: int
    buffer: int
    ahead: int = 0
    whole: int = 0
    device: str = "auto"
    measuring: int = 0

    @property
    def memory(self) -> int:
        return max(self.threads * (self.block + self.buffer) + self.ahead, self.whole, self.measuring)


def allot(plan: Plan, memory: int = DEFAULT_MEMORY, threads: int | None = None, device: str = "auto") -> Allotment:
    """Divide `memory` bytes among `threads` (twice the processors without), with fewer threads where it is scarce.

    A tensor that is made as a whole, or measured, may take more, alone (`merger.spilling.check_room`).

    Raises NotEnoughMemory with the number that would do.
    """
    widest = max(
        (entry.expression for shard in plan.shards for entry in shard.entries),
        key=lambda tensor: tensor.memory(SMALLEST_PIECE),
    )
    least = widest.memory(SMALLEST_PIECE)
    whole = max(memory, plan.wholes[0].cost) if plan.wholes else 0
    wanted = threads or 2 * processors()
    measuring = plan.measuring * max(1, min(wanted, memory // max(1, plan.measuring)))
    ahead = min(memory // 2, MOST_AHEAD) if plan.is_remote else 0
    for count in range(wanted, 0, -1):
        share = (memory - ahead) // count
        block = _block(share, least)
        while ahead and block > LEAF and widest.memory(block // widest.itemsize) > ahead // WINDOWS:
            block //= 2  # what a block needs is fetched as one
        if share - block >= least:
            buffer = min(share - block, max(least, widest.memory(block // widest.itemsize)))
            return Allotment(count, block, buffer, ahead, whole, device, measuring)
    raise NotEnoughMemory(
        f"{memory:,} bytes of memory are too few for {sum(1 for _ in widest.leaves())} sources",
        where="--memory",
        remedy=f"Allow at least --memory {-(-(LEAF + least) * (2 if ahead else 1) // 1024)}KiB.",
    )


def _block(share: int, least: int) -> int:
    """The block for a thread that may hold `share` bytes: at most a quarter of it, leaving `least` for the inputs."""
    block = LARGEST_BLOCK
    while block > LEAF and (block > share // 4 or share - block < least):
        block //= 2
    return block
