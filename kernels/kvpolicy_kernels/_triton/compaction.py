"""Moving what is kept to the front, in place."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import row_of


@triton.jit(do_not_specialize=["rows", "heads", "columns"])
def move_kept(
    data_ptr, db, dh, dn, index_ptr, ib, ih, in_, rows, heads, columns,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Copy slot `index[c]` to slot `c`, for one word of the slots per lane and `ROWS` rows per program.

    A lane owns its word of every slot of its row, so nothing that one lane writes is read by another: no barrier, and
    none of the orders that a barrier would have to impose. Within a lane the `BATCH` loads come before the stores, and
    indices ascend, `index[c] >= c`, so a store never hits a slot that is still to be read. Padding columns repeat the
    last kept slot, which is only ever overwritten with itself.
    """
    lane = tl.arange(0, ROWS * PADDED)
    number = tl.program_id(0) * ROWS + lane // PADDED
    word = lane % PADDED
    mine = (number < rows) & (word < WIDTH)
    _, b, h = row_of(number, heads)
    data = data_ptr + b * db + h * dh + word
    index = index_ptr + b * ib + h * ih
    for start in range(0, columns, BATCH):
        held = ()
        for i in tl.static_range(BATCH):
            to = start + i + tl.zeros_like(lane)
            source = tl.load(index + to.to(tl.int64) * in_, mask=mine & (to < columns), other=0)
            moves = mine & (to < columns) & (source != to)
            held = held + ((tl.load(data + source * dn, mask=moves), moves),)
        for i in tl.static_range(BATCH):
            to = (start + i + tl.zeros_like(lane)).to(tl.int64)
            tl.store(data + to * dn, held[i][0], mask=held[i][1])
