"""The fused attention kernels.

To be read in this order: `call` (what a kernel is told), `tiles` (blocks of keys and rows in memory),
`scores` (bias, mask and dropout), `forward_pass`, `query_gradients`, `key_gradients`; then `block_sizes` and
`launch`, which are plain Python.

Shapes: b batch; h query heads; g key/value heads; r = h / g; i, j query and key length; d head dim.
A *group* is a key/value head of a batch row, b * g of them. Its r query heads stand side by side: row
`query * r + head` of i * r rows, so that each block of keys is loaded once for all of them.

Per block of ROWS rows and KEYS keys, with c = scale * log2(e):

    z  = q k^T + bias / scale       -inf where the key is not visible
    p  = exp2(c z - lse)            lse = log2(sum(exp2(c z))), one a row
    o  = p v
    dp = do v^T
    dz = p (dp - delta)             delta = sum(o do), one a row; dz is the gradient of `scale q k^T + bias`
    dq = scale dz k                 `backward_queries`: a block of rows meets the keys it sees
    dk = scale dz^T q;  dv = p^T do `backward_keys`: a block of keys meets the rows that see it

Two passes cost seven products where one that adds dq with atomics costs five; in return each sum has one
order, and the same call gives the same bits. For wide heads the second is two again, one for dk and one for
dv, with an eighth product: the sums of both do not fit into the registers.

Blocks wholly behind the diagonal and the reach of a learned bias take the plain path; the others are *edge*
blocks. Key mask and documents are looked up in both. Dropout draws from Philox at (key, query, head): the
same in every pass, whatever the blocks.
"""
