"""Pools as processes: a router in front, workers that prefill or decode, on one host or many.

    client -- OpenAI's API --> router
                                 | 1. POST /internal/prefill   prompt, parameters
                                 |    <- first token, drafts, kv_transfer_params (a ticket)
                                 | 2. POST /internal/decode    all that, to any decode worker
    prefill worker <-- pages, by ticket (kv/) -- decode worker
                                 |    <- tokens, line by line
    both <-- blocks --> cache servers (ems/)

All of them are peers: any request may go to any worker, the one with the least to do. The router keeps the
prompt and every token that it has handed on, so that whatever a worker loses, by dying or by preempting, is
recomputed elsewhere from there: prompt and tokens so far are a prompt. Or, with the policy `fail`, it is an
explicit error. That a worker died shows at its connections; that it hangs, as it says nothing of itself for
some seconds. Whoever leaves closes his connection, and what was done for him ends; pages that nobody comes
for are withdrawn by the router, under the id that it gave them, or freed at the end of their lease.

`messages.py` has what is said in JSON, `worker.py` a worker's routes, `peer.py` how a worker is asked,
`router.py` the policy. Every message needs the secret that all of them share.
"""
