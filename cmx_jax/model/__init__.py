"""What one rank computes: config, weights, attention, router, experts, decoder, cache, checkpoints.

Letters in shapes: `B` sequences, `T` new tokens per sequence, `S` cached positions, `D` model width,
`H` heads, `N` nope dim, `R` rope dim, `V` value dim, `Q` query latent, `C` KV latent, `E` experts,
`F` expert hidden, `K` top-k, `X` expert slots, `P` pages, `W` page width, `G` ranks in an axis,
`L` layers, `O` vocabulary.
"""
