"""Computation of one rank: config, weights, attention, router, experts, decoder, cache, checkpoints.

Letters in shapes, in all of `cmx_jax`, each with one meaning (`tests/test_letters.py` keeps the list true):

    B  rows of a batch (in decode one sequence each)    J  sequences packed into one batch row
    T  new tokens per batch row                         t  the part of `T` that one rank has
    S  addresses of a batch row, cached and new         k  drafted tokens per sequence
    D  model width                                      O  outputs of a matrix: of the head, the vocabulary
    H  query heads                                      Y  key-value heads of GQA
    N  unrotated width of a head; of GQA all of it      R  rotated width of a head
    V  width of a head's value                          Q  query latent
    A  key-value latent                                 C  numbers of a cached row
    E  routed experts                                   K  experts per token
    X  expert slots                                     F  hidden width of an FFN or an expert
    L  layers                                           G  ranks of a group
    P  pages                                            W  tokens per page
    Z  rows of a message buffer                         M  elements of a message
    I  inputs of a matrix, when it is quantised

Axes without a letter have a word: `[B, pages]`. An axis in front of others may be any number of axes (`*B`,
`...`).
"""
